"""Tiles of a problem's operands for the jax body: blocks to scan over, and masks and biases of one tile.

Scores of a tile are (B, Hkv, R, C): the R = G * queries rows of the G query heads that share a kv head stand together,
so that k and v are read as they are. Lengths need be no multiple of the tile: the last block of an axis is moved back
to end where the axis ends, so it overlaps the one before it. Its old queries are computed twice and dropped, its old
keys are masked. Nothing is padded, and arrays of Sq x Sk are only ever sliced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...contract import Dropout, Tiles
from ...masks.lower import LoweredMask
from ...philox import keep_mask
from ...problem import AttentionProblem

Array = Any

# Sides of a tile of one head, measured on CPUs: larger ones leave the caches, smaller ones are all overhead.
_SIDE, _LEAST_SIDE = 256, 32
# Scores computed at once over batch rows and heads; a handful of arrays of that size are alive together.
_TILE_SCORES = 1 << 21


@dataclass(frozen=True, slots=True)
class Blocks:
    """An axis cut into `count` blocks of `size`; the last overlaps the one before it by `overlap`."""

    length: int
    size: int

    @classmethod
    def near(cls, length: int, size: int) -> Blocks:
        """Blocks of at most `size`, as equal as they come, so that the overlap is less than one per block."""
        count = -(-length // max(1, size))
        return cls(length, -(-length // count))

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    @property
    def overlap(self) -> int:
        return self.count * self.size - self.length

    @property
    def starts(self) -> np.ndarray:
        """(count,) first position of each block."""
        return np.minimum(np.arange(self.count, dtype=np.int32) * self.size, self.length - self.size)

    def split(self, x: Array, axis: int) -> Array:
        """(…, length, …) as (count, …, size, …); linear, so its transpose puts gradients back where they belong."""
        if self.count == 1:
            return x[None]
        if self.overlap:
            whole = Blocks(self.length + self.overlap - self.size, self.size)
            first = jax.lax.slice_in_dim(x, 0, whole.length, axis=axis)
            last = jax.lax.slice_in_dim(x, self.length - self.size, self.length, axis=axis)
            return jnp.concatenate([whole.split(first, axis), last[None]])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :]), axis, 0)

    def join(self, blocks: Array, axis: int) -> Array:
        """(count, …, size, …) as (…, length, …), `axis` being that of the result."""
        if self.count == 1:
            return blocks[0]
        if self.overlap:
            whole = Blocks(self.length + self.overlap - self.size, self.size)
            last = jax.lax.slice_in_dim(blocks[-1], self.overlap, self.size, axis=axis)
            return jnp.concatenate([whole.join(blocks[:-1], axis), last], axis)
        x = jnp.moveaxis(blocks, 0, axis)
        return x.reshape(*x.shape[:axis], self.length, *x.shape[axis + 2 :])


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of a problem: blocks of queries and of keys."""

    problem: AttentionProblem
    queries: Blocks
    keys: Blocks

    @classmethod
    def of(cls, problem: AttentionProblem, tiles: Tiles) -> Grid:
        """Tiles as the plan has them, or smaller: all heads are computed at once, so many heads need small tiles."""
        queries = min(tiles.queries, problem.q_len, _SIDE)
        keys = min(tiles.keys, problem.k_len, max(_SIDE, _SIDE * _SIDE // queries))
        while problem.batch * problem.q_heads * queries * keys > _TILE_SCORES and max(queries, keys) > _LEAST_SIDE:
            queries, keys = (queries, -(-keys // 2)) if keys >= queries else (-(-queries // 2), keys)
        return cls(problem, Blocks.near(problem.q_len, queries), Blocks.near(problem.k_len, keys))

    @property
    def rows(self) -> int:
        """R, the rows of a tile of scores."""
        return self.problem.group * self.queries.size

    def merge_heads(self, x: Array) -> Array:
        """(B', H', queries or 1, C') of any full or broadcast axes as (B', Hkv or 1, R or 1, C')."""
        batch, heads, queries, keys = x.shape
        if heads == 1 and queries == 1:
            return x
        group = self.problem.group
        if heads == 1:
            x = jnp.broadcast_to(x[:, :, None], (batch, 1, group, queries, keys))
        elif queries < self.queries.size:
            x = jnp.broadcast_to(x, (batch, heads, self.queries.size, keys))
        return x.reshape(batch, -1 if heads > 1 else 1, self.rows, keys)


def cut(x: Array, axis: int, start: Array, size: int) -> Array:
    """`size` positions of an axis from `start` on; an axis of size 1 is broadcast and stays."""
    return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One tile: queries from position i, keys from position j; keys before `fresh` belong to the block before.

    `corner` are the numbers of the first batch row and head where they are not 0.
    """

    grid: Grid
    i: Array
    j: Array
    fresh: Array
    corner: tuple[Array, Array] | None = None

    def cut(self, x: Array) -> Array:
        """The tile of (B', H', Sq or 1, Sk or 1)."""
        return cut(cut(x, 2, self.i, self.grid.queries.size), 3, self.j, self.grid.keys.size)

    def positions(self) -> tuple[Array, Array, Array, Array]:
        """b, h, i, j of the tile as 4-D integers that broadcast against each other."""
        problem, grid = self.grid.problem, self.grid
        row, head = self.corner or (0, 0)
        b, h = row + jnp.arange(problem.batch), head + jnp.arange(problem.q_heads)
        i, j = self.i + jnp.arange(grid.queries.size), self.j + jnp.arange(grid.keys.size)
        return b.reshape(-1, 1, 1, 1), h.reshape(1, -1, 1, 1), i.reshape(1, 1, -1, 1), j.reshape(1, 1, 1, -1)

    def worth(self, mask: LoweredMask) -> Array | None:
        """Whether ranges and labels leave anything to be seen, from their bounds alone; None when there are neither."""
        grid, answers = self.grid, []
        if mask.ranges is not None:
            starts, stops = (
                cut(side, 2, self.i, grid.queries.size) for side in (mask.ranges.starts, mask.ranges.stops)
            )
            meets = (jnp.maximum(starts, self.fresh) < jnp.minimum(stops, self.j + grid.keys.size)).any()
            answers.append(meets)
        if mask.q_labels is not None:
            q, k = cut(mask.q_labels, 2, self.i, grid.queries.size), cut(mask.k_labels, 2, self.j, grid.keys.size)
            answers.append(((q.min(-1) <= k.max(-1)) & (k.min(-1) <= q.max(-1))).any())
        return reduce(jnp.logical_and, answers) if answers else None

    def seen(self, mask: LoweredMask, dense: tuple[Array, ...], table: Array | None) -> Array | None:
        """Visibility (B', Hkv or 1, R, C), by mask and by biases of -inf; None when all pairs are visible."""
        grid, parts = self.grid, []
        size = (grid.queries.size, grid.keys.size)
        b, h, i, j = self.positions()
        if mask.ranges is not None:
            starts, stops = (
                cut(side, 2, self.i, size[0])[..., None, :] for side in (mask.ranges.starts, mask.ranges.stops)
            )
            parts.append(((j[..., None] >= starts) & (j[..., None] < stops)).any(-1))
        if mask.q_labels is not None:
            q, k = cut(mask.q_labels, 2, self.i, size[0]), cut(mask.k_labels, 2, self.j, size[1])
            parts.append(q[..., None] == k[..., None, :])
        if mask.dense is not None:
            parts.append(self.cut(jnp.asarray(mask.dense)))
        if mask.lazy is not None:
            # Positions are traced here, whatever the mask was lowered for.
            parts.append(mask.lazy.visible(replace(mask.site, family="jax", concrete=False), b, h, i, j))
        parts = [jnp.broadcast_to(part, (*part.shape[:2], *size)) for part in parts]
        parts += [x != -jnp.inf for x in dense] + ([table != -jnp.inf] if table is not None else [])
        parts += [j >= self.fresh] if grid.keys.overlap else []
        if not parts:
            return None
        seen = reduce(jnp.logical_and, (grid.merge_heads(part) for part in parts))
        return jnp.broadcast_to(seen, (*seen.shape[:2], grid.rows, size[1]))

    def band(self, table: Array) -> Array:
        """Biases (B', H', queries, keys) of the tile, from a table over j - i: (B', H', Sq + Sk - 1)."""
        queries, keys = self.grid.queries.size, self.grid.keys.size
        width = queries + keys - 1
        lowest = self.j - self.i + self.grid.problem.q_len - queries  # of distance j - (i + queries - 1)
        band = jax.lax.dynamic_slice_in_dim(table, lowest, width, 2)
        # Row r is the band from queries - 1 - r on. Repeating the band, one longer than the width, with that period and
        # reading rows of one less shifts each row by one: slices and reshapes alone, where a gather's transpose would
        # be a slow scatter.
        band = jnp.pad(band, [(0, 0), (0, 0), (0, 1)])
        rows = jnp.broadcast_to(band[:, :, None], (*band.shape[:2], queries, width + 1))
        flat = rows.reshape(*band.shape[:2], queries * (width + 1))[..., queries - 1 : -1]
        return flat.reshape(*band.shape[:2], queries, width)[..., :keys]

    def kept(self, dropout: Dropout, heads: int) -> Array:
        """Which pairs dropout keeps, (B, Hkv, R, C); `heads` are those of the whole problem."""
        problem = self.grid.problem
        sizes = (heads, problem.q_len, problem.k_len)
        kept = keep_mask(dropout, *self.positions(), *sizes, jnp, wide=False)
        return kept.reshape(problem.batch, problem.kv_heads, self.grid.rows, self.grid.keys.size)
