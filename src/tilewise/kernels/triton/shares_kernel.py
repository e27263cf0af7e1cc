"""What far rows are short of: their log-sum-exp, far from 0, has lost its last places (see `portable/row_terms.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, in_log2, is_finite, load_tile, product
from .device.scores import score
from .device.slopes import after_dropout, keeps, load_row
from .device.walk import GRID, counts_of, nth_tile, place, row_of


@triton.jit(do_not_specialize=GRID)
def shares_kernel(
    q, k, v, d_out, lse, d_lse, level, delta, call, sinks, lists, first_tile, tiles, together,
    LAST_FIRST: tl.constexpr, FAR_FROM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Shares of all rows, (B, Hq, Sq) float32: 1, and of far rows 1 / their sum of 2^(score - level).

    Of far rows the level becomes the largest score, in units of log 2, and delta what all probabilities share in their
    gradient, summed in the arithmetic that they are summed with. `level.far` is set where there are any: programs
    without read lse and write the shares, and no more. FAR_FROM: see `far_from` in `kernels/state.py`.
    """
    tile, b, h = place(tiles, together, call.shape.q_heads, LAST_FIRST)
    first = (first_tile + tile) * BLOCK_Q
    position = first + tl.arange(0, BLOCK_Q)
    inside = position < call.shape.q_len
    held = load_row(lse, b, h, position, call.shape.q_len, 0.0)
    far = (tl.abs(held) > FAR_FROM) & is_finite(held)
    own = b.to(tl.int64) * level.b + h.to(tl.int64) * level.h + position.to(tl.int64) * level.row
    if tl.max(far.to(tl.int32), axis=0) == 0:
        tl.store(level.share + own, tl.full([BLOCK_Q], 1.0, tl.float32), mask=inside)
    else:
        q_tile = load_tile(q, b, h, first, call.shape.q_len, BLOCK_Q, call.shape.d, call.shape.block_d, False)
        d_out_tile = load_tile(d_out, b, h, first, call.shape.q_len, BLOCK_Q, call.shape.dv, call.shape.block_dv, False)
        row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
        mixed, full = counts_of(lists, row, call.shape.k_len, BLOCK_K, True)
        peak = tl.full([BLOCK_Q], -INF, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        pull = tl.zeros([BLOCK_Q], tl.float32)
        for n in range(0, mixed + full):
            keys = nth_tile(lists, row, n, mixed, call.shape.k_len, BLOCK_K) * BLOCK_K
            peak, total, pull = _absorb(
                peak, total, pull, q_tile, d_out_tile, k, v, first, keys, b, h, call, BLOCK_Q, BLOCK_K
            )
        if sinks is not None:
            sink = in_log2(tl.load(sinks + h).to(tl.float32))
            top = tl.maximum(peak, sink)
            fade = tl.exp2(peak - top)
            peak, total, pull = top, total * fade + tl.exp2(sink - top), pull * fade
        shared = pull / total
        if d_lse is not None:
            shared -= load_row(d_lse, b, h, position, call.shape.q_len, 0.0)
        tl.store(level.ptr + own, peak, mask=inside & far)
        tl.store(delta.ptr + own, shared, mask=inside & far)
        tl.store(level.share + own, tl.where(far, 1.0 / total, 1.0), mask=inside)
        tl.store(level.far, 1)


@triton.jit
def _absorb(
    peak, total, pull, q_tile, d_out_tile, k, v, first, first_key, b, h, call,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each row's largest score, its sum of weights and that of the weights times their gradients, after more keys."""
    i, j = (first + tl.arange(0, BLOCK_Q))[:, None], (first_key + tl.arange(0, BLOCK_K))[None, :]
    kv_head = h // call.shape.group
    k_tile = load_tile(k, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, False)
    s, seen, _ = score(product(q_tile, tl.trans(k_tile)), call, b, h, i, j, True)
    v_tile = load_tile(v, b, kv_head, first_key, call.shape.k_len, BLOCK_K, call.shape.dv, call.shape.block_dv, False)
    top = tl.maximum(peak, tl.max(s, axis=1))
    base = tl.where(top == -INF, 0.0, top)
    fade, weights = tl.exp2(peak - base), tl.exp2(s - base[:, None])
    d_weights = after_dropout(product(d_out_tile, tl.trans(v_tile)), keeps(seen, call, b, h, i, j), call)
    pulls = tl.where(seen, weights * d_weights, 0.0)
    return top, total * fade + tl.sum(weights, axis=1), pull * fade + tl.sum(pulls, axis=1)
