"""Backward pass of the portable kernel: probabilities made again from lse, tile by tile.

The formulas stand in `local.py`; what is not a sum over tiles, the row terms and the sinks, stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..._arrays import Array
from ...contract import Gradients, Operands, Plan
from .axes import Axes
from .call import Call, make_call, tiles_of
from .row_terms import RowTerms, mended, row_terms
from .tiled_sum import tiled_sum

Sum = Callable[..., Sequence[Array]]


def backward(plan: Plan, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array | None) -> Gradients:
    """The gradients that the problem wants, in the shapes and dtypes of the operands.

    Args:
        out, lse: results of the forward pass; d_out (B, Hq, Sq, Dv), d_lse (B, Hq, Sq) or None: their gradients.
    """
    call = make_call(plan.problem, operands, tiles_of(plan))
    with call.verbs.quiet():
        terms = mended(call, operands, row_terms(call, out, lse, d_out, d_lse), d_lse)
        sums = gradient_sums(call, operands, plan.problem.gradients, terms, _tiled_sum)
        return _as_operands(call, operands, sums)


def gradient_sums(
    call: Call,
    operands: Operands,
    names: frozenset[str],
    terms: RowTerms,
    total: Sum,
) -> dict[str, list[Array]]:
    """For each wanted name the gradients in the accumulator's dtype, heads grouped.

    `total(call, function of Local, wanted, inputs, outputs)` sums over tiles; torch passes a differentiable one.
    """
    verbs = call.verbs
    level, empty, d_out, pull = terms
    n_dense = len(operands.dense)
    wanted = tuple(name in names for name in ("q", "k", "v")) + tuple(
        ("bias" if axes is Axes.PAIRS else "table") in names for axes, _ in call.biases
    )
    inputs = (*call.primals, (Axes.ROWS, level), (Axes.ROWS, d_out), (Axes.ROWS, pull))
    outputs = [(axes, tuple(array.shape)) for (axes, array), want in zip(call.primals, wanted, strict=True) if want]
    done = iter(total(call, wanted, inputs, outputs) if any(wanted) else ())
    found: dict[str, list[Array]] = {}
    for name, want in zip(("q", "k", "v", *["bias"] * n_dense, "table"), wanted, strict=False):
        if want:
            found.setdefault(name, []).append(next(done))
    if "sinks" in names and operands.sinks is not None:
        sinks = verbs.cast(operands.sinks).reshape(*call.q.shape[1:3], 1)
        weight = verbs.xp.where(empty, 0.0, verbs.xp.exp(sinks - level))
        found["sinks"] = [(weight * pull).sum((0, 3))]
    return found


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
