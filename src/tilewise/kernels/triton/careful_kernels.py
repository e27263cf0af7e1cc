"""Results again where inputs that are not finite reached pairs that do not see them (see `device/careful.py`).

Each kernel runs after a common one, in the same grid and over the same lists, and only where that one set `unsound`
does it anything: it computes the tile again, a few rows at a time, in a fixed order. As kernels of their own they take
no registers from the common ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .d_kv_kernel import absorb_queries
from .d_q_kernel import absorb_keys
from .device.arithmetic import INF, load_tile, store_tile
from .device.careful import CAREFUL_ROWS, all_finite
from .device.slopes import load_row, times_share
from .device.walk import GRID, counts_of, nth_tile, place, row_of
from .forward_kernel import absorb, finish


@triton.jit(do_not_specialize=GRID)
def careful_forward_kernel(
    q, k, v, out, lse, unsound, call, sinks, lists, first_tile, tiles, together,
    LAST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out and lse of the tiles that `forward_kernel` found unsound."""
    if tl.load(unsound + tl.program_id(0)) != 0:
        tile, b, h = place(tiles, together, call.shape.q_heads, LAST_FIRST)
        kv_head = h // call.shape.group
        row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
        mixed, full = counts_of(lists, row, call.shape.k_len, BLOCK_K, True)
        for part in range(0, BLOCK_Q, CAREFUL_ROWS):
            first = (first_tile + tile) * BLOCK_Q + part
            i = (first + tl.arange(0, CAREFUL_ROWS))[:, None]
            q_rows = load_tile(q, b, h, first, call.shape.q_len, CAREFUL_ROWS, call.shape.d, call.shape.block_d, False)
            acc = tl.zeros([CAREFUL_ROWS, call.shape.block_dv], tl.float32)
            peak = tl.full([CAREFUL_ROWS], -INF, tl.float32)
            total = tl.zeros([CAREFUL_ROWS], tl.float32)
            for n in range(0, mixed + full):
                keys = nth_tile(lists, row, n, mixed, call.shape.k_len, BLOCK_K) * BLOCK_K
                for step in range(0, BLOCK_K, CAREFUL_ROWS):
                    acc, peak, total = absorb(
                        acc, peak, total, q_rows, k, v, keys + step, i, b, h, kv_head, call, True, True, CAREFUL_ROWS
                    )
            finish(acc, peak, total, out, lse, call, sinks, first, b, h, CAREFUL_ROWS)


