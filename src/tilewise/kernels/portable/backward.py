"""Backward pass of the portable kernel: probabilities made again from lse, tile by tile.

The formulas stand in `local.py`; what is not a sum over tiles, the row terms and the sinks, stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..._arrays import Array
from ...contract import Gradients, Operands, Plan
from ...problem import AttentionProblem
from ..state import FAR
from .axes import Axes, ungrouped
from .call import Call, make_call, tiles_of
from .forward import attend
from .tiled_sum import tiled_sum

Sum = Callable[..., Sequence[Array]]
_MINUS_INF = float("-inf")


def backward(plan: Plan, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array | None) -> Gradients:
    """The gradients that the problem wants, in the shapes and dtypes of the operands.

    Args:
        out, lse: results of the forward pass; d_out (B, Hq, Sq, Dv), d_lse (B, Hq, Sq) or None: their gradients.
    """
    call = make_call(plan.problem, operands, tiles_of(plan))
    with call.verbs.quiet():
        shares = _shares(call, operands, lse)
        if shares is not None:
            # All gradients are linear in these, as they are in each row's probabilities.
            d_out, d_lse = d_out * shares[..., None], d_lse * shares if d_lse is not None else None
        sums = gradient_sums(call, operands, plan.problem.gradients, out, lse, d_out, d_lse, _tiled_sum)
        return _as_operands(call, operands, sums)


def gradient_sums(
    call: Call,
    operands: Operands,
    names: frozenset[str],
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array | None,
    total: Sum,
) -> dict[str, list[Array]]:
    """For each wanted name the gradients in the accumulator's dtype, heads grouped.

    `total(call, function of Local, wanted, inputs, outputs)` sums over tiles; torch passes a differentiable one.
    """
    verbs = call.verbs
    row, pull = row_terms(call, out, lse, d_out, d_lse)
    n_dense = len(operands.dense)
    wanted = tuple(name in names for name in ("q", "k", "v")) + tuple(
        ("bias" if axes is Axes.PAIRS else "table") in names for axes, _ in call.biases
    )
    inputs = (*call.primals, (Axes.ROWS, row), (Axes.ROWS, call.rows(d_out)), (Axes.ROWS, pull))
    outputs = [(axes, tuple(array.shape)) for (axes, array), want in zip(call.primals, wanted, strict=True) if want]
    done = iter(total(call, wanted, inputs, outputs) if any(wanted) else ())
    found: dict[str, list[Array]] = {}
    for name, want in zip(("q", "k", "v", *["bias"] * n_dense, "table"), wanted, strict=False):
        if want:
            found.setdefault(name, []).append(next(done))
    if "sinks" in names and operands.sinks is not None:
        sinks = verbs.cast(operands.sinks).reshape(*call.q.shape[1:3], 1)
        weight = verbs.xp.where(lse_is_empty(call, lse), 0.0, verbs.xp.exp(sinks - row))
        found["sinks"] = [(weight * pull).sum((0, 3))]
    return found


def row_terms(call: Call, out: Array, lse: Array, d_out: Array, d_lse: Array | None) -> tuple[Array, Array]:
    """(lse, pull), grouped (B, Hkv, G, Sq), both 0 for rows that see nothing; pull = d_lse - d_out . out."""
    verbs, empty = call.verbs, lse_is_empty(call, lse)
    pull = -(verbs.cast(call.rows(d_out)) * verbs.cast(call.rows(out))).sum(-1)
    if d_lse is not None:
        pull = pull + call.rows(d_lse)
    return verbs.xp.where(empty, 0.0, call.rows(lse)), verbs.xp.where(empty, 0.0, pull)


def lse_is_empty(call: Call, lse: Array) -> Array:
    """Rows that see nothing, grouped."""
    return call.rows(lse) == _MINUS_INF


def may_be_far(problem: AttentionProblem) -> bool:
    """Whether lse may be far from 0 where its last places matter; of a part of the keys it cannot be mended."""
    return (bool(problem.bias.dense) or problem.bias.table) and not problem.part


def _shares(call: Call, operands: Operands, lse: Array) -> Array | None:
    """1 / the sum of exp(score - lse) over a row's keys and its sink, (B, Hq, Sq); None where that is 1 for all rows.

    Where biases carry lse far from 0 its last places do not hold the logarithm of a sum any more: float32's 10^9 and
    its neighbour are 64 apart.
    """
    verbs, level = call.verbs, call.rows(lse)
    far = (abs(level) > FAR) & (abs(level) < float("inf"))
    if not may_be_far(call.problem) or not bool(far.any()):
        return None
    xp, sums = verbs.xp, verbs.zeros(tuple(level.shape)) + 1
    for block in call.walk.blocks():
        rows = block.batch, block.heads, slice(None), block.rows
        if not bool(far[rows].any()):
            continue
        state = attend(call, block)
        total = state.total * xp.exp(state.peak - level[rows])
        if operands.sinks is not None:
            sinks = verbs.cast(operands.sinks).reshape(*call.q.shape[1:3], 1)[block.heads]
            total = total + xp.exp(sinks - level[rows])
        sums[rows] = xp.where(far[rows], total, sums[rows])
    return ungrouped(1 / sums)


def _tiled_sum(call: Call, wanted: tuple[bool, ...], inputs: Sequence, outputs: Sequence) -> list[Array]:
    return tiled_sum(call.walk, call.local(wanted).gradients, inputs, outputs)


def _as_operands(call: Call, operands: Operands, sums: dict[str, list[Array]]) -> Gradients:
    """Rounded once to the dtypes of the operands, heads ungrouped."""

    def like(value: Array, operand: Array, dtype: Any = None) -> Array:
        return call.verbs.to(value.reshape(operand.shape), operand.dtype if dtype is None else dtype)

    def one(name: str, operand: Array | None, dtype: Any = None) -> Array | None:
        return like(sums[name][0], operand, dtype) if name in sums else None

    summand = call.verbs.dtype if call.problem.part else None

    biases = sums.get("bias", [None] * len(operands.dense))
    return Gradients(
        q=one("q", operands.q, summand),
        k=one("k", operands.k, summand),
        v=one("v", operands.v, summand),
        dense=tuple(like(g, bias) if g is not None else None for g, bias in zip(biases, operands.dense, strict=True)),
        table=one("table", operands.table),
        sinks=one("sinks", operands.sinks),
    )
