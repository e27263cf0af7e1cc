"""Masks, biases, dropout and their lowered forms as pytrees: arrays are leaves, all else is structure.

So that they can be arguments of jitted functions, be mapped by `vmap` and carried by `scan`. Importing this module
registers them, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from jax import tree_util

from ..contract import Dropout
from ..masks import primitives  # noqa: F401  (defines the subclasses registered below)
from ..masks.algebra import Mask
from ..masks.biases import Bias
from ..masks.lower import LoweredMask
from ..masks.ranges import Ranges
from . import predicates  # noqa: F401  (likewise)


def _register(kind: type, is_child: Callable[[Any, str, Any], bool]) -> None:
    """Register a dataclass; fields that `is_child(value, name, field value)` are children, the others structure."""

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], Hashable]:
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(kind)]
        children = [(tree_util.GetAttrKey(name), part) for name, part in fields if is_child(value, name, part)]
        return children, tuple((name, None if is_child(value, name, part) else (part,)) for name, part in fields)

    def unflatten(structure: Any, children: Any) -> Any:
        # Field by field, not through __init__: jax puts placeholders where arrays belong.
        value: Any = object.__new__(kind)
        child = iter(children)
        for name, static in structure:
            object.__setattr__(value, name, next(child) if static is None else static[0])
        return value

    tree_util.register_pytree_with_keys(kind, flatten, unflatten)


def _in_mask(mask: Any, name: str, value: Any) -> bool:
    """Parts of a combination, and array operands; an int or None in an array's place is structure."""
    return name in ("part", "parts") or (name in mask.arrays and not isinstance(value, int | None))


def _in_bias(bias: Any, name: str, value: Any) -> bool:
    return name in ("terms", "array", "slopes", "values", "weight")


def _in_dropout(dropout: Any, name: str, value: Any) -> bool:
    return name in ("seed", "first") and not isinstance(value, int)


def _in_lowered(mask: Any, name: str, value: Any) -> bool:
    return name not in ("site", "text")


def register_mask(kind: type[Mask]) -> None:
    """Register a mask that is defined after this module was imported."""
    _register(kind, _in_mask)


def _subclasses(kind: type) -> set[type]:
    direct: set[type] = set(kind.__subclasses__())
    return direct.union(*(_subclasses(sub) for sub in direct))


for _kind, _is_child in ((Mask, _in_mask), (Bias, _in_bias)):
    for _subclass in _subclasses(_kind):
        _register(_subclass, _is_child)
_register(Dropout, _in_dropout)
_register(Ranges, lambda ranges, name, value: True)
_register(LoweredMask, _in_lowered)
