"""Sliding windows: a query sees the keys near its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..._arrays import Array
from ..algebra import Mask
from ..ranges import Ranges, from_bounds
from ..site import Site
from .positions import Align, as_operand, at_batch, check_alignment, check_site, edge_of, is_integer, rows_of


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """See `window`."""

    left: int | None
    right: int | None
    align: Align | None
    offset: Array | int | None
    arrays: ClassVar[tuple[str, ...]] = ("offset",)

    def check(self, site: Site) -> None:
        check_site("window", site, self.align, self.offset)

    def extent(self) -> tuple[int, int]:
        return rows_of(self.offset), 1

    def _edges(self, site: Site) -> tuple[Array | int | None, Array | int | None]:
        """Start and stop of query 0's window on the key axis, None where unbounded."""
        start = None if self.left is None else edge_of(site, self.align, self.offset, -self.left)
        stop = None if self.right is None else edge_of(site, self.align, self.offset, self.right + 1)
        return start, stop

    def ranges(self, site: Site) -> Ranges:
        rows, (start, stop) = site.rows(), self._edges(site)
        return from_bounds(
            site,
            0 * rows if start is None else rows + start,
            0 * rows + site.k_len if stop is None else rows + stop,
        )

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        start, stop = self._edges(site)
        seen = (j >= 0) & (i >= 0)
        seen = seen if start is None else seen & (j >= i + at_batch(start, b))
        return seen if stop is None else seen & (j < i + at_batch(stop, b))

    def diagonal(self, site: Site) -> int | None:
        if self.left is not None or self.right is None:
            return None
        edge = edge_of(site, self.align, self.offset, self.right)
        return edge if isinstance(edge, int) else None

    def describe(self) -> str:
        place = f', "{self.align}"' if self.align else ""
        place = place if self.offset is None else f", offset={self.offset if isinstance(self.offset, int) else '…'}"
        return f"window({self.left}, {self.right}{place})"


def window(
    left: int | None, right: int | None = None, align: Align | None = None, *, offset: Array | int | None = None
) -> Mask:
    """Query i, standing at p = i + offset on the key axis, sees key j iff p - left <= j <= p + right.

    Args:
        left, right: keys seen before and after the query's own position, both inclusive; None is unbounded.
        align, offset: where query 0 stands, as for `causal`.

    Raises:
        ValueError: a negative width, unknown `align`, or both "end" and an offset.
        TypeError: a width that is no int, or an `offset` that is not of integers.
    """
    for argument, width in (("left", left), ("right", right)):
        if width is None:
            continue
        if not is_integer(width):
            raise TypeError(f"{argument}: window() got {type(width).__name__}, expected an int or None")
        if width < 0:
            raise ValueError(f"{argument}: window() got {width}, expected 0 or more keys, or None for unbounded")
    offset = as_operand("offset", offset)
    check_alignment("window", align, offset)
    return Window(as_operand("left", left), as_operand("right", right), align, offset)
