"""Causal masks: a query sees the keys up to its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..._arrays import Array
from ..algebra import Mask
from ..ranges import Ranges, from_bounds
from ..site import Site
from .positions import Align, as_operand, at_batch, check_alignment, check_site, edge_of, rows_of


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """See `causal`."""

    align: Align | None
    offset: Array | int | None
    arrays: ClassVar[tuple[str, ...]] = ("offset",)

    def check(self, site: Site) -> None:
        check_site("causal", site, self.align, self.offset)

    def extent(self) -> tuple[int, int]:
        return rows_of(self.offset), 1

    def ranges(self, site: Site) -> Ranges:
        stops = site.rows() + edge_of(site, self.align, self.offset, 1)
        return from_bounds(site, 0 * stops, stops)

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        return j < i + at_batch(edge_of(site, self.align, self.offset, 1), b)

    def diagonal(self, site: Site) -> int | None:
        edge = edge_of(site, self.align, self.offset, 0)
        return edge if isinstance(edge, int) else None

    def describe(self) -> str:
        if self.offset is not None:
            return f"causal(offset={self.offset if isinstance(self.offset, int) else '…'})"
        return f'causal("{self.align}")' if self.align else "causal()"


def causal(align: Align | None = None, *, offset: Array | int | None = None) -> Mask:
    """Query i sees key j iff j <= i + offset.

    Args:
        align: "start" puts query 0 at key 0 (offset 0); "end" puts the last query at the last key (offset Sk - Sq).
            None is allowed only where Sq = Sk, since both mean the same there.
        offset: position of query 0 on the key axis instead, an int or an integer array with one per batch row, (B,).

    Raises:
        ValueError: unknown `align`, or both "end" and an offset. At the call: no alignment where Sq != Sk.
        TypeError: `offset` is not of integers.
    """
    offset = as_operand("offset", offset)
    check_alignment("causal", align, offset)
    return Causal(align, offset)
