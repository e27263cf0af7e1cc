"""Up to R half-open key intervals per query row, and their intersection, union and complement.

Everything is a handful of array operations over (B', H', Sq, R), so it costs O(Sq) for symbolic masks and works on
traced arrays. Invariants kept by every function: the intervals of a row are disjoint, inside [0, Sk], sorted by start,
and empty ones stand last as [Sk, Sk).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._arrays import Array
from .site import Site

MOST_RANGES = 4  # R beyond this becomes bits: kernels keep a row's bounds in registers


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """starts, stops: (B or 1, H or 1, Sq, R); row i sees the keys j with starts[..., i, r] <= j < stops[..., i, r]."""

    starts: Array
    stops: Array

    @property
    def count(self) -> int:
        """R, the number of intervals a row may have."""
        return self.starts.shape[-1]


def from_bounds(site: Site, starts: Array, stops: Array) -> Ranges:
    """Ranges from any interval bounds, (B', H', Sq, R): they may overlap, be unsorted, reversed or reach outside."""
    xp = site.xp
    starts, stops = xp.minimum(xp.maximum(starts, 0), site.k_len), xp.minimum(xp.maximum(stops, 0), site.k_len)
    return _normalise(site, *_broadcast(site, starts, stops))


def everything(site: Site) -> Ranges:
    """Every row sees every key."""
    shape = (1, 1, site.q_len, 1)
    return Ranges(site.xp.full(shape, 0, dtype=site.index), site.xp.full(shape, site.k_len, dtype=site.index))


def intersect(site: Site, a: Ranges, b: Ranges) -> Ranges:
    """Keys in both. Two disjoint lists of lengths m and n meet in at most m + n - 1 intervals."""
    xp = site.xp
    starts = xp.maximum(a.starts[..., :, None], b.starts[..., None, :])
    stops = xp.minimum(a.stops[..., :, None], b.stops[..., None, :])
    flat = (*starts.shape[:-2], a.count * b.count)
    ranges = _sorted(site, starts.reshape(flat), stops.reshape(flat))
    most = min(flat[-1], a.count + b.count - 1)
    return _trim(site, Ranges(ranges.starts[..., :most], ranges.stops[..., :most]))


def union(site: Site, a: Ranges, b: Ranges) -> Ranges:
    """Keys in either."""
    xp = site.xp
    leading = np.broadcast_shapes(a.starts.shape[:-1], b.starts.shape[:-1])

    def spread(array: Array) -> Array:
        return xp.broadcast_to(array, (*leading, array.shape[-1]))

    starts = xp.concatenate([spread(a.starts), spread(b.starts)], -1)
    stops = xp.concatenate([spread(a.stops), spread(b.stops)], -1)
    return _normalise(site, starts, stops)


def complement(site: Site, a: Ranges) -> Ranges:
    """Keys in none of a row's intervals: the gaps before, between and after them."""
    xp = site.xp
    edge = a.starts[..., :1]
    gap_starts = xp.concatenate([0 * edge, a.stops], -1)
    gap_stops = xp.concatenate([a.starts, 0 * edge + site.k_len], -1)
    return _trim(site, _sorted(site, gap_starts, gap_stops))


def sees_everything(site: Site, a: Ranges) -> bool:
    """True when it is known that every row sees every key. Needs values, so never true for traced ranges."""
    return bool(site.concrete and np.all((a.stops - a.starts).sum(-1, dtype=np.int64) == site.k_len))


def _broadcast(site: Site, a: Array, b: Array) -> tuple[Array, Array]:
    shape = np.broadcast_shapes(a.shape, b.shape)
    return site.xp.broadcast_to(a, shape), site.xp.broadcast_to(b, shape)


def _sorted(site: Site, starts: Array, stops: Array) -> Ranges:
    """Disjoint intervals in order of their starts, empty ones as [Sk, Sk) and therefore last."""
    xp = site.xp
    starts, stops = _broadcast(site, starts, stops)
    empty = stops <= starts
    starts, stops = xp.where(empty, site.k_len, starts), xp.where(empty, site.k_len, stops)
    starts, stops = xp.asarray(starts, dtype=site.index), xp.asarray(stops, dtype=site.index)
    if starts.shape[-1] == 1:
        return Ranges(starts, stops)
    order = xp.argsort(starts, axis=-1)
    return Ranges(xp.take_along_axis(starts, order, -1), xp.take_along_axis(stops, order, -1))


def _normalise(site: Site, starts: Array, stops: Array) -> Ranges:
    """Sort, then merge intervals that overlap or touch, so that none of the invariants depends on the caller."""
    ranges = _sorted(site, starts, stops)
    if ranges.count == 1:
        return ranges
    xp, done = site.xp, []
    start, stop = ranges.starts[..., 0], ranges.stops[..., 0]
    for r in range(1, ranges.count):
        next_start, next_stop = ranges.starts[..., r], ranges.stops[..., r]
        joined = next_start <= stop
        done.append((xp.where(joined, site.k_len, start), xp.where(joined, site.k_len, stop)))
        start, stop = xp.where(joined, start, next_start), xp.where(joined, xp.maximum(stop, next_stop), next_stop)
    done.append((start, stop))
    merged = _sorted(site, xp.stack([s for s, _ in done], -1), xp.stack([e for _, e in done], -1))
    return _trim(site, merged)


def _trim(site: Site, ranges: Ranges) -> Ranges:
    """Drop trailing columns that are empty in every row, when values can be looked at."""
    if not site.concrete or ranges.count == 1:
        return ranges
    used = np.flatnonzero(np.any(ranges.starts < ranges.stops, axis=tuple(range(ranges.starts.ndim - 1))))
    count = int(used[-1]) + 1 if used.size else 1
    return Ranges(ranges.starts[..., :count], ranges.stops[..., :count])
