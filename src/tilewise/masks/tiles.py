"""The one question kernels ask of a tile: does no row see any of it, do all rows see all of it, or is it mixed?"""

from __future__ import annotations

import numpy as np

from .lower import TILE, LoweredMask, TileBits, cut
from .ranges import Ranges

EMPTY, MIXED, FULL = 0, 1, 2

# Elements of a mask that are evaluated at once while tiles are classified and packed.
_CHUNK = 1 << 22


def classify(
    mask: LoweredMask, q_tile: int, k_tile: int, batch: slice = slice(None), heads: slice = slice(None)
) -> np.ndarray:
    """(B', H', nq, nk) int8 of EMPTY, MIXED, FULL, with B', H' 1 where all are alike. Needs concrete operands.

    Ranges alone cost O(Sq + nq * nk); labels and bits are looked at one by one.
    """
    site = mask.site
    nq, nk = -(-site.q_len // q_tile), -(-site.k_len // k_tile)
    if mask.trivial or not nq or not nk:
        return np.full((1, 1, nq, nk), FULL, np.int8)
    if mask.ranges is not None and mask.q_labels is None and mask.dense is None and mask.lazy is None:
        starts, stops = (cut(side, batch, heads) for side in (mask.ranges.starts, mask.ranges.stops))
        some, every = _from_ranges(starts, stops, site.k_len, q_tile, k_tile)
    else:
        looked_at = [
            _looked_at(mask, slice(q, min(q + q_tile, site.q_len)), k_tile, batch, heads)
            for q in range(0, site.q_len, q_tile)
        ]
        some, every = (np.concatenate(side, axis=2) for side in zip(*looked_at, strict=True))
    return np.where(every, FULL, np.where(some, MIXED, EMPTY)).astype(np.int8)


def _from_ranges(
    starts: np.ndarray, stops: np.ndarray, k_len: int, q_tile: int, k_tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each tile, whether some pair and whether every pair is visible: twice (B', H', nq, nk).

    Args:
        starts, stops: (B', H', Sq, R), with the invariants of `ranges.py`: a row fills a tile by one interval, or not
            at all.
    """
    nk = -(-k_len // k_tile)
    empty = stops <= starts
    touched = _rows_per_tile(starts // k_tile, np.where(empty, starts // k_tile, -(-stops // k_tile)), q_tile, nk)
    first = -(-starts // k_tile)
    last = np.where(stops == k_len, nk, stops // k_tile)  # the last tile may be short, and is full all the same
    filled = _rows_per_tile(first, np.where(empty, first, np.maximum(first, last)), q_tile, nk)
    q_len = starts.shape[2]
    rows = np.minimum(q_tile, q_len - np.arange(0, q_len, q_tile))
    return touched > 0, filled == rows[:, None]


def _rows_per_tile(first: np.ndarray, last: np.ndarray, q_tile: int, nk: int) -> np.ndarray:
    """How many of the tile intervals [first, last), (B', H', Sq, R), of a row of tiles hold a tile: (B', H', nq, nk).

    An interval adds 1 where it begins and takes it back where it ends; running sums then count.
    """
    leading, q_len = first.shape[:2], first.shape[2]
    nq = -(-q_len // q_tile)
    line = (
        np.arange(np.prod(leading, dtype=np.int64)).reshape(*leading, 1, 1) * nq + (np.arange(q_len) // q_tile)[:, None]
    )
    size = int(np.prod(leading, dtype=np.int64)) * nq * (nk + 1)
    begins, ends = (np.bincount((line * (nk + 1) + edge).ravel(), minlength=size) for edge in (first, last))
    return (begins - ends).reshape(*leading, nq, nk + 1).cumsum(-1)[..., :nk]


def _looked_at(
    mask: LoweredMask, rows: slice, k_tile: int, batch: slice, heads: slice
) -> tuple[np.ndarray, np.ndarray]:
    """The same for one row of tiles by looking at every pair, a few tiles of keys at a time: twice (B', H', 1, nk)."""
    site = mask.site
    step = max(1, _CHUNK // max(1, site.batch * site.heads * (rows.stop - rows.start) * k_tile))
    edges = np.arange(0, site.k_len, k_tile)
    some, every = [], []
    for first in range(0, len(edges), step):
        part = edges[first : first + step]
        seen = mask.visible(rows, slice(int(part[0]), min(int(part[-1]) + k_tile, site.k_len)), batch, heads)
        assert seen is not None
        some.append(np.logical_or.reduceat(seen.any(2, keepdims=True), part - part[0], axis=-1))
        every.append(np.logical_and.reduceat(seen.all(2, keepdims=True), part - part[0], axis=-1))
    return np.concatenate(some, axis=-1), np.concatenate(every, axis=-1)


def pack(mask: LoweredMask, q_start: int, q_stop: int) -> TileBits:
    """See `LoweredMask.tile_bits`."""
    site, bits = mask.site, LoweredMask(mask.site, lazy=mask.lazy)
    one = bits.visible(slice(0, min(1, site.q_len)), slice(0, min(1, site.k_len)))
    assert one is not None
    batches, heads = one.shape[:2]  # 1 where the lazy part is the same for all
    nq, nk = -(-(q_stop - q_start) // TILE), -(-site.k_len // TILE)
    step = max(1, _CHUNK // (TILE * TILE * max(1, batches * heads)))
    index, words, count = np.full((batches, heads, nq, nk), -1, np.int32), [np.zeros((0, TILE), np.uint64)], 0
    for row in range(nq):
        rows = slice(q_start + row * TILE, min(q_start + (row + 1) * TILE, q_stop))
        first, last = _key_tiles(mask.ranges, rows, nk)
        for k in range(first, last, step):
            stop = min(k + step, last)
            tiles, real = _tile_row(bits, rows, k, stop)
            some, every = tiles.any((-1, -2)), (tiles | ~real).all((-1, -2))  # (B', H', n)
            mixed = some & ~every
            states = np.where(every, -2, -1).astype(np.int32)
            states[mixed] = np.arange(count, count + int(mixed.sum()))
            index[:, :, row, k:stop] = states
            words.append(_words(tiles[mixed]))
            count += len(words[-1])
    return TileBits(index, np.concatenate(words), q_start, q_stop)


def _key_tiles(ranges: Ranges | None, rows: slice, nk: int) -> tuple[int, int]:
    """Tiles of keys [first, last) outside of which no range of these rows reaches."""
    if ranges is None:
        return 0, nk
    starts, stops = ranges.starts[:, :, rows], ranges.stops[:, :, rows]
    some = starts < stops
    if not some.any():
        return 0, 0
    return int(starts[some].min()) // TILE, -(-int(stops[some].max()) // TILE)


def _tile_row(bits: LoweredMask, rows: slice, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles [first, last) of one row of tiles, (B', H', n, TILE, TILE), False beyond the last query and key; and which
    of their pairs are real, (n, TILE, TILE)."""
    keys = slice(first * TILE, min(last * TILE, bits.site.k_len))
    seen = bits.visible(rows, keys)
    assert seen is not None
    short = [(0, TILE - seen.shape[2]), (0, (last - first) * TILE - seen.shape[3])]
    tiles = np.pad(seen, [(0, 0), (0, 0), *short]).reshape(*seen.shape[:2], TILE, last - first, TILE)
    real = np.pad(np.ones(seen.shape[2:], bool), short).reshape(TILE, last - first, TILE)
    return tiles.swapaxes(2, 3), real.swapaxes(0, 1)


def _words(tiles: np.ndarray) -> np.ndarray:
    """(n, TILE queries, TILE keys) booleans as (n, TILE keys) words whose bit r is query r."""
    packed = np.ascontiguousarray(np.packbits(tiles.swapaxes(1, 2), axis=-1, bitorder="little"))
    return packed.view("<u8")[..., 0].astype(np.uint64)
