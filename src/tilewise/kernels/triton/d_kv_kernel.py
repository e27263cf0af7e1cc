"""Gradients of the keys and values: a tile of keys walks over the queries that see it, in all heads of its group.

Each program owns its tile and adds in a fixed order, so the result is the same on every run. By choice the gradient of
the queries is added up on the way, which saves the pass that computes it and two of seven products; programs then add
to the same rows in an order that changes from run to run (the backward pass of Dao et al., 2022).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device.arithmetic import INF, dot, load_tile, product, store_tile
from .device.careful import add_seen, all_finite, note_unsound
from .device.slopes import after_dropout, load_row, probabilities, share_of, slopes
from .device.walk import GRID, counts_of, full_tile, mixed_tile, place, row_of


@triton.jit(do_not_specialize=GRID)
def d_kv_kernel(
    q, k, v, d_out, level, delta, d_q, d_k, d_v, unsound, call, lists, first_tile, tiles, together,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, FAR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of one tile of keys of one kv head; unsound as in the forward kernel.

    d_q: None, or float32 zeros (B, Hq, Sq, D), to which what the tile contributes is added, without the scale.
    FAR: whether it is for calls with far rows; of two launches, one does nothing. Shares beside all else would take
    registers of those without.
    """
    if level.far is not None:  # noqa: SIM102 - the compiler's choice, and then the program's
        if (tl.load(level.far) != 0) != FAR:
            return
    tile, b, kv_head = place(tiles, together, call.shape.q_heads // call.shape.group, False)
    first = (first_tile + tile) * BLOCK_K
    k_tile = load_tile(k, b, kv_head, first, call.shape.k_len, BLOCK_K, call.shape.d, call.shape.block_d, False)
    v_tile = load_tile(v, b, kv_head, first, call.shape.k_len, BLOCK_K, call.shape.dv, call.shape.block_dv, False)
    acc_k = tl.zeros([BLOCK_K, call.shape.block_d if WANT_K else 1], tl.float32)
    acc_v = tl.zeros([BLOCK_K, call.shape.block_dv if WANT_V else 1], tl.float32)
    # A key that is not finite makes the whole product NaN: then `unsound_d_q_kernel` adds to d_q.
    sound = True
    if unsound is not None and d_q is not None:
        sound = all_finite(k_tile.to(tl.float32))
    for member in range(0, call.shape.group):
        h = kv_head * call.shape.group + member
        row = row_of(lists, tile, tiles, b, h, call.shape.q_heads)
        mixed, full = counts_of(lists, row, call.shape.q_len, BLOCK_Q, False)
        for n in range(0, mixed):
            queries = mixed_tile(lists, row, n, call.shape.q_len, BLOCK_Q) * BLOCK_Q
            acc_k, acc_v = absorb_queries(
                acc_k, acc_v, k_tile, v_tile, q, d_out, level, delta, d_q, sound, queries, first, b, h, call,
                WANT_K, WANT_V, FAR, True, False, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        for n in range(0, full):
            queries = full_tile(lists, row, n, call.shape.q_len, BLOCK_Q) * BLOCK_Q
            acc_k, acc_v = absorb_queries(
                acc_k, acc_v, k_tile, v_tile, q, d_out, level, delta, d_q, sound, queries, first, b, h, call,
                WANT_K, WANT_V, FAR, False, False, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    if WANT_K:
        note_unsound(unsound, acc_k)
        store_tile(
            d_k, b, kv_head, first, call.shape.k_len, acc_k * call.scale, BLOCK_K, call.shape.d, call.shape.block_d
        )
    if WANT_V:
        note_unsound(unsound, acc_v)
        store_tile(d_v, b, kv_head, first, call.shape.k_len, acc_v, BLOCK_K, call.shape.dv, call.shape.block_dv)


@triton.jit
def absorb_queries(
    acc_k, acc_v, k_tile, v_tile, q, d_out, level, delta, d_q, sound, first_query, first, b, h, call,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, FAR: tl.constexpr, MIXED: tl.constexpr, CAREFUL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc_k (BLOCK_K, D) and acc_v (BLOCK_K, Dv) plus what one tile of queries contributes.

    Scores stand transposed, keys down and queries across, as both sums over queries want them. Rows beyond the last
    query are read as zeros, with a level of +inf, and contribute nothing. Where d_q is given and `sound`, the tile's
    share is added to it, in whatever order the programs come.
    """
    row = first_query + tl.arange(0, BLOCK_Q)
    i, j = row[None, :], (first + tl.arange(0, BLOCK_K))[:, None]
    q_tile = load_tile(q, b, h, first_query, call.shape.q_len, BLOCK_Q, call.shape.d, call.shape.block_d, False)
    d_out_tile = load_tile(
        d_out, b, h, first_query, call.shape.q_len, BLOCK_Q, call.shape.dv, call.shape.block_dv, False
    )
    row_level = load_row(level, b, h, row, call.shape.q_len, INF)[None, :]
    p, keep, seen, bend = probabilities(product(k_tile, tl.trans(q_tile)), call, row_level, b, h, i, j, MIXED)
    if FAR:
        p *= share_of(level, b, h, row, call.shape.q_len)[None, :]
    if WANT_V:
        weights = after_dropout(p, keep, call)
        if CAREFUL:
            acc_v = add_seen(acc_v, weights, seen, d_out_tile)
        else:
            acc_v = dot(weights.to(d_out_tile.dtype), d_out_tile, acc_v)
    if WANT_K or d_q is not None:
        row_delta = load_row(delta, b, h, row, call.shape.q_len, 0.0)[None, :]
        d_weights = product(v_tile, tl.trans(d_out_tile))
        _, d_inner = slopes(p, d_weights, row_delta, keep, seen, bend, call, MIXED)
        if WANT_K and CAREFUL:
            acc_k = add_seen(acc_k, d_inner, seen, q_tile)
        elif WANT_K:
            acc_k = dot(d_inner.to(q_tile.dtype), q_tile, acc_k)
        if d_q is not None:
            # Keys beyond the last have no sums of their own to spoil, but these they have: with an lse far below their
            # score of 0, a probability beyond all numbers.
            d_inner = tl.where(j < call.shape.k_len, d_inner, 0.0)
            if CAREFUL:
                nothing = tl.zeros([BLOCK_Q, call.shape.block_d], tl.float32)
                share = add_seen(nothing, tl.trans(d_inner), tl.trans(seen), k_tile)
            else:
                share = product(tl.trans(d_inner.to(k_tile.dtype)), k_tile)
            column = tl.arange(0, call.shape.block_d)
            corner = d_q.ptr + b.to(tl.int64) * d_q.b + h.to(tl.int64) * d_q.h
            place = corner + row.to(tl.int64)[:, None] * d_q.row + column[None, :] * d_q.column
            inside = (row < call.shape.q_len)[:, None] & (column < call.shape.d)[None, :] & sound
            tl.atomic_add(place, share, mask=inside, sem="relaxed")
    return acc_k, acc_v
