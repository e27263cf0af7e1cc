"""Arrays of any framework into float64 and back, for the reference kernel alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..._arrays import Array, family_of


def float64(array: Array) -> np.ndarray:
    """A NumPy float64 copy or view of an array of any framework, dtype and device."""
    if family_of(array) == "torch":
        # Through torch's own cast: NumPy has no bfloat16, and may not share memory with other devices.
        array = array.detach().to("cpu", sys.modules["torch"].float64)
    return np.asarray(array).astype(np.float64, copy=False)


def like(value: np.ndarray, example: Array, dtype: Any = None) -> Array:
    """`value` as an array of the framework, dtype (or `dtype`, a name) and device of `example`."""
    with np.errstate(over="ignore", invalid="ignore"):
        if family_of(example) == "torch":
            torch = sys.modules["torch"]
            kind = example.dtype if dtype is None else getattr(torch, dtype)
            return torch.from_numpy(np.ascontiguousarray(value)).to(example.device, kind)
        kind = example.dtype if dtype is None else np.dtype(dtype)
        if family_of(example) == "jax":
            return sys.modules["jax"].numpy.asarray(value.astype(kind))
        return value.astype(kind)
