"""Which tiles a program works on, and in which order programs take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Lists(NamedTuple):
    """For each tile of one axis, the tiles of the other axis that it meets.

    index: (B', H', tiles, other) int32; the mixed tiles of a row from the left on, the full ones from the right on.
    counts: (B', H', tiles, 2) int32, how many are mixed and how many full.
    """

    index: Any
    counts: Any
    b: int
    h: int
    other: int


class Grid(NamedTuple):
    """The tiles of one launch, [first, first + tiles) of the axis, and heads that run side by side to share the cache."""

    first: int
    tiles: int
    heads: int
    together: int


@triton.jit
def place(grid, LAST_FIRST: tl.constexpr):
    """(tile within the launch, batch row, head) of this program.

    Heads are taken `together` at a time, and within such a section the tiles in order, so that with LAST_FIRST the
    longest rows of a causal mask start first and the short ones fill the gaps at the end.
    """
    program = tl.program_id(0)
    section = program // (grid.tiles * grid.together)
    within = program % (grid.tiles * grid.together)
    total = tl.num_programs(0) // grid.tiles
    width = tl.minimum(grid.together, total - section * grid.together)
    tile, bh = within // width, section * grid.together + within % width
    if LAST_FIRST:
        tile = grid.tiles - 1 - tile
    return tile, bh // grid.heads, bh % grid.heads


@triton.jit
def counts_of(lists, tile, b, h, size, BLOCK: tl.constexpr, RAGGED_IS_MIXED: tl.constexpr):
    """(mixed, full): how many tiles of the other axis, of length `size`, the tile meets; all of them without a mask."""
    if lists is None:
        full = size // BLOCK if RAGGED_IS_MIXED else tl.cdiv(size, BLOCK)
        mixed = tl.cdiv(size, BLOCK) - full
    else:
        row = lists.counts + (b.to(tl.int64) * lists.b + h * lists.h + tile) * 2
        mixed, full = tl.load(row), tl.load(row + 1)
    return mixed, full


@triton.jit
def mixed_tile(lists, tile, b, h, n, size, BLOCK: tl.constexpr):
    """Number of the n-th mixed tile; without a mask the only one is the ragged last."""
    if lists is None:
        number = size // BLOCK + n
    else:
        number = tl.load(lists.index + (b.to(tl.int64) * lists.b + h * lists.h + tile) * lists.other + n)
    return number


@triton.jit
def full_tile(lists, tile, b, h, n):
    """Number of the n-th full tile."""
    number = n
    if lists is not None:
        number = tl.load(lists.index + (b.to(tl.int64) * lists.b + h * lists.h + tile) * lists.other + lists.other - 1 - n)
    return number
