"""Which tiles there are, and what is known of each before anything is multiplied.

Tiles outside the hull of their rows' ranges are never looked at; of the rest, those that no row sees are left out, and
those that every row sees come without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..._arrays import Array, is_abstract
from ...contract import Dropout, Tiles
from ...masks.lower import LoweredMask
from ...philox import keep_mask
from ...problem import AttentionProblem
from .axes import Axes, Block, Tile
from .tiles import slab
from .verbs import Verbs

_MINUS_INF = float("-inf")


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """The tiles of one call.

    Attributes:
        problem, mask, dropout: what is asked.
        verbs: the framework's verbs.
        tiles: their sizes.
        biases: grouped dense biases (Axes.PAIRS) and table (Axes.BAND), since -inf in them hides pairs.
    """

    problem: AttentionProblem
    mask: LoweredMask
    dropout: Dropout | None
    verbs: Verbs
    tiles: Tiles
    biases: tuple[tuple[Axes, Array], ...] = ()

    def blocks(self) -> Iterator[Block]:
        """All blocks of query rows, in a fixed order."""
        problem = self.problem
        per_batch, per_heads = slab(problem, self.tiles)
        for batch in _steps(0, problem.batch, per_batch):
            for heads in _steps(0, problem.kv_heads, per_heads):
                for rows in _steps(0, problem.q_len, self.tiles.queries):
                    yield Block(batch, heads, rows)

    def tiles_of(self, block: Block) -> Iterator[Tile]:
        """The tiles of a block that some row sees, keys ascending."""
        starts, stops = self._bounds(block)
        first, last = self._hull(starts, stops)
        hiding = self._hiding_biases()
        step = self.tiles.keys
        for keys in _steps(first - first % step, last, step):
            keys = slice(keys.start, min(keys.start + step, self.problem.k_len))
            seen = self._visible(block, keys, starts, stops)
            if seen is _NOBODY:
                continue
            tile = Tile(block, keys, self.problem.q_len, seen)
            if hiding:
                tile = self._hide(tile)
                if tile is None:
                    continue
            if self.dropout is not None:
                tile = replace(tile, factor=self._dropout_factor(tile))
            yield tile

    def guarded(self, tile: Tile, parts: Sequence[Array]) -> Tile:
        """The tile, marked where its arithmetic must not touch what is hidden: an operand is not finite there."""
        if tile.visible is None:
            return tile
        xp = self.verbs.xp
        careful = not self.verbs.known or not all(bool(xp.isfinite(part).all()) for part in parts)
        return replace(tile, careful=careful)

    def _bounds(self, block: Block) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Bounds of the block's ranges (B', H', rows, R), where NumPy can look at them."""
        ranges = self.mask.ranges
        if ranges is None or not isinstance(ranges.starts, np.ndarray):
            return None, None
        batch, heads = block.batch, self._q_heads(block)
        starts, stops = (
            side[batch if side.shape[0] > 1 else slice(None), heads if side.shape[1] > 1 else slice(None), block.rows]
            for side in (ranges.starts, ranges.stops)
        )
        return starts, stops

    def _hull(self, starts: np.ndarray | None, stops: np.ndarray | None) -> tuple[int, int]:
        """The first key that some row may see, and the one after the last."""
        if starts is None or stops is None:
            return 0, self.problem.k_len
        some = starts < stops
        if not some.any():
            return 0, 0
        return int(starts[some].min()), int(stops[some].max())

    def _visible(self, block: Block, keys: slice, starts: np.ndarray | None, stops: np.ndarray | None) -> Array | None:
        """Visibility (b', h', G', rows, keys); None when everybody sees all, `_NOBODY` when nobody sees any."""
        mask = self.mask
        if mask.trivial:
            return None
        if starts is not None and stops is not None:
            covered = np.maximum(np.minimum(stops, keys.stop) - np.maximum(starts, keys.start), 0).sum(-1)
            if not covered.any():
                return _NOBODY
            only_ranges = mask.q_labels is None and mask.dense is None and mask.lazy is None
            if only_ranges and bool((covered == keys.stop - keys.start).all()):
                return None
        seen = mask.visible(block.rows, keys, block.batch, self._q_heads(block))
        if seen is None or not is_abstract(seen):
            if seen is None or bool(seen.all()):
                return None
            if not bool(seen.any()):
                return _NOBODY
        return self.verbs.facts(self._grouped(seen, block))

    def _grouped(self, seen: Array, block: Block) -> Array:
        batch, heads, rows, keys = seen.shape
        kv = block.heads.stop - block.heads.start if heads > 1 else 1
        return seen.reshape(batch, kv, heads // kv, rows, keys)

    def _hiding_biases(self) -> list[tuple[Axes, Array]]:
        """All biases if -inf stands anywhere in them, else none."""
        known = self.verbs.known
        return (
            list(self.biases) if any(not known or bool((bias == _MINUS_INF).any()) for _, bias in self.biases) else []
        )

    def _hide(self, tile: Tile) -> Tile | None:
        """The tile with pairs hidden whose biases sum to -inf; None when nothing is left."""
        xp, total = self.verbs.xp, None
        for axes, bias in self.biases:
            part = self.verbs.cast(bias[tile.part(axes, bias.shape)])
            part = spread_band(self.verbs, part, tile.keys.stop - tile.keys.start) if axes is Axes.BAND else part
            total = part if total is None else total + part
        shown = total != _MINUS_INF
        if self.verbs.known and bool(shown.all()):
            return tile
        seen = shown if tile.visible is None else shown & tile.visible
        if self.verbs.known and not bool(seen.any()):
            return None
        lengths = (tile.block.rows.stop - tile.block.rows.start, tile.keys.stop - tile.keys.start)
        return replace(tile, visible=xp.broadcast_to(seen, (*seen.shape[:3], *lengths)))

    def _dropout_factor(self, tile: Tile) -> Array:
        """0 or 1 / (1 - p) for each pair of the tile, (b, h, G, rows, keys)."""
        assert self.dropout is not None
        problem, verbs, block = self.problem, self.verbs, tile.block
        b, kv, i, j = (
            verbs.arange(part.start, part.stop) for part in (block.batch, block.heads, block.rows, tile.keys)
        )
        h = kv[:, None] * problem.group + verbs.arange(0, problem.group)
        b, h = b[:, None, None, None, None], h[:, :, None, None]
        keep = keep_mask(
            self.dropout, b, h, i[:, None], j, problem.q_heads, problem.q_len, problem.k_len, verbs.xp, wide=True
        )
        return verbs.to(keep, verbs.dtype) * self.dropout.inverse_keep

    def _q_heads(self, block: Block) -> slice:
        group = self.problem.group
        return slice(block.heads.start * group, block.heads.stop * group)


def spread_band(verbs: Verbs, band: Array, keys: int) -> Array:
    """A table's band (…, rows + keys - 1) as the tile (…, rows, keys) that is constant along diagonals."""
    # Row i starts i places before the last window, so the windows stand in reverse order.
    return verbs.xp.flip(verbs.windows(band, keys), (-2,))


def gather_band(verbs: Verbs, tile: Array) -> Array:
    """The transpose of `spread_band`: (…, rows, keys) summed along diagonals, (…, rows + keys - 1)."""
    *leading, rows, keys = tile.shape
    # With `rows` zeros after each row, reading the same memory in rows one element shorter shifts row n by n places.
    wide = verbs.xp.concatenate([verbs.xp.flip(tile, (-2,)), verbs.zeros((*leading, rows, rows))], -1)
    flat = wide.reshape(*leading, rows * (keys + rows))[..., : rows * (keys + rows - 1)]
    return flat.reshape(*leading, rows, keys + rows - 1).sum(-2)


def _steps(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


_NOBODY = object()  # a mask nobody sees through, told apart from None, the mask everybody sees through
