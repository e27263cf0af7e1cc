"""Any key intervals per query row, given as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..._arrays import Array, as_array
from ..algebra import Mask
from ..ranges import Ranges, from_bounds
from ..site import Site
from .positions import check_integers


@dataclass(frozen=True, eq=False)
class Intervals(Mask):
    """See `intervals`."""

    starts: Array
    stops: Array
    arrays: ClassVar[tuple[str, ...]] = ("starts", "stops")

    def check(self, site: Site) -> None:
        for name, bounds in (("starts", self.starts), ("stops", self.stops)):
            shape = tuple(bounds.shape)
            leading = {3: shape[:1], 4: shape[:2]}.get(len(shape), ())
            rows = shape[len(leading)] if len(shape) in (1, 2, 3, 4) else None
            if rows != site.q_len or any(
                s not in (1, f) for s, f in zip(leading, (site.batch, site.heads), strict=False)
            ):
                raise ValueError(
                    f"mask: intervals({name}) has shape {shape}, expected (Sq,), (Sq, R), (B, Sq, R) or (B, H, Sq, R)"
                    f" with Sq = {site.q_len}, B = {site.batch} or 1, H = {site.heads} or 1"
                )

    def extent(self) -> tuple[int, int]:
        shape = tuple(self.starts.shape)
        return shape[0] if len(shape) > 2 else 1, shape[1] if len(shape) > 3 else 1

    def _bounds(self, site: Site) -> tuple[Array, Array]:
        return _four(site.integers(self.starts)), _four(site.integers(self.stops))

    def ranges(self, site: Site) -> Ranges:
        if not self.starts.shape[-1]:
            return from_bounds(site, 0 * site.rows(), 0 * site.rows())  # no interval: nothing is seen
        return from_bounds(site, *self._bounds(site))

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        starts, stops = (_at(bounds, b, h, i) for bounds in self._bounds(site))
        return ((j[..., None] >= starts) & (j[..., None] < stops)).any(-1)


def intervals(starts: Array, stops: Array) -> Mask:
    """Query i sees key j iff starts[i, r] <= j < stops[i, r] for some r.

    Args:
        starts, stops: integers of one shape: (Sq,), (Sq, R), (B, Sq, R) or (B, Hq, Sq, R), where B and Hq may be 1.
            Intervals of a row may overlap, stand in any order, be empty, or reach beyond the keys.

    Raises:
        ValueError: shapes that differ, lists of unequal lengths. TypeError: not integers.
    """
    starts, stops = as_array("starts", starts), as_array("stops", stops)
    check_integers("starts", "intervals()", starts)
    check_integers("stops", "intervals()", stops)
    shapes = [tuple(getattr(side, "shape", ())) for side in (starts, stops)]  # torch's compiler cannot follow np.shape
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"stops: intervals() got shape {shapes[1]}, expected that of starts, {shapes[0]}, with a query axis"
        )
    return Intervals(starts, stops)


def _four(bounds: Array) -> Array:
    """(Sq,), (Sq, R), (B, Sq, R) or (B, H, Sq, R) as (B', H', Sq, R)."""
    if bounds.ndim == 1:
        return bounds[None, None, :, None]
    if bounds.ndim == 3:
        return bounds[:, None]
    return bounds if bounds.ndim == 4 else bounds[None, None]


def _at(bounds: Array, b: Array, h: Array, i: Array) -> Array:
    """bounds (B', H', Sq, R) at 4-D positions: broadcast shape of (b, h, i), with R last."""
    return bounds[b if bounds.shape[0] > 1 else 0 * b, h if bounds.shape[1] > 1 else 0 * h, i]
