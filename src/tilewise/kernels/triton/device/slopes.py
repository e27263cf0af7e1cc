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
def probabilities(products, call, level, b, h, i, j, MIXED: tl.constexpr):
    """Probabilities from q.k of a tile, in either orientation, and what their derivative needs.

    Args:
        level: lse in units of log 2, +inf for rows that see nothing or do not exist, in the shape of i.

    Returns:
        probabilities before dropout, 0 where not seen; kept and seen, booleans; the tanh of the soft cap.
    """
    s, seen, bend = score(products, call, b, h, i, j, MIXED)
    p = tl.exp2(s - level)
    if MIXED or len(call.dense) > 0 or call.table is not None:
        p = tl.where(seen, p, 0.0)  # the level may be NaN
    return p, keeps(seen, call, b, h, i, j), seen, bend


@triton.jit
def keeps(seen, call, b, h, i, j):
    """Booleans, which pairs dropout keeps; `seen` where there is none."""
    keep = seen
    if call.dropout is not None:
        keep = kept(call.dropout, b, h, i, j)
    return keep


@triton.jit
def share_of(level, b, h, row, size):
    """The shares of some rows, 1 of those that do not exist."""
    place = b.to(tl.int64) * level.b + h.to(tl.int64) * level.h + row.to(tl.int64) * level.row
    return tl.load(level.share + place, mask=row < size, other=1.0)


@triton.jit
def times_share(x, level, b, h, row, size):
    """x (rows, n), which is linear in the rows' probabilities, times their shares."""
    if level.share is not None:
        x = x * share_of(level, b, h, row, size)[:, None]
    return x


@triton.jit
def after_dropout(x, keep, call):
    """x / (1 - p) where kept, 0 where dropped: probabilities on their way to the values, gradients on the way back."""
    if call.dropout is not None:
        x = tl.where(keep, x * call.dropout.inverse_keep, 0.0)
    return x


@triton.jit
def slopes(p, d_weights, delta, keep, seen, bend, call, MIXED: tl.constexpr):
    """Gradients of the scores after soft cap and bias, and of scale * q.k; both 0 where not seen.

    Args:
        d_weights: d_out.v of the tile. delta: as `rows_kernel` makes it, in the shape of i.
    """
    d_scores = p * (after_dropout(d_weights, keep, call) - delta)
    d_inner = d_scores
    if call.softcap is not None:
        d_inner = d_scores * (1.0 - bend * bend)
    if MIXED or len(call.dense) > 0 or call.table is not None:
        d_scores, d_inner = tl.where(seen, d_scores, 0.0), tl.where(seen, d_inner, 0.0)
    return d_scores, d_inner
