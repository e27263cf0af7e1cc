"""Attention of few queries: keys are split among programs, and the query heads of a group stand in one tile.

The splits have a fixed size and their states are merged in the order of the keys, so a row's bits depend neither on the
batch nor on the load (Dao et al., Flash-Decoding, 2023, with splits that do not adapt).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, INTERPRET, narrow
from .device.careful import CAREFUL_ROWS, all_finite
from .forward_kernel import absorb, finished


@triton.jit
def rows_of_group(kv_head, shape, ROWS: tl.constexpr):
    """(head, query) of each row of a tile, head by head, and which rows exist; others stand at head 0, query q_len."""
    row = tl.arange(0, ROWS)
    there = row < shape.group * shape.q_len
    h = tl.where(there, kv_head * shape.group + row // shape.q_len, 0)
    return h, tl.where(there, row % shape.q_len, shape.q_len), there


@triton.jit
def hull_of(mask, b, h, i, there, k_len):
    """[start, stop) of the keys that any of the rows can see by its ranges; all keys without ranges."""
    start, stop = 0 * k_len, k_len
    if mask.starts is not None:
        start, stop = k_len, 0 * k_len
        for r in tl.static_range(mask.ranges):
            place = b.to(tl.int64) * mask.starts.b + h.to(tl.int64) * mask.starts.h + i.to(tl.int64) * mask.starts.row
            first = tl.load(mask.starts.ptr + place + r * mask.starts.column, mask=there, other=0)
            place = b.to(tl.int64) * mask.stops.b + h.to(tl.int64) * mask.stops.h + i.to(tl.int64) * mask.stops.row
            last = tl.load(mask.stops.ptr + place + r * mask.stops.column, mask=there, other=0)
            start = tl.minimum(start, tl.min(tl.where(first < last, first, k_len), axis=0))
            stop = tl.maximum(stop, tl.max(tl.where(first < last, last, 0), axis=0))
    return start, stop


@triton.jit
def decode_kernel(
    q, k, v, part_acc, part_peak, part_total, call, splits,
    SPLIT: tl.constexpr, CAN_LEAK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The state of one kv head's rows over the keys of one split.

    part_acc (B * Hkv, splits, BLOCK_Q, padded Dv), part_peak and part_total (B * Hkv, splits, BLOCK_Q): float32.
    """
    program = tl.program_id(0)
    split, head = program % splits, program // splits
    kv_heads = call.shape.q_heads // call.shape.group
    b, kv_head = head // kv_heads, head % kv_heads
    h, i, there = rows_of_group(kv_head, call.shape, BLOCK_Q)
    start, stop = hull_of(call.mask, b, h, i, there, call.shape.k_len)
    # Whole tiles of the split, so that where a window begins does not change the order of sums.
    begin = tl.maximum(split * SPLIT, start // BLOCK_K * BLOCK_K)
    end = tl.minimum((split + 1) * SPLIT, stop)
    column = tl.arange(0, call.shape.block_d)
    corner = q.ptr + b.to(tl.int64) * q.b + h.to(tl.int64) * q.h + i.to(tl.int64) * q.row
    q_tile = tl.load(
        corner[:, None] + column[None, :] * q.column, mask=there[:, None] & (column[None, :] < call.shape.d), other=0.0
    )
    if INTERPRET and q.ptr.dtype.element_ty == tl.bfloat16:
        q_tile = q_tile.to(tl.float32)
    acc = tl.zeros([BLOCK_Q, call.shape.block_dv], tl.float32)
    peak = tl.full([BLOCK_Q], -INF, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(0, tl.cdiv(end - begin, BLOCK_K)):
        keys = begin + n * BLOCK_K
        acc, peak, total = absorb(
            acc, peak, total, q_tile, k, v, keys, i[:, None], b, h[:, None], kv_head, call, True, False, BLOCK_K
        )
    if CAN_LEAK and not all_finite(acc):
        acc = tl.zeros([BLOCK_Q, call.shape.block_dv], tl.float32)
        peak = tl.full([BLOCK_Q], -INF, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for n in range(0, tl.cdiv(end - begin, CAREFUL_ROWS)):
            keys = begin + n * CAREFUL_ROWS
            acc, peak, total = absorb(
                acc, peak, total, q_tile, k, v, keys, i[:, None], b, h[:, None], kv_head, call, True, True, CAREFUL_ROWS
            )
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, call.shape.block_dv)
    first = program.to(tl.int64) * BLOCK_Q
    tl.store(part_acc + (first + row)[:, None] * call.shape.block_dv + column[None, :], acc)
    tl.store(part_peak + first + row, peak)
    tl.store(part_total + first + row, total)


@triton.jit
def merge_kernel(part_acc, part_peak, part_total, out, lse, call, sinks, splits, BLOCK_Q: tl.constexpr):
    """out and lse of one kv head's rows: its splits, merged in the order of the keys."""
    head = tl.program_id(0)
    kv_heads = call.shape.q_heads // call.shape.group
    b, kv_head = head // kv_heads, head % kv_heads
    h, i, there = rows_of_group(kv_head, call.shape, BLOCK_Q)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, call.shape.block_dv)
    acc = tl.zeros([BLOCK_Q, call.shape.block_dv], tl.float32)
    peak = tl.full([BLOCK_Q], -INF, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for split in range(0, splits):
        first = (head.to(tl.int64) * splits + split) * BLOCK_Q
        other_peak = tl.load(part_peak + first + row)
        new_peak = tl.maximum(peak, other_peak)
        level = tl.where(new_peak == -INF, 0.0, new_peak)
        own, others = tl.exp2(peak - level), tl.exp2(other_peak - level)
        other = tl.load(part_acc + (first + row)[:, None] * call.shape.block_dv + column[None, :])
        acc = acc * own[:, None] + other * others[:, None]
        total = total * own + tl.load(part_total + first + row) * others
        peak = new_peak
    acc, value = finished(acc, peak, total, call, sinks, h)
    corner = out.ptr + b.to(tl.int64) * out.b + h.to(tl.int64) * out.h + i.to(tl.int64) * out.row
    inside = there[:, None] & (column[None, :] < call.shape.dv)
    tl.store(corner[:, None] + column[None, :] * out.column, narrow(acc, out.ptr.dtype.element_ty), mask=inside)
    tl.store(lse.ptr + b.to(tl.int64) * lse.b + h.to(tl.int64) * lse.h + i * lse.row, value, mask=there)
