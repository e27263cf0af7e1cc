"""What the backward pass wants of each row, once for all kernels of it."""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, LOG2E, load_tile
from .device.slopes import load_row


@triton.jit(do_not_specialize=["grid_rows", "heads", "q_len"])
def rows_kernel(
    out,
    d_out,
    lse,
    d_lse,
    delta,
    level,
    grid_rows,
    heads,
    q_len,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the backward pass wants of each row.

    delta: sum of out * d_out over the width, less d_lse: what all probabilities of a row share in their gradient.
    level: lse in units of log 2, and +inf for rows that see nothing, so that their probabilities come out as 0.
    """
    bh = tl.program_id(0) // grid_rows
    b, h, first = bh // heads, bh % heads, tl.program_id(0) % grid_rows * ROWS
    row = first + tl.arange(0, ROWS)
    ours = load_tile(out, b, h, first, q_len, ROWS, WIDTH, BLOCK, False).to(tl.float32)
    theirs = load_tile(d_out, b, h, first, q_len, ROWS, WIDTH, BLOCK, False).to(tl.float32)
    total = load_row(lse, b, h, row, q_len, -INF)
    shared = tl.sum(ours * theirs, axis=1)
    if d_lse is not None:
        shared -= load_row(d_lse, b, h, row, q_len, 0.0)
    nothing = total == -INF
    place = b.to(tl.int64) * delta.b + h.to(tl.int64) * delta.h + row.to(tl.int64) * delta.row
    tl.store(delta.ptr + place, tl.where(nothing, 0.0, shared), mask=row < q_len)
    tl.store(level.ptr + place, tl.where(nothing, INF, total * LOG2E), mask=row < q_len)