@triton.jit(do_not_specialize=GRID)
def careful_d_q_kernel(
    q, k, v, d_out, level, delta, d_q, unsound, call, lists, first_tile, tiles, together,
    LAST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_q of the tiles that `d_q_kernel` found unsound."""
    if tl.load(unsound + tl.program_id(0)) != 0:
        tile, b, h = place(tiles, together, call.shape.q_heads, LAST_FIRST)
        row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
        mixed, full = counts_of(lists, row, call.shape.k_len, BLOCK_K, True)
        for part in range(0, BLOCK_Q, CAREFUL_ROWS):
            first = (first_tile + tile) * BLOCK_Q + part
            q_rows = load_tile(q, b, h, first, call.shape.q_len, CAREFUL_ROWS, call.shape.d, call.shape.block_d, False)
            d_out_rows = load_tile(
                d_out, b, h, first, call.shape.q_len, CAREFUL_ROWS, call.shape.dv, call.shape.block_dv, False
            )
            position = first + tl.arange(0, CAREFUL_ROWS)
            row_level = load_row(level, b, h, position, call.shape.q_len, INF)
            row_delta = load_row(delta, b, h, position, call.shape.q_len, 0.0)
            acc = tl.zeros([CAREFUL_ROWS, call.shape.block_d], tl.float32)
            for n in range(0, mixed + full):
                keys = nth_tile(lists, row, n, mixed, call.shape.k_len, BLOCK_K) * BLOCK_K
                for step in range(0, BLOCK_K, CAREFUL_ROWS):
                    acc = absorb_keys(
                        acc, q_rows, d_out_rows, row_level, row_delta, k, v, keys + step, first, b, h, call,
                        True, True, CAREFUL_ROWS, CAREFUL_ROWS,
                    )  # fmt: skip
            acc = times_share(acc, level, b, h, position, call.shape.q_len)
            store_tile(
                d_q, b, h, first, call.shape.q_len, acc * call.scale, CAREFUL_ROWS, call.shape.d, call.shape.block_d
            )


@triton.jit(do_not_specialize=GRID)
def careful_d_kv_kernel(
    q, k, v, d_out, level, delta, d_k, d_v, unsound, call, lists, first_tile, tiles, together,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of the tiles that `d_kv_kernel` found unsound, in one of them or both."""
    if tl.load(unsound + tl.program_id(0)) != 0:
        tile, b, kv_head = place(tiles, together, call.shape.q_heads // call.shape.group, False)
        for part in range(0, BLOCK_K, CAREFUL_ROWS):
            first = (first_tile + tile) * BLOCK_K + part
            k_rows = load_tile(
                k, b, kv_head, first, call.shape.k_len, CAREFUL_ROWS, call.shape.d, call.shape.block_d, False
            )
            v_rows = load_tile(
                v, b, kv_head, first, call.shape.k_len, CAREFUL_ROWS, call.shape.dv, call.shape.block_dv, False
            )
            acc_k = tl.zeros([CAREFUL_ROWS, call.shape.block_d], tl.float32)
            acc_v = tl.zeros([CAREFUL_ROWS, call.shape.block_dv], tl.float32)
            for member in range(0, call.shape.group):
                h = kv_head * call.shape.group + member
                row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
                mixed, full = counts_of(lists, row, call.shape.q_len, BLOCK_Q, False)
                for n in range(0, mixed + full):
                    queries = nth_tile(lists, row, n, mixed, call.shape.q_len, BLOCK_Q) * BLOCK_Q
                    for step in range(0, BLOCK_Q, CAREFUL_ROWS):
                        acc_k, acc_v = absorb_queries(
                            acc_k, acc_v, k_rows, v_rows, q, d_out, level, delta, None, True, queries + step, first,
                            b, h, call, True, True, level.far is not None, True, True, CAREFUL_ROWS, CAREFUL_ROWS,
                        )  # fmt: skip
            store_tile(
                d_k, b, kv_head, first, call.shape.k_len, acc_k * call.scale,
                CAREFUL_ROWS, call.shape.d, call.shape.block_d,
            )  # fmt: skip
            store_tile(
                d_v, b, kv_head, first, call.shape.k_len, acc_v, CAREFUL_ROWS, call.shape.dv, call.shape.block_dv
            )


@triton.jit(do_not_specialize=GRID)
def unsound_d_q_kernel(
    q, k, v, d_out, level, delta, d_q, call, lists, first_tile, tiles, together,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What `d_kv_kernel` leaves out of the d_q that it adds up: the shares of tiles with keys that are not finite."""
    tile, b, kv_head = place(tiles, together, call.shape.q_heads // call.shape.group, False)
    first = (first_tile + tile) * BLOCK_K
    k_tile = load_tile(k, b, kv_head, first, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, False)
    if not all_finite(k_tile.to(tl.float32)):
        nothing = tl.zeros([CAREFUL_ROWS, 1], tl.float32)
        for member in range(0, call.shape.group):
            h = kv_head * call.shape.group + member
            row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
            mixed, full = counts_of(lists, row, call.shape.q_len, BLOCK_Q, False)
            for n in range(0, mixed + full):
                queries = nth_tile(lists, row, n, mixed, call.shape.q_len, BLOCK_Q) * BLOCK_Q
                for part in range(0, BLOCK_K, CAREFUL_ROWS):
                    key = first + part
                    k_rows = load_tile(
                        k, b, kv_head, key, call.shape.k_len, CAREFUL_ROWS, call.shape.d, call.shape.block_d, False
                    )
                    v_rows = load_tile(
                        v, b, kv_head, key, call.shape.k_len, CAREFUL_ROWS, call.shape.dv, call.shape.block_dv, False
                    )
                    absorb_queries(
                        nothing, nothing, k_rows, v_rows, q, d_out, level, delta, d_q, True, queries, key, b, h, call,
                        False, False, level.far is not None, True, True, BLOCK_Q, CAREFUL_ROWS,
                    )  # fmt: skip
