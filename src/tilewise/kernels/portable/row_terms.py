"""What the backward pass wants of each row, once for all its tiles."""

from __future__ import annotations

from typing import NamedTuple

from ..._arrays import Array
from ...contract import Operands
from ..state import far_from, is_far, may_be_far
from .axes import Axes
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


class FarRows(NamedTuple):
    """What lse has lost of far rows, found again; each (B, Hkv, G, Sq).

    Attributes:
        far: booleans, which rows these are.
        level: their largest score, lse of the others. total: their sum of exp(score - level), 1 of the others.
        weighed: their sum of exp(score - level) times its gradient, without meaning of the others.
    """

    far: Array
    level: Array
    total: Array
    weighed: Array


def mended(call: Call, operands: Operands, terms: RowTerms, d_lse: Array | None) -> RowTerms:
    """The terms with those of far rows found again: their gradients, which are linear in d_out and pull as they are in
    their probabilities, are divided by the sum of these."""
    verbs, xp, sinks = call.verbs, call.verbs.xp, None
    if not may_be_far(call.problem):
        return terms
    if operands.sinks is not None:
        sinks = xp.broadcast_to(verbs.cast(operands.sinks).reshape(*call.q.shape[1:3], 1), tuple(terms.level.shape))
    far = is_far(terms.level, far_from(call.problem.dropout, call.problem.dtype))
    found = far_rows(call, terms.level, far, sinks, terms.d_out)
    if found is None:
        return terms
    pull = -found.weighed / found.total
    if d_lse is not None:
        pull = pull + call.rows(d_lse)
    d_out = verbs.cast(terms.d_out) / found.total[..., None]
    return RowTerms(found.level, terms.empty, d_out, xp.where(found.far, pull / found.total, terms.pull))


def far_rows(call: Call, level: Array, far: Array, sinks: Array | None, d_out: Array) -> FarRows | None:
    """Far rows by two passes over their keys, None where there are none; no derivative.

    float32's 10^9 and its neighbour are 64 apart: there lse holds no logarithm of a sum. And where dropout keeps few
    pairs, all rows are far (`state.far_from`).

    Args:
        level, sinks: (B, Hkv, G, Sq) in the accumulator's dtype, lse and the rows' sinks. far: booleans; rows that see
            nothing may be among them. d_out: (B, Hkv, G, Sq, Dv).
    """
    verbs, xp = call.verbs, call.verbs.xp
    if verbs.known and not bool(far.any()):
        return None
    level = level + 0.0
    for block in call.walk.blocks():
        rows = block.batch, block.heads, slice(None), block.rows
        if not verbs.known or bool(far[rows].any()):
            peak = attend(call, block).peak
            peak = peak if sinks is None else xp.maximum(peak, sinks[rows])
            level[rows] = xp.where(far[rows] & (peak > _MINUS_INF), peak, level[rows])
    inputs = *call.primals, (Axes.ROWS, level), (Axes.ROWS, d_out)
    total, weighed = tiled_sum(call.walk, call.local().row_sums, inputs, [(Axes.ROWS, tuple(level.shape))] * 2)
    if sinks is not None:
        total = total + xp.exp(sinks - level)
    far = far & (total > 0)
    return FarRows(far, level, xp.where(far, total, 1.0), weighed)
