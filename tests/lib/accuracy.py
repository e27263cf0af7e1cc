"""The one statement of how accurate a kernel must be; no test has a tolerance of its own.

Everything is held against the float64 oracle on the same, already rounded, inputs. The error may be as large as a few
times that of plain attention in the same dtype and framework (the yardstick of flash-attention's own tests), plus a
floor for the cases in which the yardstick happens to be exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewise._arrays import dtype_name
from tilewise.kernels.reference.arrays import float64

FORWARD = 2.0, {"float64": 1e-13, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
GRADIENT = 3.0, {"float64": 1e-11, "float32": 3e-5, "float16": 8e-3, "bfloat16": 6e-2}
# lse is float32 for all but float64, and relative: it grows with the scores.
LSE = {"float64": 1e-13, "float32": 4e-6}

_LARGEST = {"float16": 65504.0}


def assert_accurate(name: str, got: Any, exact: Any, plain: Any = None, dtype: str | None = None) -> None:
    """Raise AssertionError unless `got` is as accurate as promised.

    Args:
        name: "out", "lse", or the operand that a gradient belongs to.
        got: the kernel's result, of any framework; exact: the oracle's, float64.
        plain: the same by plain attention in the same dtype and framework; None asks for the floor alone.
        dtype: that of q, k and v, where `got` has another: the gradient to a float64 bias of a float32 call, say.
    """
    assert tuple(got.shape) == tuple(exact.shape), f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    dtype, got, exact = dtype or dtype_name(got), float64(got), float64(exact)
    exact = np.where(np.abs(exact) > _LARGEST.get(dtype, np.inf), np.copysign(np.inf, exact), exact)
    finite = np.isfinite(exact)
    same = np.where(finite, np.isfinite(got), (got == exact) | (np.isnan(got) & np.isnan(exact)))
    assert same.all(), f"{name}: {_places(~same)} hold {got[~same][:4]}, expected {exact[~same][:4]}"
    if not finite.any():
        return
    error = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, exact, 0)), 0)
    if name == "lse":
        limit = LSE[dtype] * np.maximum(1, np.abs(np.where(finite, exact, 0)))
    else:
        factor, floors = FORWARD if name == "out" else GRADIENT
        limit = factor * _yardstick(plain, exact, finite) + floors[dtype] * max(1.0, float(np.abs(exact[finite]).max()))
    worst = error / limit
    assert np.all(worst <= 1), (
        f"{name} ({dtype}): error {error.max():.3g} is {worst.max():.3g} times what is allowed, at {_places(worst > 1)}"
    )


def _yardstick(plain: Any, exact: np.ndarray, finite: np.ndarray) -> float:
    if plain is None:
        return 0.0
    error = np.abs(float64(plain) - np.where(finite, exact, 0))[finite]
    return float(error[np.isfinite(error)].max(initial=0.0))


def _places(wrong: np.ndarray) -> str:
    first = ", ".join(str(tuple(map(int, place))) for place in np.argwhere(wrong)[:3])
    return f"{int(wrong.sum())} of {wrong.size} elements ({first}, …)"
