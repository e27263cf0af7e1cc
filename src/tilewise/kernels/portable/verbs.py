"""The few verbs in which NumPy and torch differ, so that the kernel has one body.

Functions that both modules have under one name and order of arguments (`exp`, `where`, `maximum`, `amax`, `flip`, …)
are called on `verbs.xp` itself.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..._arrays import Array, family_of, is_abstract
from .products import visible_pairs, visible_sum


class NumpyVerbs:
    """NumPy's verbs for one accumulator dtype."""

    xp: Any = np
    known = True  # whether decisions may depend on values

    def __init__(self, accumulator: str) -> None:
        self.dtype = np.dtype(accumulator)

    def quiet(self) -> AbstractContextManager:
        """Context of all arithmetic: NaN, inf and underflow are data here, not mistakes to warn of."""
        return np.errstate(all="ignore")

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Zeros of the accumulator's dtype."""
        return np.zeros(shape, self.dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory of a dtype."""
        return np.empty(shape, dtype)

    def cast(self, array: Array) -> Array:
        """The accumulator's dtype; contiguous, since matmul on other strides does not reach the BLAS."""
        return np.ascontiguousarray(array, self.dtype)

    def to(self, array: Array, dtype: Any) -> Array:
        """Another dtype, rounding once."""
        return array.astype(dtype, copy=False)

    def facts(self, array: Array) -> Array:
        """A fact of the mask as an array of this framework, on the device of q."""
        return array

    def arange(self, start: int, stop: int) -> Array:
        """Positions, int64."""
        return np.arange(start, stop, dtype=np.int64)

    def windows(self, band: Array, width: int) -> Array:
        """All runs of `width` elements of the last axis, (…, runs, width); a view."""
        return sliding_window_view(band, width, axis=-1)

    def pairs(self, x: Array, y: Array, visible: Array) -> Array:
        """x (…, M, D), y (…, N, D): their products (…, M, N) where visible, else 0."""
        return visible_pairs(np, x, y, visible)

    def spread(self, a: Array, y: Array, visible: Array) -> Array:
        """a (…, M, N), y (…, N, D): the sum over visible n of a[m, n] y[n]."""
        return visible_sum(np, a, y, visible)


class TorchVerbs:
    """torch's verbs for one accumulator dtype and device; see `NumpyVerbs` for what each does."""

    def __init__(self, accumulator: str, device: Any, known: bool) -> None:
        self.xp = sys.modules["torch"]
        self.dtype, self.device, self.known = getattr(self.xp, accumulator), device, known

    def quiet(self) -> AbstractContextManager:
        # An autocast region of the caller would round the accumulator's products to its own dtype.
        kind = self.device.type
        return self.xp.autocast(kind, enabled=False) if self.xp.amp.is_autocast_available(kind) else nullcontext()

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.xp.empty(shape, dtype=dtype, device=self.device)

    def cast(self, array: Array) -> Array:
        return array.to(self.dtype)

    def to(self, array: Array, dtype: Any) -> Array:
        return array.to(dtype)

    def facts(self, array: Array) -> Array:
        if family_of(array) == "numpy":
            # A copy: facts are often read-only broadcasts, of which torch cannot make tensors.
            array = self.xp.from_numpy(np.array(array))
        return array.to(self.device)

    def arange(self, start: int, stop: int) -> Array:
        return self.xp.arange(start, stop, dtype=self.xp.int64, device=self.device)

    def windows(self, band: Array, width: int) -> Array:
        return band.unfold(-1, width, 1)

    def pairs(self, x: Array, y: Array, visible: Array) -> Array:
        from .torch_products import VisiblePairs  # imports torch, which NumPy users may not have

        return VisiblePairs.apply(x, y, visible)

    def spread(self, a: Array, y: Array, visible: Array) -> Array:
        from .torch_products import VisibleSum

        return VisibleSum.apply(a, y, visible)


Verbs = NumpyVerbs | TorchVerbs


def _recorded(array: Array) -> bool:
    """Whether a CUDA graph is being recorded, when no value can be looked at."""
    return array.is_cuda and sys.modules["torch"].cuda.is_current_stream_capturing()


def verbs_for(array: Array, accumulator: str) -> Verbs:
    """The verbs of the framework of `array`."""
    if family_of(array) == "torch":
        return TorchVerbs(accumulator, array.device, known=not (is_abstract(array) or _recorded(array)))
    return NumpyVerbs(accumulator)
