"""Padding at the end: how many queries and keys of each batch row are real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..._arrays import Array
from ..algebra import Mask, told_apart
from ..ranges import Ranges, from_bounds
from ..site import Site
from .positions import as_operand, at_batch, check_integers, check_per_batch, per_batch, rows_of


@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """See `lengths`."""

    q: Array | int | None
    k: Array | int | None
    arrays: ClassVar[tuple[str, ...]] = ("q", "k")

    def check(self, site: Site) -> None:
        check_per_batch("lengths(q=)", site, self.q)
        check_per_batch("lengths(k=)", site, self.k)

    def extent(self) -> tuple[int, int]:
        return told_apart(rows_of(self.q), rows_of(self.k)), 1

    def ranges(self, site: Site) -> Ranges:
        rows = site.rows()
        stops = 0 * rows + (site.k_len if self.k is None else per_batch(site, self.k))
        if self.q is not None:
            stops = site.xp.where(rows < per_batch(site, self.q), stops, 0 * stops)
        return from_bounds(site, 0 * stops, stops)

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        keys = j < (site.k_len if self.k is None else at_batch(per_batch(site, self.k), b))
        return keys if self.q is None else keys & (i < at_batch(per_batch(site, self.q), b))

    def describe(self) -> str:
        named = (("q", self.q), ("k", self.k))
        given = (f"{name}={value if isinstance(value, int) else '…'}" for name, value in named if value is not None)
        return f"lengths({', '.join(given)})"


def lengths(*, q: Array | int | None = None, k: Array | int | None = None) -> Mask:
    """Queries i >= q see nothing, and keys j >= k are seen by nobody.

    Args:
        q, k: lengths, each an int or an integer array with one per batch row, (B,); None is the full length.

    Raises:
        ValueError: neither is given, or a negative int. TypeError: not integers.
    """
    if q is None and k is None:
        raise ValueError("q: lengths() got neither q nor k, expected at least one")
    q, k = as_operand("q", q), as_operand("k", k)
    for argument, value in (("q", q), ("k", k)):
        if value is not None:
            check_integers(argument, "lengths()", value)
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{argument}: lengths() got {value}, expected 0 or more")
    return Lengths(q, k)
