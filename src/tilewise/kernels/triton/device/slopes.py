"""The derivative of a tile of probabilities, recomputed from the log-sum-exp (Dao et al., 2022)."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import kept
from .scores import score


@triton.jit
def load_row(rows, b, h, row, size, other):
    """One value for each of some query rows; `other` beyond the last."""
    place = rows.ptr + b.to(tl.int64) * rows.b + h.to(tl.int64) * rows.h + row.to(tl.int64) * rows.row
    return tl.load(place, mask=row < size, other=other)


@triton.jit
def slopes(products, d_products, call, lse, delta, b, h, i, j, MIXED: tl.constexpr):
    """From q.k and d_out.v of a tile, in either orientation, to what the gradients are sums of.

    Args:
        lse: in units of log 2, +inf for rows that see nothing or do not exist. delta: as `rows_kernel` makes it. Both
            have the shape of i.

    Returns:
        weights: probabilities after dropout, times v the output. d_scores: the gradient of the scores after soft cap
        and bias. d_products: that of scale * q.k. seen: booleans. All but the last are 0 where not seen.
    """
    s, seen, bend = score(products, call, b, h, i, j, MIXED)
    p = tl.exp2(s - lse)
    hidden: tl.constexpr = MIXED or len(call.dense) > 0 or call.table is not None
    if hidden:
        p = tl.where(seen, p, 0.0)  # lse may be NaN
    weights = p
    if call.dropout is not None:
        keep = kept(call.dropout, b, h, i, j, call.shape)
        weights = tl.where(keep, p * call.dropout.inverse_keep, 0.0)
        d_products = tl.where(keep, d_products * call.dropout.inverse_keep, 0.0)
    d_scores = p * (d_products - delta)
    if hidden:
        d_scores = tl.where(seen, d_scores, 0.0)
    d_inner = d_scores
    if call.softcap is not None:
        d_inner = d_scores * (1.0 - bend * bend)
        if hidden:
            d_inner = tl.where(seen, d_inner, 0.0)
    return weights, d_scores, d_inner, seen
