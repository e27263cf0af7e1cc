"""Gradients of what is added to the scores: sums of d_scores over whatever axes the bias is broadcast along.

Both kernels recompute the tiles that they sum, two products each, and add in a fixed order; nothing quadratic is stored
beyond the gradient of the caller's own bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, load_tile, product
from .device.mask import visible
from .device.slopes import load_row, probabilities, slopes, times_share

# Numbers that the compiler need not know, and would compile anew for each kind of.
COUNTS = ["first", "q_tiles", "all_q_tiles", "k_tiles", "batch"]


@triton.jit(do_not_specialize=COUNTS)
def d_dense_kernel(
    q, k, v, d_out, level, delta, d_bias, call, first, q_tiles, k_tiles, batch,
    OVER_B: tl.constexpr, OVER_H: tl.constexpr, OVER_Q: tl.constexpr, OVER_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add one tile of d_bias (B', H', Sq', Sk') float32; OVER_X says that axis X has size 1 and is summed.

    Args:
        first, q_tiles: the query tiles of the launch; k_tiles: all key tiles; batch: B.
    """
    heads_out = 1 if OVER_H else call.shape.q_heads
    own_b, own_h = tl.program_id(2) // heads_out, tl.program_id(2) % heads_out
    many_b, many_h = batch if OVER_B else 1, call.shape.q_heads if OVER_H else 1
    many_q, many_k = q_tiles if OVER_Q else 1, k_tiles if OVER_K else 1
    acc = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for n in range(0, many_b * many_h * many_q * many_k):
        b, h = own_b + n // (many_h * many_q * many_k), own_h + n // (many_q * many_k) % many_h
        queries = (first + tl.program_id(0) + n // many_k % many_q) * BLOCK_Q
        keys = (tl.program_id(1) + n % many_k) * BLOCK_K
        acc = _add_tile(acc, q, k, v, d_out, level, delta, queries, keys, b, h, call, BLOCK_Q, BLOCK_K)
    i = (first + tl.program_id(0)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_q, inside_k = i < call.shape.q_len, j < call.shape.k_len
    if OVER_Q:
        i, inside_q, acc = tl.arange(0, 1), tl.arange(0, 1) == 0, tl.sum(acc, axis=0)[None, :]
    if OVER_K:
        j, inside_k, acc = tl.arange(0, 1), tl.arange(0, 1) == 0, tl.sum(acc, axis=1)[:, None]
    row = own_b.to(tl.int64) * d_bias.b + own_h.to(tl.int64) * d_bias.h + i.to(tl.int64)[:, None] * d_bias.row
    place = d_bias.ptr + row + j.to(tl.int64)[None, :] * d_bias.column
    inside = inside_q[:, None] & inside_k[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def d_table_kernel(
    q, k, v, d_out, level, delta, parts, call, first, q_tiles, all_q_tiles, k_tiles, batch,
    OVER_B: tl.constexpr, OVER_H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add one row of parts (B'H', q tiles + k tiles - 1, 2 * BLOCK_Q) float32: sums along diagonals.

    A program owns the tiles whose key tile is a fixed number ahead of their query tile. They have the same distances
    j - i at the same places, so they are added first and their sum is then skewed, so that diagonals stand upright.
    """
    side: tl.constexpr = BLOCK_Q
    heads_out = 1 if OVER_H else call.shape.q_heads
    own_b, own_h = tl.program_id(1) // heads_out, tl.program_id(1) % heads_out
    many_b, many_h = batch if OVER_B else 1, call.shape.q_heads if OVER_H else 1
    ahead = tl.program_id(0) - (all_q_tiles - 1)
    start = tl.maximum(first, -ahead)
    tiles = tl.maximum(tl.minimum(first + q_tiles, k_tiles - ahead) - start, 0)
    acc = tl.zeros([side, side], tl.float32)
    for n in range(0, many_b * many_h * tiles):
        b, h = own_b + n // (many_h * tiles), own_h + n // tiles % many_h
        queries = (start + n % tiles) * side
        acc = _add_tile(acc, q, k, v, d_out, level, delta, queries, queries + ahead * side, b, h, call, side, side)
    m, w = tl.arange(0, side)[:, None], tl.arange(0, 2 * side)[None, :]
    column = w + m - (side - 1)
    real = (column >= 0) & (column < side)
    skewed = tl.gather(acc, tl.where(real, column, 0), axis=1)
    sums = tl.sum(tl.where(real, skewed, 0.0), axis=0)
    row = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (2 * side)
    place = parts + row + tl.arange(0, 2 * side)
    tl.store(place, tl.load(place) + sums)


@triton.jit
def _add_tile(
    acc, q, k, v, d_out, level, delta, queries, keys, b, h, call, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc plus the d_scores of a tile, of which nothing is read where no pair is visible."""
    row = queries + tl.arange(0, BLOCK_Q)
    i, j = row[:, None], (keys + tl.arange(0, BLOCK_K))[None, :]
    seen = visible(call.mask, b, h, i, j, call.shape.q_len, call.shape.k_len)
    if tl.max(seen.to(tl.int32), axis=None) != 0:
        kv_head = h // call.shape.group
        q_tile = load_tile(q, b, h, queries, call.shape.q_len, BLOCK_Q, call.shape.d, call.shape.block_d, False)
        k_tile = load_tile(k, b, kv_head, keys, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, False)
        row_level = load_row(level, b, h, row, call.shape.q_len, INF)[:, None]
        p, keep, seen, bend = probabilities(product(q_tile, tl.trans(k_tile)), call, row_level, b, h, i, j, True)
        # Only now, for registers hold what was loaded until it is multiplied.
        d_out_tile = load_tile(
            d_out, b, h, queries, call.shape.q_len, BLOCK_Q, call.shape.dv, call.shape.block_dv, False
        )
        v_tile = load_tile(v, b, kv_head, keys, call.shape.k_len, BLOCK_K, call.shape.dv, call.shape.block_dv, False)
        row_delta = load_row(delta, b, h, row, call.shape.q_len, 0.0)[:, None]
        d_scores, _ = slopes(p, product(d_out_tile, tl.trans(v_tile)), row_delta, keep, seen, bend, call, True)
        acc += times_share(d_scores, level, b, h, row, call.shape.q_len)
    return acc
