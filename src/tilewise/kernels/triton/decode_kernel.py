"""Attention of few queries: keys are split among programs, and the query heads of a group stand in one tile.

The splits have a fixed size and their states are merged in the order of the keys, so a row's bits depend neither on the
batch nor on the load (Dao et al., Flash-Decoding, 2023, with splits that do not adapt). Queries may be those of many
sequences of different lengths, and keys may lie in pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, INTERPRET, narrow
from .device.careful import CAREFUL_ROWS, all_finite
from .device.sequences import begin_of, sequence_of
from .forward_kernel import absorb, finished


@triton.jit
def rows_of_group(first, kv_head, shape, ROWS: tl.constexpr):
    """(head, query) of the rows from `first` on, head by head, and which exist; others stand at head 0, query q_len."""
    row = first + tl.arange(0, ROWS)
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
    q, k, v, part_acc, part_peak, part_total, call, packed, splits,
    SPLIT: tl.constexpr, CAN_LEAK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The state of one kv head's rows over the keys of one split.

    part_acc (programs, BLOCK_Q, padded Dv), part_peak and part_total (programs, BLOCK_Q): float32.
    packed: None, and programs are (b, kv head, split); or programs are (item, kv head), where an item is a sequence,
    the first of its rows in the tile, and the first key and the end of the keys.
    """
    program = tl.program_id(0)
    kv_heads = call.shape.q_heads // call.shape.group
    if packed is None:
        head, low = program // splits, program % splits * SPLIT
        _decode(
            q, k, v, part_acc, part_peak, part_total, call, head // kv_heads, head % kv_heads, 0, 0, low, low + SPLIT,
            CAN_LEAK, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    else:
        item = packed.items + program // kv_heads * 4
        n = tl.load(item)
        _decode(
            q, k, v, part_acc, part_peak, part_total, sequence_of(call, packed, n), n, program % kv_heads,
            begin_of(packed, n), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), CAN_LEAK, BLOCK_Q, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _decode(
    q, k, v, part_acc, part_peak, part_total, call, b, kv_head, begin, first_row, low, high,
    CAN_LEAK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The state of the rows from `first_row` on over the keys [low, high); `begin`: the place of query 0 in q."""
    h, i, there = rows_of_group(first_row, kv_head, call.shape, BLOCK_Q)
    start, stop = hull_of(call.mask, b, h, i, there, call.shape.k_len)
    # Whole tiles of the split, so that where a window begins does not change the order of sums.
    low, high = tl.maximum(low, start // BLOCK_K * BLOCK_K), tl.minimum(high, stop)
    column = tl.arange(0, call.shape.block_d)
    corner = q.ptr + b.to(tl.int64) * q.b + h.to(tl.int64) * q.h + (begin + i).to(tl.int64) * q.row
    q_tile = tl.load(
        corner[:, None] + column[None, :] * q.column, mask=there[:, None] & (column[None, :] < call.shape.d), other=0.0
    )
    if INTERPRET and q.ptr.dtype.element_ty == tl.bfloat16:
        q_tile = q_tile.to(tl.float32)
    acc, peak, total = _state(q_tile, k, v, low, high, i, b, h, kv_head, call, False, BLOCK_Q, BLOCK_K)
    if CAN_LEAK and not all_finite(acc):
        acc, peak, total = _state(q_tile, k, v, low, high, i, b, h, kv_head, call, True, BLOCK_Q, CAREFUL_ROWS)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, call.shape.block_dv)
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    tl.store(part_acc + (first + row)[:, None] * call.shape.block_dv + column[None, :], acc)
    tl.store(part_peak + first + row, peak)
    tl.store(part_total + first + row, total)


@triton.jit
def _state(
    q_tile, k, v, low, high, i, b, h, kv_head, call, CAREFUL: tl.constexpr, BLOCK_Q: tl.constexpr, STEP: tl.constexpr
):
    """The state over the keys [low, high), of which STEP are taken at once."""
    acc = tl.zeros([BLOCK_Q, call.shape.block_dv], tl.float32)
    peak = tl.full([BLOCK_Q], -INF, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(0, tl.cdiv(high - low, STEP)):
        acc, peak, total = absorb(
            acc, peak, total, q_tile, k, v, low + n * STEP, i[:, None], b, h[:, None], kv_head, call,
            True, CAREFUL, STEP,
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def merge_kernel(part_acc, part_peak, part_total, out, lse, call, packed, sinks, splits, BLOCK_Q: tl.constexpr):
    """out and lse of one kv head's rows: its splits, merged in the order of the keys.

    packed: as of `decode_kernel`, but that an item is a sequence, the first of its rows in the tile, the first of its
    items there, and how many they are.
    """
    program = tl.program_id(0)
    kv_heads = call.shape.q_heads // call.shape.group
    if packed is None:
        first = program.to(tl.int64) * splits
        _merge(
            part_acc, part_peak, part_total, out, lse, call, sinks, program // kv_heads, program % kv_heads, 0, 0,
            first, splits, 1, BLOCK_Q,
        )  # fmt: skip
    else:
        item, kv_head = packed.items + program // kv_heads * 4, program % kv_heads
        n, first = tl.load(item), tl.load(item + 2).to(tl.int64) * kv_heads + kv_head
        _merge(
            part_acc, part_peak, part_total, out, lse, sequence_of(call, packed, n), sinks, n, kv_head,
            begin_of(packed, n), tl.load(item + 1), first, tl.load(item + 3), kv_heads, BLOCK_Q,
        )  # fmt: skip


@triton.jit
def _merge(
    part_acc, part_peak, part_total, out, lse, call, sinks, b, kv_head, begin, first_row, own, splits, step,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """out and lse of the rows from `first_row` on, whose states are those of programs own, own + step, …"""
    h, i, there = rows_of_group(first_row, kv_head, call.shape, BLOCK_Q)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, call.shape.block_dv)
    acc = tl.zeros([BLOCK_Q, call.shape.block_dv], tl.float32)
    peak = tl.full([BLOCK_Q], -INF, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for split in range(0, splits):
        first = (own + split * step) * BLOCK_Q
        other_peak = tl.load(part_peak + first + row)
        new_peak = tl.maximum(peak, other_peak)
        level = tl.where(new_peak == -INF, 0.0, new_peak)
        before, after = tl.exp2(peak - level), tl.exp2(other_peak - level)
        other = tl.load(part_acc + (first + row)[:, None] * call.shape.block_dv + column[None, :])
        acc = acc * before[:, None] + other * after[:, None]
        total = total * before + tl.load(part_total + first + row) * after
        peak = new_peak
    acc, value = finished(acc, peak, total, call, sinks, h)
    corner = out.ptr + b.to(tl.int64) * out.b + h.to(tl.int64) * out.h + (begin + i).to(tl.int64) * out.row
    inside = there[:, None] & (column[None, :] < call.shape.dv)
    tl.store(corner[:, None] + column[None, :] * out.column, narrow(acc, out.ptr.dtype.element_ty), mask=inside)
    place = lse.ptr + b.to(tl.int64) * lse.b + h.to(tl.int64) * lse.h + (begin + i).to(tl.int64) * lse.row
    tl.store(place, value, mask=there)
