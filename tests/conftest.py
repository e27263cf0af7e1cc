"""What holds for every test: how hard hypothesis searches, and that fresh memory is loud."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Compilation and shared machines make single examples slow without making them wrong.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", max_examples=50, **_COMMON)
settings.register_profile("thorough", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("TILEWISE_HYPOTHESIS", "default"))


@pytest.fixture
def loud_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN, so that an element nobody wrote is seen."""
    _fill(monkeypatch, np, ("empty", "empty_like"), lambda array: _floating(array.dtype))
    torch = sys.modules.get("torch")
    if torch is not None:
        _fill(monkeypatch, torch, ("empty", "empty_like", "empty_strided"), lambda tensor: tensor.is_floating_point())
        _fill(monkeypatch, torch.Tensor, ("new_empty",), lambda tensor: tensor.is_floating_point())


def _floating(dtype: np.dtype) -> bool:
    """Whether NaN is a value of it. NumPy counts ml_dtypes' bfloat16 among plain bytes."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def _fill(monkeypatch: pytest.MonkeyPatch, place: Any, names: tuple[str, ...], floating: Callable[[Any], bool]) -> None:
    for name in names:
        make = getattr(place, name)

        @wraps(make)
        def loud(*args: Any, make: Callable[..., Any] = make, **options: Any) -> Any:
            array = make(*args, **options)
            if floating(array):
                array[...] = float("nan")
            return array

        monkeypatch.setattr(place, name, loud)
