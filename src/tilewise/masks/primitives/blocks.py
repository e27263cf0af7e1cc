"""Block-sparse masks: one truth value per block of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..._arrays import Array, as_array, dtype_name, family_of
from ..algebra import Mask
from ..ranges import MOST_RANGES, Ranges, from_bounds
from ..site import Site
from .positions import is_integer


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """See `blocks`."""

    map: Array
    size: tuple[int, int]
    arrays: ClassVar[tuple[str, ...]] = ("map",)

    def check(self, site: Site) -> None:
        shape = tuple(self.map.shape)
        full = (site.batch, site.heads, -(-site.q_len // self.size[0]), -(-site.k_len // self.size[1]))
        leading = all(s in (1, f) for s, f in zip(shape[-3::-1], full[1::-1], strict=False))
        if not 2 <= len(shape) <= 4 or shape[-2:] != full[2:] or not leading:
            raise ValueError(
                f"mask: blocks(map) has shape {shape}, expected {full[2:]} after optional batch and head axes, "
                f"for blocks of {self.size}"
            )

    def extent(self) -> tuple[int, int]:
        batch, heads = (1, 1, *self.map.shape[:-2])[-2:]
        return batch, heads

    def _four(self, site: Site) -> Array:
        table = site.array(self.map)
        return table.reshape((1,) * (4 - table.ndim) + tuple(table.shape))

    def ranges(self, site: Site) -> Ranges | None:
        """The runs of visible blocks in each row, where no row has more than a few and they can be looked at."""
        if not site.concrete or 0 in (site.batch, site.heads, site.q_len, site.k_len):
            return None
        table = self._four(site)
        edges = np.diff(np.pad(table.astype(np.int8), [(0, 0)] * 3 + [(1, 1)]), axis=-1)  # (B', H', nq, nk + 1)
        count = int((edges == 1).sum(-1).max())
        if count > MOST_RANGES:
            return None
        places = np.arange(edges.shape[-1])
        last = edges.shape[-1] - 1
        starts = np.sort(np.where(edges == 1, places, last), axis=-1)[..., : max(count, 1)]
        stops = np.sort(np.where(edges == -1, places, last), axis=-1)[..., : max(count, 1)]
        block_row = np.arange(site.q_len) // self.size[0]
        starts, stops = (side[:, :, block_row] * self.size[1] for side in (starts, stops))
        return from_bounds(site, starts.astype(site.index), stops.astype(site.index))

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        table = self._four(site)
        b, h = b if table.shape[0] > 1 else 0 * b, h if table.shape[1] > 1 else 0 * h
        return table[b, h, i // self.size[0], j // self.size[1]]

    def describe(self) -> str:
        return f"blocks({'x'.join(map(str, self.map.shape))}, {self.size})"


def blocks(map: Array, size: int | tuple[int, int]) -> Mask:
    """Query i sees key j iff map[i // size_q, j // size_k].

    Args:
        map: booleans (nq, nk), (H, nq, nk) or (B, H, nq, nk), with nq = ceil(Sq / size_q) and nk = ceil(Sk / size_k).
        size: queries and keys in a block, one int for both or a pair.

    Raises:
        TypeError: a map that is not boolean, a size that is no int. ValueError: a size below 1, or not two.
    """
    map = as_array("map", map)
    if family_of(map) is None or dtype_name(map) != "bool":
        got = type(map).__name__ if family_of(map) is None else f"dtype {dtype_name(map)}"
        raise TypeError(f"map: blocks() got {got}, expected a boolean array")
    pair: Any = (size, size) if is_integer(size) else size
    if not isinstance(pair, tuple | list):
        raise TypeError(f"size: blocks() got {type(size).__name__}, expected one or two ints")
    if len(pair) != 2 or not all(is_integer(side) and side >= 1 for side in pair):
        raise ValueError(f"size: blocks() got {size!r}, expected one or two ints of at least 1")
    return Blocks(map, (pair[0], pair[1]))
