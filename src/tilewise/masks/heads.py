"""A call's facts as some of its heads see them, numbered anew from 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .._arrays import Array
from .algebra import Mask
from .lower import LoweredMask
from .ranges import Ranges
from .site import Site


@dataclass(frozen=True, slots=True)
class Heads:
    """The query heads first, first + 1, … of a call: `count` of its `whole`."""

    first: int
    count: int
    whole: int

    def of(self, array: Any, axis: int) -> Any:
        """The heads' part of an array, a view. An axis of size 1 stands for all."""
        if array.shape[axis] == 1 or self.count == self.whole:
            return array
        return array[(slice(None),) * axis + (slice(self.first, self.first + self.count),)]


def mask_heads(lowered: LoweredMask, heads: Heads) -> LoweredMask:
    """The facts of some of the heads. Arrays are views."""
    if heads.count == heads.whole:
        return lowered
    ranges, lazy = lowered.ranges, lowered.lazy

    def of(array: Array | None) -> Array | None:
        return None if array is None else heads.of(array, 1)

    return replace(
        lowered,
        site=replace(lowered.site, heads=heads.count),
        ranges=None if ranges is None else Ranges(heads.of(ranges.starts, 1), heads.of(ranges.stops, 1)),
        q_labels=of(lowered.q_labels),
        k_labels=of(lowered.k_labels),
        dense=of(lowered.dense),
        lazy=None if lazy is None else SomeHeads(lazy, lowered.site, heads),
    )


@dataclass(frozen=True, eq=False)
class SomeHeads(Mask):
    """A mask asked about heads by their numbers in the whole call."""

    part: Mask
    site: Site
    heads: Heads
    arrays: ClassVar[tuple[str, ...]] = ()

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        return self.part.visible(replace(site, heads=self.site.heads), b, h + self.heads.first, i, j)

    def primitives(self) -> Iterator[Mask]:
        yield from self.part.primitives()
