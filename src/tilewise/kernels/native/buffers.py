"""Addresses and strides of NumPy arrays and torch CPU tensors, as the compiled core takes them."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from ..._arrays import Array, dtype_name, family_of

DTYPE_CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # enum tw_dtype of native/core/problem.h

LARGE = 4 << 20  # bytes from which native/core/large_pages.cpp advises; below, the call is saved


class Memory(NamedTuple):
    """An array's first byte and its strides in elements; `array` keeps the memory alive."""

    address: int
    strides: tuple[int, ...]
    array: Array


def memory(array: Array) -> Memory:
    """Where the array lies. A NumPy array of swapped bytes or odd strides is copied."""
    if family_of(array) == "torch":
        return Memory(array.data_ptr(), tuple(array.stride()), array)
    item, flags = array.itemsize, array.flags
    odd = not flags.c_contiguous and any(stride % item for stride in array.strides)
    if odd or not flags.aligned or not array.dtype.isnative:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    # Lists are faster than generators, and this is asked of each array of each call.
    return Memory(array.__array_interface__["data"][0], tuple([stride // item for stride in array.strides]), array)


def rows(array: Array) -> Memory:
    """The array with a last axis of stride 1, copied only where it has another."""
    found = memory(array)
    if array.shape[-1] > 1 and found.strides[-1] != 1:
        found = memory(contiguous(array))
    return found


def packed(array: Array, axes: int) -> Memory:
    """The array with its last `axes` axes contiguous, copied only where they are not."""
    found, expected = memory(array), 1
    for size, stride in zip(reversed(array.shape[-axes:]), reversed(found.strides), strict=False):
        if size > 1 and stride != expected:
            return memory(contiguous(array))
        expected *= size
    return found


def broadcast_strides(found: Memory, axes: int) -> tuple[int, ...]:
    """Strides of the leading axes, 0 where an axis has size 1 and so stands for all."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(found.array.shape[:axes], found.strides, strict=False)
    )


def contiguous(array: Array) -> Array:
    """A row-major copy, or the array itself where it is row-major."""
    return array.contiguous() if family_of(array) == "torch" else np.ascontiguousarray(array)


def cast(array: Array, dtype: str) -> Array:
    """The array in another dtype, itself where it has it."""
    if dtype_name(array) == dtype:
        return array
    if family_of(array) == "torch":
        return in_large_pages(sys.modules["torch"].empty_like(array, dtype=_torch_dtype(dtype))).copy_(array)
    return array.astype(dtype)


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Uninitialised memory of q's family."""
    if family_of(like) == "torch":
        return in_large_pages(sys.modules["torch"].empty(shape, dtype=_torch_dtype(dtype)))
    return np.empty(shape, like.dtype if dtype == dtype_name(like) else dtype)


def in_large_pages(fresh: Any) -> Any:
    """The same torch CPU tensor, uninitialised: its memory will be in large pages where there is much of it.

    NumPy asks for them, too; torch alone does not, and then the page faults of a result take as long as a fast kernel.
    """
    if fresh.nbytes >= LARGE:
        from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # the card found it

        _native.prefer_large_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def _torch_dtype(dtype: str) -> Any:
    return getattr(sys.modules["torch"], dtype)
