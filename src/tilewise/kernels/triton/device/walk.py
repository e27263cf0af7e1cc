"""Which tiles a program works on, and in which order programs take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Lists(NamedTuple):
    """For each tile of one axis, the tiles of the other axis that it meets.

    index: (B', H', tiles, tiles of the other axis) int32; the mixed tiles of a row from the left on, the full ones from
    the right on. counts: (B', H', tiles, 2) int32, how many are mixed and how many full. by_batch, by_head: whether B'
    and H' are more than 1, known to the compiler.
    """

    index: Any
    counts: Any
    by_batch: Any
    by_head: Any


# The numbers of tiles in a launch: the compiler need not know them, and would compile anew for each kind of number.
GRID = ["first_tile", "tiles", "together"]


@triton.jit
def place(tiles, together, heads, LAST_FIRST: tl.constexpr):
    """(tile within the launch, batch row, head) of this program, of a launch over `tiles` tiles of B * heads heads.

    Heads are taken `together` at a time, to share the cache, and within such a section the tiles in order, so that with
    LAST_FIRST the longest rows of a causal mask start first and the short ones fill the gaps at the end.
    """
    program = tl.program_id(0)
    section = program // (tiles * together)
    within = program % (tiles * together)
    total = tl.num_programs(0) // tiles
    width = tl.minimum(together, total - section * together)
    tile, bh = within // width, section * together + within % width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, bh // heads, bh % heads


@triton.jit
def row_of(lists, tile, tiles, b, h, heads):
    """Where the tile's lists stand."""
    row = tile.to(tl.int64)
    if lists is not None:
        if lists.by_batch:
            row += (b * heads if lists.by_head else b).to(tl.int64) * tiles
        if lists.by_head:
            row += h.to(tl.int64) * tiles
    return row


@triton.jit
def counts_of(lists, row, size, BLOCK: tl.constexpr, RAGGED_IS_MIXED: tl.constexpr):
    """(mixed, full): how many tiles of the other axis, of length `size`, the tile meets; all of them without a mask."""
    if lists is None:
        full = size // BLOCK if RAGGED_IS_MIXED else tl.cdiv(size, BLOCK)
        mixed = tl.cdiv(size, BLOCK) - full
    else:
        mixed, full = tl.load(lists.counts + row * 2), tl.load(lists.counts + row * 2 + 1)
    return mixed, full


@triton.jit
def mixed_tile(lists, row, n, size, BLOCK: tl.constexpr):
    """Number of the n-th mixed tile; without a mask the only one is the ragged last."""
    if lists is None:
        number = size // BLOCK + n
    else:
        number = tl.load(lists.index + row * tl.cdiv(size, BLOCK) + n)
    return number


@triton.jit
def full_tile(lists, row, n, size, BLOCK: tl.constexpr):
    """Number of the n-th full tile."""
    number = n
    if lists is not None:
        number = tl.load(lists.index + (row + 1) * tl.cdiv(size, BLOCK) - 1 - n)
    return number


@triton.jit
def nth_tile(lists, row, n, mixed, size, BLOCK: tl.constexpr):
    """Number of the n-th tile, of which the first are mixed and the others full."""
    if n < mixed:
        number = mixed_tile(lists, row, n, size, BLOCK)
    else:
        number = full_tile(lists, row, n - mixed, size, BLOCK)
    return number
