"""Which pairs are visible, from the three facts: ranges, labels, bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible(mask, b, h, i, j, q_len, k_len):
    """Whether query i sees key j; i and j are (n, 1) and (1, m), or the other way round. Outside the sizes: no."""
    seen = (i < q_len) & (j < k_len)
    b, h = b.to(tl.int64), h.to(tl.int64)
    if mask.starts is not None:
        starts, stops = mask.starts, mask.stops
        inside = seen & (j < 0)
        for r in tl.static_range(mask.ranges):
            start = tl.load(
                starts.ptr + b * starts.b + h * starts.h + i.to(tl.int64) * starts.row + r * starts.column,
                mask=i < q_len,
                other=0,
            )
            stop = tl.load(
                stops.ptr + b * stops.b + h * stops.h + i.to(tl.int64) * stops.row + r * stops.column,
                mask=i < q_len,
                other=0,
            )
            inside = inside | ((j >= start) & (j < stop))
        seen = seen & inside
    if mask.q_labels is not None:
        q_labels, k_labels = mask.q_labels, mask.k_labels
        own = tl.load(
            q_labels.ptr + b * q_labels.b + h * q_labels.h + i.to(tl.int64) * q_labels.row, mask=i < q_len, other=0
        )
        other = tl.load(
            k_labels.ptr + b * k_labels.b + h * k_labels.h + j.to(tl.int64) * k_labels.row, mask=j < k_len, other=0
        )
        seen = seen & (own == other)
    if mask.bits is not None:
        seen = seen & (bit(mask.bits, b, h, i, j, seen) != 0)
    return seen


@triton.jit
def bit(bits, b, h, i, j, inside):
    """The bytes of `bits` at (b, h, i, j), 0 where not `inside`."""
    row = b * bits.b + h * bits.h + (i - bits.query).to(tl.int64) * bits.row
    return tl.load(bits.ptr + row + (j - bits.key).to(tl.int64) * bits.column, mask=inside, other=0)
