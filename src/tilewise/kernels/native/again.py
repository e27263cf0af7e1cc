"""NumPy calls like one made before: the same shapes, strides and options, so the same plan and facts.

Small calls cost what the way to the kernel costs. What that way finds out depends on the key below alone, so it is
found once; then a call makes its two results and enters the compiled code. For torch tensors see `torch/quick.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._arrays import Array, traced_by_torch
from ..._remembered import Remembered
from ...contract import Operands, Plan
from ...masks.algebra import Mask
from ...masks.primitives.dense import Dense
from .call import lasting
from .facts import Alive, mask_place


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call of `_native.forward` without its arrays.

    Attributes:
        rest: its keywords but those of arrays; alive: what they point into.
        strides: of q, k, v and out over (B, H, S), in elements; seen: of the boolean mask over (B, H, i, j), if any.
        out, lse: shapes in memory; dtype, wide: their dtypes.
        return_lse: whether the caller wants lse, too.
    """

    rest: dict[str, Any]
    alive: Alive
    strides: tuple[tuple[int, ...], ...]
    seen: tuple[int, ...]
    out: tuple[int, ...]
    lse: tuple[int, ...]
    dtype: np.dtype[Any]
    wide: np.dtype[Any]
    return_lse: bool

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None) -> Any:
        """out in the caller's layout, or (out, lse). `seen`: the boolean mask, read in place."""
        from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # there, since it ran before

        out, lse = np.empty(self.out, self.dtype), np.empty(self.lse, self.wide)
        places = [(_address(x), *strides) for x, strides in zip((q, k, v, out), self.strides, strict=True)]
        mask = {} if seen is None else {"mask": (_address(seen), *self.seen)}
        _native.forward(
            **self.rest, **mask, threads=0, q=places[0], k=places[1], v=places[2], out=places[3], lse=_address(lse)
        )
        return (out, lse) if self.return_lse else out


_calls: Remembered[Hashable, Prepared] = Remembered()


def key_of(q: Any, k: Any, v: Any, mask: Any, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Hashable | None:
    """What the way of a call depends on; None where it is not remembered.

    Args:
        mask: as given; remembered where it holds no arrays, or is one of booleans.
        arrays: bias, sinks and dropout, with which no call is; options: all others.
    """
    if traced_by_torch() or any(array is not None for array in arrays) or not all(_plain(x) for x in (q, k, v)):
        return None
    told: Hashable = None
    seen = booleans_of(mask)
    if seen is not None:
        told = ("dense", seen.shape, seen.strides)
    elif mask is not None:
        told = mask.fixed if isinstance(mask, Mask) else None
        if told is None:
            return None
    shapes = [part for x in (q, k, v) for part in (x.dtype, x.shape, x.strides)]
    key = (told, *options, *map(type, options), *shapes)  # 1, 1.0 and True are equal, but not all are a scale
    try:
        hash(key)
    except TypeError:  # an option that is wrong
        return None
    return key


def booleans_of(mask: Any) -> np.ndarray | None:
    """The array of a mask that is nothing but booleans."""
    array = mask.array if type(mask) is Dense else mask
    return array if type(array) is np.ndarray and array.dtype == np.bool_ else None


def find(key: Hashable | None) -> Prepared | None:
    """The call that was remembered under the key."""
    return None if key is None else _calls.get(key)


def remember(key: Hashable | None, plan: Plan, operands: Operands, out: Array, lse: Array, return_lse: bool) -> None:
    """Remember how the native kernel was called; out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) are what it gave."""
    found = None if key is None else lasting(plan, operands)
    if found is None or plan.problem.layout == "thd":
        return
    arrays = operands.q, operands.k, operands.v, out
    if any(x.strides[-1] != x.itemsize for x in arrays):
        return  # the kernel works on copies of these
    strides = tuple(tuple(stride // x.itemsize for stride in x.strides[:3]) for x in arrays)
    seen = () if operands.mask.dense is None else mask_place(operands.mask.dense)[1:]
    memory = out.swapaxes(1, 2) if plan.problem.layout == "bshd" else out
    _calls.keep(key, Prepared(*found, strides, seen, memory.shape, lse.shape, out.dtype, lse.dtype, return_lse))


def _plain(x: Any) -> bool:
    """Whether the core can read the array in place, as far as that is not known from its dtype and last stride."""
    return type(x) is np.ndarray and x.flags.aligned and not any(stride % x.itemsize for stride in x.strides)


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]
