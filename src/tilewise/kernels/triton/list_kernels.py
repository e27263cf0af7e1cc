"""Which tiles are empty, mixed or full, from ranges, labels and bits: the lists that the other kernels walk.

Ranges are judged by their hull over a tile's rows and labels by their smallest and largest, so a tile may be called
mixed that is in truth empty or full; never the other way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device.mask import bit

# Numbers that the compiler need not know, and would compile anew for each kind of.
COUNTS = ["first", "q_first", "k_first", "q_len", "k_len", "heads"]


@triton.jit(do_not_specialize=COUNTS)
def bit_states_kernel(
    bits, states, q_first, k_first, q_len, k_len, heads, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """states (B'H', q tiles, k tiles) int8 of the launch's tiles: 0 no bit is set, 1 some are, 2 all real ones are."""
    bh = tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    i = ((q_first + tl.program_id(0)) * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    j = ((k_first + tl.program_id(1)) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (i < q_len) & (j < k_len)
    seen = (bit(bits, b, h, i, j, inside) != 0) & inside
    some = tl.max(seen.to(tl.int32), axis=None)
    every = tl.min((seen | (inside == 0)).to(tl.int32), axis=None)
    place = (bh.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(states + place, (some + some * every).to(tl.int8))


@triton.jit(do_not_specialize=COUNTS)
def list_kernel(
    mask, states, index, counts, first, heads, q_len, k_len,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
):  # fmt: skip
    """One row of `walk.Lists`.

    One of Q_TILES and K_TILES is 1, the axis that programs own; the other is how many tiles are judged at once.
    """
    own, b, h = tl.program_id(0), (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    owns_queries: tl.constexpr = Q_TILES == 1
    other_tiles = tl.cdiv(k_len, BLOCK_K) if owns_queries else tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + own
    mixed, full = 0, 0
    for start in range(0, other_tiles, Q_TILES * K_TILES):
        others = start + tl.arange(0, Q_TILES * K_TILES)
        if owns_queries:
            q_tile, k_tile = first + own + tl.arange(0, 1), others
        else:
            q_tile, k_tile = others, first + own + tl.arange(0, 1)
        some, every = _states(mask, b, h, q_tile, k_tile, q_len, k_len, BLOCK_Q, BLOCK_K)
        some, every = tl.reshape(some, [Q_TILES * K_TILES]), tl.reshape(every, [Q_TILES * K_TILES])
        real = others < other_tiles
        if states is not None:
            place = (
                row * other_tiles + others
                if owns_queries
                else (tl.program_id(1).to(tl.int64) * other_tiles + others) * tl.num_programs(0) + own
            )
            state = tl.load(states + place, mask=real, other=0)
            some, every = some & (state > 0), every & (state == 2)
        is_full = some & every & real
        is_mixed = some & (every == 0) & real
        ordinal = tl.cumsum(is_mixed.to(tl.int32), 0) - 1 + mixed
        tl.store(index + row * other_tiles + ordinal, others, mask=is_mixed)
        ordinal = tl.cumsum(is_full.to(tl.int32), 0) - 1 + full
        tl.store(index + row * other_tiles + other_tiles - 1 - ordinal, others, mask=is_full)
        mixed += tl.sum(is_mixed.to(tl.int32), axis=0)
        full += tl.sum(is_full.to(tl.int32), axis=0)
    tl.store(counts + row * 2, mixed)
    tl.store(counts + row * 2 + 1, full)


@triton.jit
def _states(mask, b, h, q_tile, k_tile, q_len, k_len, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(some, every), booleans (q tiles, k tiles): may a pair of the tile be visible, are all pairs surely visible."""
    i = q_tile[:, None] * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    low, high = (k_tile * BLOCK_K)[None, :], (k_tile * BLOCK_K + BLOCK_K)[None, :]
    some = (q_tile[:, None] * BLOCK_Q < q_len) & (low < k_len)
    every = some & (high <= k_len)  # a ragged last tile counts as mixed: keys beyond the last must be masked
    if mask.starts is not None:
        starts, stops = mask.starts, mask.stops
        row = b * starts.b + h * starts.h + i.to(tl.int64) * starts.row
        touched, covered = some & (low < 0), some & (low < 0)
        for r in tl.static_range(mask.ranges):
            start = tl.load(starts.ptr + row + r * starts.column, mask=i < q_len, other=0)
            stop = tl.load(stops.ptr + row + r * stops.column, mask=i < q_len, other=0)
            real, held = i < q_len, start < stop
            first_start = tl.min(tl.where(real & held, start, k_len), axis=1)[:, None]
            last_stop = tl.max(tl.where(real & held, stop, 0), axis=1)[:, None]
            last_start = tl.max(tl.where(real, start, 0), axis=1)[:, None]
            first_stop = tl.min(tl.where(real, stop, k_len), axis=1)[:, None]
            touched = touched | ((first_start < high) & (last_stop > low))
            covered = covered | ((last_start <= low) & (first_stop >= high))
        some, every = some & touched, every & covered
    if mask.q_labels is not None:
        q_least, q_most = _label_span(mask.q_labels, b, h, i, q_len)
        k_least, k_most = _label_span(
            mask.k_labels, b, h, k_tile[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], k_len
        )
        q_least, q_most, k_least, k_most = q_least[:, None], q_most[:, None], k_least[None, :], k_most[None, :]
        some = some & (q_least <= k_most) & (k_least <= q_most)
        every = every & (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    return some, every


@triton.jit
def _label_span(labels, b, h, position, size):
    """Smallest and largest label of each row of `position` (tiles, positions)."""
    # Padding repeats the tile's first label, which is real wherever the tile is.
    position = tl.where(position < size, position, tl.min(position, axis=1)[:, None])
    row = b * labels.b + h * labels.h
    label = tl.load(labels.ptr + row + position.to(tl.int64) * labels.row, mask=position < size, other=0)
    return tl.min(label, axis=1), tl.max(label, axis=1)
