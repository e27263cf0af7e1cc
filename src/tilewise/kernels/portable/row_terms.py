"""What the backward pass wants of each row, once for all its tiles."""

from __future__ import annotations

from typing import NamedTuple

from ..._arrays import Array
from ...contract import Operands
from ..state import FAR
from .axes import Axes, Block
from .call import Call
from .forward import attend
from .tiled_sum import tiled_sum

_MINUS_INF = float("-inf")


class RowTerms(NamedTuple):
    """Of each row, grouped (B, Hkv, G, Sq): probabilities are exp(score - level).

    Attributes:
        level: lse, 0 for rows that see nothing. empty: booleans, which these are.
        d_out: (B, Hkv, G, Sq, Dv), the gradient of the output. pull: d_lse - d_out . out, 0 for empty rows.
    """

    level: Array
    empty: Array
    d_out: Array
    pull: Array


def row_terms(call: Call, out: Array, lse: Array, d_out: Array, d_lse: Array | None) -> RowTerms:
    """The terms of all rows, in operations that torch can differentiate."""
    verbs, empty = call.verbs, lse_is_empty(call, lse)
    pull = -(verbs.cast(call.rows(d_out)) * verbs.cast(call.rows(out))).sum(-1)
    if d_lse is not None:
        pull = pull + call.rows(d_lse)
    level, pull = (verbs.xp.where(empty, 0.0, term) for term in (call.rows(lse), pull))
    return RowTerms(level, empty, call.rows(d_out), pull)


def lse_is_empty(call: Call, lse: Array) -> Array:
    """Rows that see nothing, grouped."""
    return call.rows(lse) == _MINUS_INF


def mended(call: Call, operands: Operands, terms: RowTerms, d_lse: Array | None) -> RowTerms:
    """The terms with those of far rows found again, whose lse has lost the last places of the logarithm of their sum.

    float32's 10^9 and its neighbour are 64 apart. A far row's level is its largest score, and its gradients, which are
    linear in d_out and pull as they are in its probabilities, are divided by the sum of these.
    """
    verbs, xp = call.verbs, call.verbs.xp
    far = (abs(terms.level) > FAR) & (abs(terms.level) < float("inf"))
    if call.problem.part or not bool(far.any()):
        return terms
    sinks = None
    if operands.sinks is not None:
        sinks = verbs.cast(operands.sinks).reshape(*call.q.shape[1:3], 1)
    level = terms.level + 0.0
    for block in call.walk.blocks():
        rows = block.batch, block.heads, slice(None), block.rows
        if bool(far[rows].any()):
            level[rows] = xp.where(far[rows], _largest(call, block, sinks), level[rows])
    inputs = *call.primals, (Axes.ROWS, level), (Axes.ROWS, terms.d_out)
    local, shape = call.local().row_sums, tuple(level.shape)
    total, pull = tiled_sum(call.walk, local, inputs, [(Axes.ROWS, shape)] * 2)
    if sinks is not None:
        total = total + xp.exp(sinks - level)
    total = xp.where(far, total, 1.0)
    pull = -pull / total
    if d_lse is not None:
        pull = pull + call.rows(d_lse)
    d_out = verbs.cast(terms.d_out) / total[..., None]
    return RowTerms(level, terms.empty, d_out, xp.where(far, pull / total, terms.pull))


def _largest(call: Call, block: Block, sinks: Array | None) -> Array:
    """The largest score of each row of a block, that of its sink among them."""
    peak = attend(call, block).peak
    return peak if sinks is None else call.verbs.xp.maximum(peak, sinks[block.heads])
