"""A mask becomes at most three facts: ranges, labels, bits. Kernels understand these and nothing else.

All three hold at once: a pair is visible iff it lies in the row's ranges, and its labels agree, and its bit is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any, ClassVar

import numpy as np

from .._arrays import Array
from ..problem import MaskFacts
from .algebra import And, Mask, Not, Or
from .primitives import Predicate
from .primitives.dense import Dense
from .ranges import MOST_RANGES, Ranges, complement, intersect, sees_everything, union
from .site import Site

TILE = 64  # queries and keys in a tile of bits: one 64-bit word per key


@dataclass(frozen=True, slots=True, eq=False)
class TileBits:
    """The third fact, for the query rows [q_start, q_stop): tiles of 64 x 64 pairs, stored only where mixed.

    Attributes:
        index: (B', H', nq, nk) int32; -1 the tile is empty, -2 it is full, else the number of its stored bits.
        words: (n, 64) uint64; bit r of words[t, c] says that query r of tile t sees key c of it.
        q_start: the query row of the first tile row, a multiple of 64; q_stop: the row after the last.
    """

    index: np.ndarray
    words: np.ndarray
    q_start: int
    q_stop: int


@dataclass(frozen=True, slots=True, eq=False)
class LoweredMask:
    """The facts of one mask at one site, as arrays.

    Attributes:
        site: the sizes it was lowered for.
        ranges: key intervals per row, or None when every row may see every key.
        q_labels, k_labels: (B', H', Sq) and (B', H', Sk) integers, or None.
        dense: the caller's own boolean array (B', H', Sq', Sk') in place, each axis 1 or full, or None.
        lazy: what is left of the mask, to be evaluated element by element, or None. At most one of `dense` and `lazy`
            is given: together they are the bits.
        text: the mask as it is written.
        diagonal: c where the ranges are exactly j <= i + c for query i and key j, and nothing else holds; else None.
    """

    site: Site
    ranges: Ranges | None = None
    q_labels: Array | None = None
    k_labels: Array | None = None
    dense: Array | None = None
    lazy: Mask | None = None
    text: str = "none"
    diagonal: int | None = None

    @property
    def facts(self) -> MaskFacts:
        """The structure without the arrays, for the problem."""
        arrays = (self.ranges.starts if self.ranges else None, self.q_labels, self.k_labels, self.dense)
        shapes = [array.shape for array in arrays if array is not None]
        lazy = self.lazy is not None
        return MaskFacts(
            text=self.text,
            ranges=self.ranges.count if self.ranges else 0,
            labels=self.q_labels is not None,
            bits="dense" if self.dense is not None else "lazy" if lazy else None,
            heads=lazy or any(shape[1] > 1 for shape in shapes),
            batch=lazy or any(shape[0] > 1 for shape in shapes),
            known=self.site.concrete,
            diagonal=self.diagonal,
        )

    @property
    def trivial(self) -> bool:
        """True when every row sees every key."""
        return self.ranges is None and self.q_labels is None and self.dense is None and self.lazy is None

    def visible(self, rows: slice, keys: slice, batch: slice = slice(None), heads: slice = slice(None)) -> Array | None:
        """Visibility of one tile, (B', H', rows, keys) booleans with B', H' 1 where it is the same for all; None = all.

        The slices must be plain (start and stop inside the sizes, no step).
        """
        if self.trivial:
            return None
        xp, parts = self.site.xp, []
        b, h, i, j = self._positions(rows, keys, batch, heads)
        if self.ranges is not None:
            starts, stops = (
                cut(side, batch, heads)[:, :, rows, None, :] for side in (self.ranges.starts, self.ranges.stops)
            )
            inside = [(j >= starts[..., r]) & (j < stops[..., r]) for r in range(self.ranges.count)]
            parts.append(reduce(lambda x, y: x | y, inside))
        if self.q_labels is not None and self.k_labels is not None:
            q_labels, k_labels = cut(self.q_labels, batch, heads), cut(self.k_labels, batch, heads)
            parts.append(q_labels[:, :, rows, None] == k_labels[:, :, None, keys])
        if self.dense is not None:
            seen = cut(self.dense, batch, heads)
            seen = seen[:, :, rows] if seen.shape[2] > 1 else seen
            parts.append(seen[:, :, :, keys] if seen.shape[3] > 1 else seen)
        if self.lazy is not None:
            parts.append(self.lazy.visible(self.site, b, h, i, j))
        answer = reduce(lambda x, y: x & y, parts)
        return xp.broadcast_to(answer, (*answer.shape[:2], i.shape[2], j.shape[3]))

    def _positions(self, rows: slice, keys: slice, batch: slice, heads: slice) -> Iterator[Array]:
        """b, h, i, j of a tile as 4-D arrays that broadcast against each other."""
        xp, site = self.site.xp, self.site
        sizes = (site.batch, site.heads, site.q_len, site.k_len)
        for axis, (part, size) in enumerate(zip((batch, heads, rows, keys), sizes, strict=True)):
            start, stop, _ = part.indices(size)
            shape = [1, 1, 1, 1]
            shape[axis] = stop - start
            yield xp.arange(start, stop, dtype=xp.int64 if site.family == "torch" else site.index).reshape(*shape)

    def tile_bits(self, q_start: int, q_stop: int) -> TileBits:
        """The lazy part, evaluated on the rows [q_start, q_stop) and packed; needs concrete operands and a lazy part.

        Tiles outside the ranges are taken as empty, unseen: no kernel reads their bits.
        """
        from .tiles import pack  # packing needs classification, which needs this module

        return pack(self, q_start, q_stop)


@dataclass(frozen=True, slots=True)
class _Facts:
    """A conjunction under construction; `bits` are parts still to be evaluated element by element."""

    ranges: Ranges | None = None
    labels: tuple[Array, Array] | None = None
    bits: tuple[Mask, ...] = ()

    @property
    def only_ranges(self) -> bool:
        return self.labels is None and not self.bits


def lower(mask: Mask | None, site: Site) -> LoweredMask:
    """Lower a mask for the sizes of a call.

    Costs O(Sq + Sk) for everything but dense arrays (left in place) and predicates (left to be evaluated by tile).

    Raises:
        ValueError, TypeError: beginning with "mask:", when an operand does not fit the sizes.
    """
    if mask is None:
        return LoweredMask(site)
    mask.check(site)
    if mask.operands() or any(isinstance(leaf, Predicate) for leaf in mask.primitives()):
        return _lower(mask, site)
    # A mask without operands is the same for all heads, batch rows and frameworks: model layers share one lowering.
    shared = _lower_symbolic(mask, site.q_len, site.k_len)
    return replace(shared, site=site if site.concrete else replace(site, concrete=True))


@lru_cache(maxsize=16)
def _lower_symbolic(mask: Mask, q_len: int, k_len: int) -> LoweredMask:
    lowered = _lower(mask, Site(1, 1, q_len, k_len))
    if lowered.ranges is not None:
        for bounds in (lowered.ranges.starts, lowered.ranges.stops):
            bounds.flags.writeable = False
    return lowered


def _lower(mask: Mask, site: Site) -> LoweredMask:
    facts = _facts(mask, site)
    ranges = facts.ranges
    if ranges is not None and sees_everything(site, ranges):
        ranges = None
    q_labels, k_labels = facts.labels or (None, None)
    dense, lazy = None, None
    if len(facts.bits) == 1 and isinstance(facts.bits[0], Dense):
        dense = facts.bits[0].four(site)
    elif facts.bits:
        lazy = facts.bits[0] if len(facts.bits) == 1 else And(facts.bits)
    diagonal = mask.diagonal(site) if ranges is not None else None
    return LoweredMask(site, ranges, q_labels, k_labels, dense, lazy, str(mask), diagonal)


def _facts(mask: Mask, site: Site) -> _Facts:
    match mask:
        case And():
            return reduce(lambda a, b: _both(site, a, b), (_facts(part, site) for part in mask.parts))
        case Or():
            return _either(site, mask, [_facts(part, site) for part in mask.parts])
        case Not(Not(part)):
            return _facts(part, site)
        case Not(And(parts)):
            return _facts(Or(tuple(Not(part) for part in parts)), site)
        case Not(Or(parts)):
            return _facts(And(tuple(Not(part) for part in parts)), site)
        case Not(part):
            facts = _facts(part, site)
            return (
                _within(site, mask, complement(site, facts.ranges))
                if facts.only_ranges and facts.ranges
                else _Facts(bits=(mask,))
            )
    ranges = mask.ranges(site)
    if ranges is not None:
        return _within(site, mask, ranges)
    labels = mask.labels(site)
    return _Facts(labels=labels) if labels is not None else _Facts(bits=(mask,))


def _within(site: Site, mask: Mask, ranges: Ranges) -> _Facts:
    """Ranges if there are few enough; else their hull, to skip tiles by, with the mask itself as bits."""
    if ranges.count <= MOST_RANGES:
        return _Facts(ranges)
    xp = site.xp
    last = xp.where(ranges.stops > ranges.starts, ranges.stops, 0 * ranges.stops)
    stop = reduce(xp.maximum, (last[..., r : r + 1] for r in range(ranges.count)))
    start = ranges.starts[..., :1]
    return _Facts(Ranges(start, xp.maximum(start, stop)), bits=(mask,))


def _both(site: Site, a: _Facts, b: _Facts) -> _Facts:
    labels, bits = a.labels or b.labels, a.bits + b.bits
    if a.labels is not None and b.labels is not None:
        labels, both = _label_pairs(site, a.labels, b.labels)
        bits += both
    ranges = a.ranges or b.ranges
    if a.ranges is not None and b.ranges is not None:
        met = intersect(site, a.ranges, b.ranges)
        if met.count > MOST_RANGES:
            # Exact in two steps: one side stays as ranges, the other is asked element by element.
            return _Facts(a.ranges, labels, (*bits, _Inside(b.ranges.starts, b.ranges.stops)))
        ranges = met
    return _Facts(ranges, labels, bits)


def _either(site: Site, mask: Or, parts: list[_Facts]) -> _Facts:
    if all(part.only_ranges and part.ranges for part in parts):
        return _within(
            site, mask, reduce(lambda a, b: union(site, a, b), (part.ranges for part in parts if part.ranges))
        )
    return _Facts(bits=(mask,))


def _label_pairs(site: Site, a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Any, tuple[Mask, ...]]:
    """Two label equalities as one, by numbering the pairs of labels that occur."""
    if not site.concrete:
        return a, (_SameLabel(*b),)
    # One number per pair: labels are small and consecutive where they can be looked at, so the product cannot overflow.
    span = 1 + max((int(label.max()) for label in b if label.size), default=0)
    q, k = (x.astype(np.int64) * span + y for x, y in zip(a, b, strict=True))
    numbers = np.unique(np.concatenate([q.ravel(), k.ravel()]), return_inverse=True)[1].astype(np.int32).ravel()
    return (numbers[: q.size].reshape(q.shape), numbers[q.size :].reshape(k.shape)), ()


@dataclass(frozen=True, eq=False)
class _Inside(Mask):
    """Ranges asked element by element."""

    starts: Array
    stops: Array
    arrays: ClassVar[tuple[str, ...]] = ("starts", "stops")

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        starts, stops = (_at(site.array(side), b, h, i) for side in (self.starts, self.stops))
        return ((j[..., None] >= starts) & (j[..., None] < stops)).any(-1)


@dataclass(frozen=True, eq=False)
class _SameLabel(Mask):
    """Label equality asked element by element."""

    q: Array
    k: Array
    arrays: ClassVar[tuple[str, ...]] = ("q", "k")

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        return _at(site.array(self.q), b, h, i) == _at(site.array(self.k), b, h, j)


def _at(array: Array, b: Array, h: Array, position: Array) -> Array:
    """array (B', H', S, …) at 4-D positions."""
    return array[_place(array, b, 0), _place(array, h, 1), position]


def _place(array: Array, position: Array, axis: int) -> Array:
    return position if array.shape[axis] > 1 else 0 * position


def cut(array: Array, batch: slice, heads: slice) -> Array:
    """Slice the two leading axes where they are not broadcast."""
    array = array[batch] if array.shape[0] > 1 else array
    return array[:, heads] if array.shape[1] > 1 else array
