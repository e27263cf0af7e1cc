"""A function as a mask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from ..._arrays import Array, dtype_name, family_of, traced_by_torch
from ..algebra import Mask
from ..site import Site


@dataclass(frozen=True, eq=False)
class Predicate(Mask):
    """See `predicate`."""

    function: Callable[..., Any]
    told = False

    def __post_init__(self) -> None:
        """Name the mask, unless torch's compiler is just following its making and could not."""
        super().__post_init__()
        if not traced_by_torch():
            name_of(self)

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        answer = self.function(*(_for_user(site, place) for place in (b, h, i, j)))
        if family_of(answer) is None:
            answer = np.asarray(answer)
        if dtype_name(answer) != "bool":
            raise TypeError(f"mask: the predicate returned dtype {dtype_name(answer)}, expected bool (True = attend)")
        full = np.broadcast_shapes(*(tuple(place.shape) for place in (b, h, i, j)))
        shape = (1,) * (4 - answer.ndim) + tuple(answer.shape)
        if len(shape) > 4 or any(got not in (1, size) for got, size in zip(shape, full, strict=True)):
            raise ValueError(
                f"mask: the predicate returned shape {tuple(answer.shape)}, expected one that broadcasts to {full}"
            )
        return site.array(answer).reshape(shape)

    def __reduce__(self) -> tuple[type[Predicate], tuple[Callable[..., Any]]]:
        """Made again from its function: a copy, or one read from a file, has a name of its own."""
        return Predicate, (self.function,)

    def describe(self) -> str:
        return f"predicate({getattr(self.function, '__name__', '…')})"


def predicate(function: Callable[[Array, Array, Array, Array], Array]) -> Mask:
    """Query i of head h in batch row b sees key j iff function(b, h, i, j).

    The function is evaluated on tiles, at every position at least once, with integer arrays of the call's framework
    that broadcast against each other in 4-D; it must be written with array operations and return booleans. It may be
    asked again for the backward pass, so it must not change its mind.

    Raises:
        TypeError: not callable; at the call: the answer is not boolean.
    """
    if not callable(function):
        raise TypeError(f"function: predicate() got {type(function).__name__}, expected a function of (b, h, i, j)")
    return Predicate(function)


# Functions cannot be written down. Where a mask must be text, a predicate is a name, under which it is found here while
# it lives. A text, since torch's compiler guards on the value of a text but may leave a number open.
_numbers = count()
_named: WeakValueDictionary[str, Predicate] = WeakValueDictionary()


def name_of(mask: Predicate) -> str:
    """The mask's own name in this process: "0", "1", …"""
    name = getattr(mask, "_name", None)
    if name is None:
        name = str(next(_numbers))
        object.__setattr__(mask, "_name", name)
        _named[name] = mask
    return name


def named(name: str) -> Predicate | None:
    """The mask of a name, if it is still alive."""
    return _named.get(name)


def _for_user(site: Site, place: Array) -> Array:
    """Positions in the framework of the call, so that the function may index its own arrays with them."""
    if not site.concrete or site.family == "numpy":
        return place
    if site.family == "torch":
        # torch indexes with 64-bit integers alone.
        return sys.modules["torch"].as_tensor(np.asarray(place, dtype=np.int64), device="cpu")
    return sys.modules["jax"].numpy.asarray(place)
