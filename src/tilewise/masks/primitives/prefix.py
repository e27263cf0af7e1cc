"""Prefix masks: the first keys, for every query (prefix language models, attention sinks made of tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..._arrays import Array
from ..algebra import Mask
from ..ranges import Ranges, from_bounds
from ..site import Site
from .positions import as_operand, at_batch, check_integers, check_per_batch, per_batch, rows_of


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """See `prefix`."""

    n: Array | int
    arrays: ClassVar[tuple[str, ...]] = ("n",)

    def check(self, site: Site) -> None:
        check_per_batch("prefix(n)", site, self.n)

    def extent(self) -> tuple[int, int]:
        return rows_of(self.n), 1

    def ranges(self, site: Site) -> Ranges:
        zero = 0 * site.rows()
        return from_bounds(site, zero, zero + per_batch(site, self.n))

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        return j < at_batch(per_batch(site, self.n), b)

    def describe(self) -> str:
        return f"prefix({self.n if isinstance(self.n, int) else '…'})"


def prefix(n: Array | int) -> Mask:
    """Every query sees the keys j < n; `causal() | prefix(n)` is a prefix language model.

    Args:
        n: an int, or an integer array with one per batch row, (B,).

    Raises:
        ValueError: a negative int. TypeError: not integers.
    """
    n = as_operand("n", n)
    check_integers("n", "prefix()", n)
    if isinstance(n, int) and n < 0:
        raise ValueError(f"n: prefix() got {n}, expected 0 or more keys")
    return Prefix(n)
