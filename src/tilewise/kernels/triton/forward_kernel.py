"""The forward pass: online softmax over tiles of keys (Milakov & Gimelshein, 2018; Dao et al., 2022; Dao, 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, LN2, LOG2E, dot, in_log2, load_tile, product, store_tile
from .device.careful import add_seen, note_unsound
from .device.pages import load_keys
from .device.philox import kept
from .device.scores import score
from .device.walk import GRID, counts_of, full_tile, mixed_tile, place, row_of


@triton.jit(do_not_specialize=GRID)
def forward_kernel(
    q, k, v, out, lse, unsound, call, sinks, lists, first_tile, tiles, together,
    LAST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: out and lse.

    unsound: None where every pair of a tile that is read is seen; else 0 for each program, which becomes 1 where the
    result is not finite, as 0 * NaN would make it, and `careful_kernels` are to look again.
    """
    tile, b, h = place(tiles, together, call.shape.q_heads, LAST_FIRST)
    first = (first_tile + tile) * BLOCK_Q
    i, kv_head = (first + tl.arange(0, BLOCK_Q))[:, None], h // call.shape.group
    q_tile = load_tile(q, b, h, first, call.shape.q_len, BLOCK_Q, call.shape.d, call.shape.block_d, False)
    row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
    mixed, full = counts_of(lists, row, call.shape.k_len, BLOCK_K, True)
    acc = tl.zeros([BLOCK_Q, call.shape.block_dv], tl.float32)
    peak = tl.full([BLOCK_Q], -INF, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(0, mixed):
        keys = mixed_tile(lists, row, n, call.shape.k_len, BLOCK_K) * BLOCK_K
        acc, peak, total = absorb(acc, peak, total, q_tile, k, v, keys, i, b, h, kv_head, call, True, False, BLOCK_K)
    for n in range(0, full):
        keys = full_tile(lists, row, n, call.shape.k_len, BLOCK_K) * BLOCK_K
        acc, peak, total = absorb(acc, peak, total, q_tile, k, v, keys, i, b, h, kv_head, call, False, False, BLOCK_K)
    note_unsound(unsound, acc)
    finish(acc, peak, total, out, lse, call, sinks, first, b, h, BLOCK_Q)


@triton.jit
def absorb(
    acc, peak, total, q_tile, k, v, first_key, i, b, h, kv_head, call,
    MIXED: tl.constexpr, CAREFUL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One more tile of keys in the state: acc (rows, Dv), peak of scores and total of exponentials (rows,).

    i: positions of the queries, (rows, 1). h: their head, one for all or (rows, 1).
    """
    plain: tl.constexpr = call.softcap is None and len(call.dense) == 0 and call.table is None
    j = (first_key + tl.arange(0, BLOCK_K))[None, :]
    k_tile = load_keys(
        k, call.pages, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, not MIXED
    )
    products = product(q_tile, tl.trans(k_tile))
    s, seen, _ = score(products, call, b, h, i, j, MIXED)
    if plain and call.rising and not MIXED:
        # Scaling after the maximum lets the compiler fuse the scale into the exponent's subtraction.
        new_peak = tl.maximum(peak, tl.max(products, axis=1) * (call.scale * LOG2E))
    else:
        new_peak = tl.maximum(peak, tl.max(s, axis=1))
    # A row that has seen nothing yet keeps -inf; any finite number in its place gives exponentials of 0.
    level = tl.where(new_peak == -INF, 0.0, new_peak)
    p = tl.exp2(s - level[:, None])
    decay = tl.exp2(peak - level)
    total = total * decay + tl.sum(p, axis=1)
    if call.dropout is not None:
        p = tl.where(kept(call.dropout, b, h, i, j), p, 0.0)
    acc = acc * decay[:, None]
    v_tile = load_keys(
        v, call.pages, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.dv, call.shape.block_dv, not MIXED
    )
    if CAREFUL:
        acc = add_seen(acc, p, seen, v_tile)
    else:
        acc = dot(p.to(v_tile.dtype), v_tile, acc)
    return acc, new_peak, total


@triton.jit
def finish(acc, peak, total, out, lse, call, sinks, first, b, h, BLOCK_Q: tl.constexpr):
    """Store out and lse of a tile of one head."""
    acc, value = finished(acc, peak, total, call, sinks, h)
    store_tile(out, b, h, first, call.shape.q_len, acc, BLOCK_Q, call.shape.dv, call.shape.block_dv)
    row = first + tl.arange(0, BLOCK_Q)
    tl.store(lse.ptr + b.to(tl.int64) * lse.b + h * lse.h + row * lse.row, value, mask=row < call.shape.q_len)


@triton.jit
def finished(acc, peak, total, call, sinks, h):
    """out and lse: divided by the denominator. A row that saw nothing gets 0 and -inf, whether or not there is a sink.

    h: the rows' head, one for all or (rows,).
    """
    nothing = total == 0.0
    if sinks is not None:
        sink = in_log2(tl.load(sinks + h).to(tl.float32))
        level = tl.maximum(peak, sink)
        level = tl.where(level == -INF, 0.0, level)
        decay = tl.exp2(peak - level)
        acc, total, peak = acc * decay[:, None], total * decay + tl.exp2(sink - level), level
    total = tl.where(nothing, 1.0, total)
    factor = 1.0 / total
    if call.dropout is not None:
        factor = factor * call.dropout.inverse_keep
    acc = tl.where(nothing[:, None], 0.0, acc * factor[:, None])
    return acc, tl.where(nothing, -INF, (peak + tl.log2(total)) * LN2)
