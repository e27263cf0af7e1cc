"""A lowered mask on the device, cut into slabs of tiles so that what is kept for it stays linear in Sq + Sk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import triton.language as tl

from ...masks.lower import LoweredMask
from .device.records import Bits, Mask, rows, view
from .device.walk import Lists
from .launch import launch
from .list_kernels import bit_states_kernel, list_kernel
from .tiles import Blocks

Axis = Literal["queries", "keys"]

# Most bytes of tile lists, and most pairs of a predicate, that exist at once.
_LIST_BYTES = 1 << 26
_LAZY_PAIRS = 1 << 25

# Tiles of the other axis that the list kernel judges at once.
_TILES_AT_ONCE = 16


class Slab(NamedTuple):
    """Tiles [first, first + tiles) of an axis; without lists every tile meets every other."""

    first: int
    tiles: int
    mask: Mask
    lists: Lists | None


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """A mask on a device.

    Attributes:
        lowered: where it comes from. device: where it is.
        mask: its facts as kernel arguments; bits only where they are a dense array.
        batch, heads: the leading sizes B', H' of its facts, 1 where all are alike.
        shared: whether the facts are those of a mask without operands, which live as long as the process.
    """

    lowered: LoweredMask
    device: torch.device
    mask: Mask
    batch: int
    heads: int
    shared: bool

    def slabs(self, axis: Axis, blocks: Blocks) -> Iterator[Slab]:
        """The tiles of an axis, in one slab where the mask is small enough, with the lists of what they meet."""
        site = self.lowered.site
        q_tiles, k_tiles = -(-site.q_len // blocks.queries), -(-site.k_len // blocks.keys)
        own, other = (q_tiles, k_tiles) if axis == "queries" else (k_tiles, q_tiles)
        if self.lowered.trivial:
            yield Slab(0, own, self.mask, None)
            return
        step = max(1, _LIST_BYTES // (4 * self.batch * self.heads * max(1, other)))
        if self.lowered.lazy is not None:
            pairs = blocks.queries * blocks.keys * other * self.batch * self.heads
            step = max(1, min(step, _LAZY_PAIRS // pairs))
        for first in range(0, own, step):
            tiles = min(step, own - first)
            if self.shared and tiles == own:
                yield _remembered(self.lowered, self.device, (axis, blocks), lambda: self._slab(axis, blocks, 0, own))
            else:
                yield self._slab(axis, blocks, first, tiles)

    def _slab(self, axis: Axis, blocks: Blocks, first: int, tiles: int) -> Slab:
        mask = self.mask
        if self.lowered.lazy is not None:
            mask = mask._replace(bits=self._evaluate(axis, blocks, first, tiles))
        return Slab(first, tiles, mask, self._lists(mask, axis, blocks, first, tiles))

    def _evaluate(self, axis: Axis, blocks: Blocks, first: int, tiles: int) -> Bits:
        """The lazy part on the pairs of some tiles, as booleans."""
        site = self.lowered.site
        q_start, q_stop, k_start, k_stop = 0, site.q_len, 0, site.k_len
        if axis == "queries":
            q_start, q_stop = first * blocks.queries, min((first + tiles) * blocks.queries, site.q_len)
        else:
            k_start, k_stop = first * blocks.keys, min((first + tiles) * blocks.keys, site.k_len)
        array = _lazy_part(self.lowered).visible(slice(q_start, q_stop), slice(k_start, k_stop))
        return _bits(_on_device(array, self.device), q_start, k_start)

    def _lists(self, mask: Mask, axis: Axis, blocks: Blocks, first: int, tiles: int) -> Lists:
        site = self.lowered.site
        queries = axis == "queries"
        other = -(-site.k_len // blocks.keys) if queries else -(-site.q_len // blocks.queries)
        leading = self.batch * self.heads
        index = torch.empty((leading, tiles, other), dtype=torch.int32, device=self.device)
        counts = torch.empty((leading, tiles, 2), dtype=torch.int32, device=self.device)
        states = None
        sizes = {"BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys}
        if mask.bits is not None:
            q_tiles, k_tiles = (tiles, other) if queries else (other, tiles)
            states = torch.empty((leading, q_tiles, k_tiles), dtype=torch.int8, device=self.device)
            q_first, k_first = (first, 0) if queries else (0, first)
            launch(
                bit_states_kernel, (q_tiles, k_tiles, leading),
                mask.bits, states, q_first, k_first, site.q_len, site.k_len, self.heads, **sizes,
            )  # fmt: skip
        at_once = {"Q_TILES": 1 if queries else _TILES_AT_ONCE, "K_TILES": _TILES_AT_ONCE if queries else 1}
        launch(
            list_kernel, (tiles, leading),
            mask, states, index, counts, first, self.heads, site.q_len, site.k_len, **sizes, **at_once,
        )  # fmt: skip
        return Lists(index, counts, tl.constexpr(self.batch > 1), tl.constexpr(self.heads > 1))


def facts_of(lowered: LoweredMask, device: torch.device) -> Facts:
    """The facts of a mask on a device; those of a mask without operands are moved there once."""
    shared = (
        lowered.ranges is not None
        and isinstance(lowered.ranges.starts, np.ndarray)
        and not lowered.ranges.starts.flags.writeable
    )
    shared = shared and lowered.q_labels is None and lowered.dense is None and lowered.lazy is None
    if shared:
        facts = _remembered(lowered, device, "facts", lambda: _move(lowered, device, True))
        return replace(facts, lowered=lowered)
    return _move(lowered, device, False)


def _move(lowered: LoweredMask, device: torch.device, shared: bool) -> Facts:
    site, ranges = lowered.site, lowered.ranges
    starts = stops = q_labels = k_labels = bits = None
    shapes = []
    if ranges is not None:
        # Bounds are at most Sk, and a kernel takes fewer than 2^31 keys.
        starts, stops = (view(_on_device(side, device).to(torch.int32)) for side in (ranges.starts, ranges.stops))
        shapes += [ranges.starts.shape, ranges.stops.shape]
    if lowered.q_labels is not None and lowered.k_labels is not None:
        q_labels = rows(_on_device(lowered.q_labels, device))
        k_labels = rows(_on_device(lowered.k_labels, device))
        shapes += [lowered.q_labels.shape, lowered.k_labels.shape]
    if lowered.dense is not None:
        bits = _bits(_on_device(lowered.dense, device), 0, 0)
        shapes.append(lowered.dense.shape)
    if lowered.lazy is not None:
        # One pair tells which axes the answer depends on.
        one = slice(0, min(1, site.q_len)), slice(0, min(1, site.k_len))
        shapes.append(_lazy_part(lowered).visible(*one).shape)
    mask = Mask(starts, stops, q_labels, k_labels, bits, tl.constexpr(ranges.count if ranges else 0))
    batch, heads = (max((shape[axis] for shape in shapes), default=1) for axis in (0, 1))
    return Facts(lowered, device, mask, batch, heads, shared)


def _lazy_part(lowered: LoweredMask) -> LoweredMask:
    return LoweredMask(lowered.site, lazy=lowered.lazy)


def _bits(array: torch.Tensor, query: int, key: int) -> Bits:
    return Bits(*view(array.view(torch.uint8)), query, key)


def _on_device(array: Any, device: torch.device) -> torch.Tensor:
    """An array of facts as a tensor on the device; in place where it is there already."""
    if isinstance(array, torch.Tensor):
        return array.to(device)
    return torch.tensor(np.ascontiguousarray(array), device=device)


# What was made for masks without operands, least recently used first. The value keeps the array whose identity is the
# key alive, so that the identity stays its own.
_MEMORY: OrderedDict[tuple[Any, ...], tuple[Any, Any]] = OrderedDict()
_MOST_REMEMBERED = 64


def _remembered(lowered: LoweredMask, device: torch.device, what: Any, make: Callable[[], Any]) -> Any:
    assert lowered.ranges is not None
    array = lowered.ranges.starts
    key = (id(array), device, what)
    if key in _MEMORY:
        _MEMORY.move_to_end(key)
        return _MEMORY[key][1]
    made = make()
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return made  # what a graph's memory holds is only there while the graph runs
        torch.cuda.current_stream(device).synchronize()  # once: later calls may come from other streams
    _MEMORY[key] = (array, made)
    if len(_MEMORY) > _MOST_REMEMBERED:
        _MEMORY.popitem(last=False)
    return made
