"""A boolean array as a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..._arrays import Array, as_array, dtype_name, family_of
from ..algebra import Mask
from ..site import Site


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """See `dense`."""

    array: Array
    arrays: ClassVar[tuple[str, ...]] = ("array",)

    def check(self, site: Site) -> None:
        shape, full = tuple(self.array.shape), (site.batch, site.heads, site.q_len, site.k_len)
        fits = len(shape) <= 4 and all(s in (1, f) for s, f in zip(shape[::-1], full[::-1], strict=False))
        if not fits:
            raise ValueError(
                f"mask: the boolean array has shape {shape}, which does not broadcast to (B, H, Sq, Sk) = {full}"
            )

    def extent(self) -> tuple[int, int]:
        batch, heads, _, _ = (1, 1, 1, 1, *self.array.shape)[-4:]
        return batch, heads

    def four(self, site: Site) -> Array:
        """The caller's array in place, with leading axes of size 1 up to four: (B', H', Sq', Sk')."""
        array = site.array(self.array)
        return array.reshape((1,) * (4 - array.ndim) + tuple(array.shape)) if array.ndim < 4 else array

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        array = self.four(site)
        places = zip((b, h, i, j), array.shape, strict=True)
        return array[tuple(place if size > 1 else 0 * place for place, size in places)]

    def describe(self) -> str:
        return f"dense({'x'.join(map(str, self.array.shape))})"


def dense(array: Array) -> Mask:
    """Query i sees key j iff array[b, h, i, j]. The array is read in place, through its strides, and never copied.

    Args:
        array: booleans that broadcast to (B, Hq, Sq, Sk) by NumPy's rule, so 2-D is (Sq, Sk).

    Raises:
        TypeError: not a boolean array; a float array that is added to the scores is a bias. ValueError: lists of
            unequal lengths.
    """
    array = as_array("mask", np.asarray(array) if isinstance(array, bool | np.bool_) else array)
    if family_of(array) is None:
        raise TypeError(
            f"mask: got {type(array).__name__}, expected a mask such as tilewise.causal() or a boolean array"
        )
    if dtype_name(array) != "bool":
        hint = "; an array to be added to the scores goes to bias=" if "float" in dtype_name(array) else ""
        raise TypeError(f"mask: got an array of dtype {dtype_name(array)}, expected bool (True = attend){hint}")
    return Dense(array)
