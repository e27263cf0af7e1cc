"""Where a mask is asked: the sizes of the problem, and the array namespace to answer in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._arrays import Array, Family, dtype_name, is_device_array, namespace, to_numpy

_NARROW = ("int8", "int16", "uint8", "uint16")
_UNSIGNED = ("uint32", "uint64")


@dataclass(frozen=True, slots=True)
class Site:
    """Sizes B, Hq, Sq, Sk, and the namespace in which a mask's facts are computed.

    Attributes:
        batch, heads, q_len, k_len: B, Hq, Sq, Sk.
        family: framework of q, k, v; user predicates are called with its arrays.
        concrete: True when every operand's values can be looked at. Facts are then NumPy arrays, and may be simplified
            by looking; else they are arrays of `family` on `device`, with shapes that follow from the structure alone.
        device: torch device of the facts when not concrete.
    """

    batch: int
    heads: int
    q_len: int
    k_len: int
    family: Family = "numpy"
    concrete: bool = True
    device: Any = None

    @property
    def xp(self) -> Any:
        """The namespace the facts are computed in."""
        return np if self.concrete else namespace(self.family, self.device)

    @property
    def index(self) -> Any:
        """Integer dtype of positions: int32 while sums of a few positions and offsets fit, else int64."""
        wide = 8 * (self.q_len + self.k_len) >= 2**31
        return self.xp.int64 if wide else self.xp.int32

    def integers(self, value: Array, bound: int | None = None) -> Array:
        """An operand as an array of positions, clipped to -bound … bound.

        The bound is Sq + Sk unless given: beyond it no pair is told apart, and sums of two stay representable.
        """
        bound = self.q_len + self.k_len if bound is None else bound
        array, xp = self.array(value), self.xp
        if dtype_name(array) in _NARROW:
            array = xp.asarray(array, dtype=self.index)  # the bound itself may not fit 8 or 16 bits
        if dtype_name(array) in _UNSIGNED:
            return xp.asarray(xp.minimum(array, bound), dtype=self.index)
        return xp.asarray(xp.minimum(xp.maximum(array, -bound), bound), dtype=self.index)

    def array(self, value: Array) -> Array:
        """An operand in this namespace, dtype kept; in place where possible."""
        return to_numpy(value) if self.concrete else self.xp.asarray(value)

    def rows(self) -> Array:
        """Query positions 0 … Sq - 1 as (1, 1, Sq, 1), the shape of one bound per row."""
        return self.xp.arange(self.q_len, dtype=self.index).reshape(1, 1, -1, 1)


def site_for(family: Family, device: Any, sizes: tuple[int, int, int, int], operands: list[Array]) -> Site:
    """The site of a call: concrete unless an operand of the mask is a tracer, a fake tensor or off the CPU."""
    concrete = not any(is_device_array(operand) for operand in operands)
    return Site(*sizes, family=family, concrete=concrete, device=None if concrete else device)
