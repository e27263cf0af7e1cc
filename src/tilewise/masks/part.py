"""A call's facts as a part of it sees them: some of its query rows, some of its keys, numbered anew from 0.

A sequence that is spread over devices is attended to part by part. The facts are lowered once, for the whole call, and
then cut, so every mask and bias means in a part what it means in the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .._arrays import Array
from ..contract import Dropout
from .algebra import Mask
from .lower import LoweredMask
from .ranges import from_bounds
from .site import Site


@dataclass(frozen=True, slots=True)
class Run:
    """The positions start, start + step, … : `count` of them, evenly spaced.

    `start` may be a traced integer (jax); then facts are gathered instead of sliced.
    """

    start: Any
    count: int
    step: int = 1

    def of(self, array: Array, axis: int, xp: Any) -> Array:
        """The run's elements along an axis; a view where `start` is known. An axis of size 1 stands for all."""
        if array.shape[axis] == 1:
            return array
        if isinstance(self.start, int):
            stop = self.start + self.step * self.count
            return array[(slice(None),) * axis + (slice(self.start, stop, self.step),)]
        return xp.take(array, self.start + self.step * xp.arange(self.count), axis)

    def whole(self, place: Array) -> Array:
        """Positions in the run as positions in the whole."""
        return self.start + self.step * place


def mask_part(lowered: LoweredMask, rows: Run, keys: Run) -> LoweredMask:
    """The facts of the queries in `rows` and the keys in `keys`.

    Args:
        lowered: of the whole call, which the runs lie in.

    Returns:
        Facts of a call of `rows.count` queries and `keys.count` keys. Dense arrays are views.
    """
    site = replace(lowered.site, q_len=rows.count, k_len=keys.count)
    xp, ranges = site.xp, lowered.ranges
    if ranges is not None:
        # start + step * n lies in [a, b) iff n lies in [ceil((a - start) / step), ceil((b - start) / step)).
        sides = (rows.of(side, 2, xp) - keys.start for side in (ranges.starts, ranges.stops))
        starts, stops = (side if keys.step == 1 else -(-side // keys.step) for side in sides)
        ranges = from_bounds(site, starts, stops)
        if site.concrete and bool(((ranges.stops - ranges.starts).sum(-1) == keys.count).all()):
            ranges = None
    dense = lowered.dense
    return replace(
        lowered,
        site=site,
        ranges=ranges,
        q_labels=None if lowered.q_labels is None else rows.of(lowered.q_labels, 2, xp),
        k_labels=None if lowered.k_labels is None else keys.of(lowered.k_labels, 2, xp),
        dense=None if dense is None else keys.of(rows.of(dense, 2, xp), 3, xp),
        lazy=None if lowered.lazy is None else Seen(lowered.lazy, lowered.site, rows, keys),
        diagonal=None,  # the whole's is not the part's own
    )


@dataclass(frozen=True, eq=False)
class Seen(Mask):
    """A mask asked at a part's own positions."""

    part: Mask
    site: Site
    rows: Run
    keys: Run
    arrays: ClassVar[tuple[str, ...]] = ()

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        whole = replace(site, q_len=self.site.q_len, k_len=self.site.k_len)
        return self.part.visible(whole, b, h, self.rows.whole(i), self.keys.whole(j))

    def primitives(self) -> Iterator[Mask]:
        yield from self.part.primitives()


def table_part(table: Array, rows: Run, keys: Run, q_len: int, xp: Any) -> Array:
    """A bias over the distance, (…, Sq + Sk - 1) for the whole, as the part has it: (…, rows + keys - 1).

    Raises:
        ValueError: the runs have different steps, so that the bias is none over the part's own distances.
    """
    return table_places(rows, keys, q_len).of(table, table.ndim - 1, xp)


def table_slice(rows: Run, keys: Run, q_len: int) -> slice:
    """Where the part's table stands in the whole one: for sums of gradients."""
    run = table_places(rows, keys, q_len)
    return slice(run.start, run.start + run.step * run.count, run.step)


def table_places(rows: Run, keys: Run, q_len: int) -> Run:
    """The places of the part's table in the whole one.

    Raises:
        ValueError: as `table_part`.
    """
    if rows.step != keys.step:
        raise ValueError(f"keys: step {keys.step}, expected the rows' {rows.step}")
    first = keys.start - rows.start + q_len - 1 - rows.step * (rows.count - 1)
    return Run(first, rows.count + keys.count - 1, rows.step)


def dropout_part(dropout: Dropout, rows: Run, keys: Run, heads: int, q_len: int, k_len: int, head: int = 0) -> Dropout:
    """Dropout that draws for the part what it draws for the whole of Hq heads, Sq queries and Sk keys.

    Args:
        dropout: numbered as a call of its own; rows, keys: with known starts.
        head: number of the part's first query head in the whole.
    """
    first = (head * q_len + rows.start) * k_len + keys.start
    strides = (heads * q_len * k_len, q_len * k_len, rows.step * k_len, keys.step)
    return replace(dropout, first=(first & 0xFFFFFFFF, first >> 32 & 0xFFFFFFFF), strides=strides)
