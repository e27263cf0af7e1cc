"""Gradient of the queries: a tile of queries walks over the keys that it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, dot, load_tile, product, store_tile
from .device.careful import add_seen, note_unsound
from .device.slopes import load_row, probabilities, slopes, times_share
from .device.walk import GRID, counts_of, full_tile, mixed_tile, place, row_of


@triton.jit(do_not_specialize=GRID)
def d_q_kernel(
    q, k, v, d_out, level, delta, d_q, unsound, call, lists, first_tile, tiles, together,
    LAST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_q of one tile of queries of one head; unsound as in the forward kernel."""
    tile, b, h = place(tiles, together, call.shape.q_heads, LAST_FIRST)
    first = (first_tile + tile) * BLOCK_Q
    q_tile = load_tile(q, b, h, first, call.shape.q_len, BLOCK_Q, call.shape.d, call.shape.block_d, False)
    d_out_tile = load_tile(d_out, b, h, first, call.shape.q_len, BLOCK_Q, call.shape.dv, call.shape.block_dv, False)
    position = first + tl.arange(0, BLOCK_Q)
    row_level = load_row(level, b, h, position, call.shape.q_len, INF)
    row_delta = load_row(delta, b, h, position, call.shape.q_len, 0.0)
    row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
    mixed, full = counts_of(lists, row, call.shape.k_len, BLOCK_K, True)
    acc = tl.zeros([BLOCK_Q, call.shape.block_d], tl.float32)
    for n in range(0, mixed):
        keys = mixed_tile(lists, row, n, call.shape.k_len, BLOCK_K) * BLOCK_K
        acc = absorb_keys(
            acc, q_tile, d_out_tile, row_level, row_delta, k, v, keys, first, b, h, call, True, False, BLOCK_Q, BLOCK_K
        )
    for n in range(0, full):
        keys = full_tile(lists, row, n, call.shape.k_len, BLOCK_K) * BLOCK_K
        acc = absorb_keys(
            acc, q_tile, d_out_tile, row_level, row_delta, k, v, keys, first, b, h, call, False, False, BLOCK_Q, BLOCK_K
        )
    acc = times_share(acc, level, b, h, position, call.shape.q_len)
    note_unsound(unsound, acc)
    store_tile(d_q, b, h, first, call.shape.q_len, acc * call.scale, BLOCK_Q, call.shape.d, call.shape.block_d)


@triton.jit
def absorb_keys(
    acc, q_tile, d_out_tile, level, delta, k, v, first_key, first, b, h, call,
    MIXED: tl.constexpr, CAREFUL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_Q, D) plus what one tile of keys contributes."""
    i, j = (first + tl.arange(0, BLOCK_Q))[:, None], (first_key + tl.arange(0, BLOCK_K))[None, :]
    kv_head = h // call.shape.group
    k_tile = load_tile(k, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, not MIXED)
    v_tile = load_tile(
        v, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.dv, call.shape.block_dv, not MIXED
    )
    p, keep, seen, bend = probabilities(product(q_tile, tl.trans(k_tile)), call, level[:, None], b, h, i, j, MIXED)
    d_weights = product(d_out_tile, tl.trans(v_tile))
    _, d_inner = slopes(p, d_weights, delta[:, None], keep, seen, bend, call, MIXED)
    if CAREFUL:
        acc = add_seen(acc, d_inner, seen, k_tile)
    else:
        acc = dot(d_inner.to(k_tile.dtype), k_tile, acc)
    return acc
