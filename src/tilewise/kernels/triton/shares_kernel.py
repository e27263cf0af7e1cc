"""What the rows of a call with biases far from 0 are short of: their log-sum-exp has lost its last places."""

from __future__ import annotations

import triton
import triton.language as tl

from ..state import FAR as _FAR
from .device.arithmetic import LOG2E, in_log2, is_finite, load_tile, product
from .device.scores import score
from .device.slopes import load_row
from .device.walk import GRID, counts_of, full_tile, mixed_tile, place, row_of

FAR = tl.constexpr(_FAR)


@triton.jit(do_not_specialize=GRID)
def shares_kernel(
    q, k, lse, shares, call, sinks, lists, first_tile, tiles, together,
    LAST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """shares (B, Hq, Sq) float32: 1 / the sum of exp(score - lse) of a row's keys and its sink; 1 where lse is near 0.

    lse is float32, of which 10^9 and its neighbour are 64 apart: there it holds the largest bias and no logarithm of a
    sum, and what the backward pass makes of it are not probabilities until they are multiplied by this.
    """
    tile, b, h = place(tiles, together, call.shape.q_heads, LAST_FIRST)
    first = (first_tile + tile) * BLOCK_Q
    position = first + tl.arange(0, BLOCK_Q)
    level = load_row(lse, b, h, position, call.shape.q_len, 0.0)
    far = (tl.abs(level) > FAR) & is_finite(level)
    level = level * LOG2E
    total = tl.zeros([BLOCK_Q], tl.float32)
    if tl.max(far.to(tl.int32), axis=0) != 0:
        i, kv_head = position[:, None], h // call.shape.group
        q_tile = load_tile(q, b, h, first, call.shape.q_len, BLOCK_Q, call.shape.d, call.shape.block_d, False)
        row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
        mixed, full = counts_of(lists, row, call.shape.k_len, BLOCK_K, True)
        for n in range(0, mixed):
            keys = mixed_tile(lists, row, n, call.shape.k_len, BLOCK_K) * BLOCK_K
            total += _sums(q_tile, k, level, keys, i, b, h, kv_head, call, True, BLOCK_K)
        for n in range(0, full):
            keys = full_tile(lists, row, n, call.shape.k_len, BLOCK_K) * BLOCK_K
            total += _sums(q_tile, k, level, keys, i, b, h, kv_head, call, False, BLOCK_K)
        if sinks is not None:
            total += tl.exp2(in_log2(tl.load(sinks + h).to(tl.float32)) - level)
    place_of = shares.ptr + b.to(tl.int64) * shares.b + h.to(tl.int64) * shares.h + position.to(tl.int64) * shares.row
    tl.store(place_of, tl.where(far, 1.0 / total, 1.0), mask=position < call.shape.q_len)


@triton.jit
def _sums(q_tile, k, level, first_key, i, b, h, kv_head, call, MIXED: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows,): the sums of 2^(score - level) over one tile of keys."""
    j = (first_key + tl.arange(0, BLOCK_K))[None, :]
    k_tile = load_tile(k, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, not MIXED)
    s, _, _ = score(product(q_tile, tl.trans(k_tile)), call, b, h, i, j, MIXED)
    return tl.sum(tl.exp2(s - level[:, None]), axis=1)
