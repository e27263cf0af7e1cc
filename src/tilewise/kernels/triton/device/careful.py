"""A product over keys (or queries) of which some rows are not finite and some outputs must not see them.

A weight of 0 does not hide a NaN: 0 * NaN is NaN. The kernels therefore look at their result once, at its end, and only
where it is not finite is it computed again, with the product below, in which a row that is not finite reaches just
those who see it: in `careful_kernels`, or where few rows are decoded in the same kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, is_finite

# Rows that the careful product takes at once: the fewest that a matrix instruction does, so that the code for the rare
# case needs no more registers than that for the common one.
CAREFUL_ROWS = tl.constexpr(16)


@triton.jit
def add_seen(acc, weights, seen, rows):
    """acc + weights @ rows where pairs that are not `seen` do not exist.

    Args:
        acc: (n, d) float32. weights: (n, m) float32, 0 where not seen. seen: (n, m) booleans. rows: (m, d).
    """
    wide = rows.to(tl.float32)
    sound = tl.min(is_finite(wide).to(tl.int32), axis=1) != 0
    acc = dot(weights.to(rows.dtype), tl.where(sound[:, None], wide, 0.0).to(rows.dtype), acc)
    if not all_finite(wide):
        m = tl.arange(0, rows.shape[0])
        for n in range(rows.shape[0]):
            this = (m == n) & (sound == 0)
            row = tl.sum(tl.where(this[:, None], wide, 0.0), axis=0)
            weight = tl.sum(tl.where(this[None, :], weights, 0.0), axis=1)
            sees = tl.max((this[None, :] & seen).to(tl.int32), axis=1) != 0
            acc = tl.where(sees[:, None], acc + weight[:, None] * row[None, :], acc)
    return acc


@triton.jit
def note_unsound(unsound, x):
    """Set this program's number in `unsound`, unless that is None, where a 2-D tile is not finite."""
    if unsound is not None:
        tl.store(unsound + tl.program_id(0), 1, mask=all_finite(x) == 0)


@triton.jit
def all_finite(x):
    """Whether a 2-D tile has neither NaN nor infinities, as a scalar."""
    return tl.min(is_finite(x).to(tl.int32), axis=None) != 0
