"""How an operand lies along a tile: which part of it a tile reads, and where a tile's contribution to it is added.

Heads are seen as (Hkv, G): kv heads and the query heads that share one. Reading a part and adding to the same part
are each other's transposes; that is what makes derivatives of a sum over tiles sums over tiles again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..._arrays import Array


class Axes(Enum):
    """Layout of an operand."""

    ROWS = "rows"  # (B, Hkv, G, Sq, …): queries, lse, the output and its gradient
    KEYS = "keys"  # (B, Hkv, Sk, …): keys and values
    PAIRS = "pairs"  # (B', Hkv', G', Sq', Sk'), each 1 or full: dense biases
    BAND = "band"  # (B', Hkv', G', Sq + Sk - 1): a table over j - i


@dataclass(frozen=True, slots=True)
class Block:
    """Some query rows of some heads: slices of B, of Hkv and of Sq."""

    batch: slice
    heads: slice
    rows: slice


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A block and some keys, with what is known of its pairs.

    Attributes:
        block, keys: where it lies; q_len: Sq of the whole.
        visible: (b or 1, h or 1, G or 1, rows, keys) booleans, or None when every row sees every key.
        factor: what dropout multiplies probabilities with, (b, h, G, rows, keys), or None.
        careful: whether a value that is not finite must be kept from rows that do not see it.
    """

    block: Block
    keys: slice
    q_len: int
    visible: Array | None = None
    factor: Array | None = None
    careful: bool = False

    def part(self, axes: Axes, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The index of the tile's part in an operand of that layout and shape."""
        block, everything = self.block, slice(None)
        if axes is Axes.ROWS:
            return block.batch, block.heads, everything, block.rows
        if axes is Axes.KEYS:
            return block.batch, block.heads, self.keys
        batch, heads = (
            cut if size > 1 else everything for cut, size in zip((block.batch, block.heads), shape, strict=False)
        )
        if axes is Axes.BAND:
            # Distances from that of the last row and the first key to that of the first row and the last key.
            shift = self.q_len - block.rows.stop
            return (
                batch,
                heads,
                everything,
                slice(self.keys.start + shift, self.keys.stop + self.q_len - 1 - block.rows.start),
            )
        rows, keys = (
            cut if size > 1 else everything for cut, size in zip((block.rows, self.keys), shape[3:], strict=True)
        )
        return batch, heads, everything, rows, keys


def grouped(array: Array, q_heads: int, kv_heads: int) -> Array:
    """(B', Hq or 1, …) as (B', Hkv or 1, G or 1, …); a view."""
    batch, heads, *rest = array.shape
    kv = kv_heads if heads == q_heads else 1
    return array.reshape(batch, kv, heads // max(kv, 1), *rest)


def ungrouped(array: Array) -> Array:
    """The way back: (B', Hkv', G', …) as (B', Hkv' G', …)."""
    batch, kv, group, *rest = array.shape
    return array.reshape(batch, kv * group, *rest)
