"""What every further argument is held against: a real number, the framework and the device of q."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from .._arrays import Array, Family, family_of, is_abstract


def real(name: str, value: Any) -> float:
    """A finite real number; the value is part of the plan, so tracers and arrays that vary cannot be taken."""
    # Numbers that torch's compiler leaves open cannot be asked for attributes.
    plain = isinstance(value, float | int) and not isinstance(value, bool)
    if not plain and (
        is_abstract(value)
        or isinstance(value, bool | str | bytes)
        or (getattr(value, "ndim", 0) > 0 and np.size(value) != 1)
    ):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a real number known at the call")
    if not plain and family_of(value) == "torch" and value.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise TypeError(f"{name}: requires a gradient, and a number known at the call has none; detach it")
    try:
        number = float(value).__float__()  # unlike float(), fixes a number that torch's compiler would leave open
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a real number") from None
    except OverflowError:
        raise ValueError(f"{name}: got an integer beyond all floats, expected a finite number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, expected a finite number")
    return number


def check_strided(name: str, array: Array) -> None:
    """Raise TypeError for torch's sparse, nested and opaque tensors, whose numbers do not lie in strides."""
    if family_of(array) != "torch":
        return
    if array.is_nested:
        raise TypeError(f"{name}: got a nested tensor, expected a plain one; see tilewise.torch.nested_attention")
    if array.layout != sys.modules["torch"].strided:
        raise TypeError(f"{name}: got a tensor of layout {array.layout}, expected a dense one (torch.strided)")


def check_framework(name: str, family: Family, operands: list[Array]) -> None:
    for operand in operands:
        check_strided(name, operand)
        kind = family_of(operand)
        if kind not in (family, "numpy"):
            raise TypeError(
                f"{name}: holds a {kind} array, but q is a {family} array; expected "
                + ("NumPy arrays" if family == "numpy" else f"{family} or NumPy arrays")
            )


def check_same_device(name: str, family: Family, q: Array, operands: list[Array]) -> None:
    for operand in operands:
        if family == "torch" and family_of(operand) == "torch" and operand.device != q.device:
            raise ValueError(f"{name}: is on {operand.device}, but q is on {q.device}; expected one device")
