"""Calls with the shapes, strides and options of an earlier one: nothing is left to check, to spell or to plan."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._remembered import Remembered
from ..masks.algebra import Mask
from ..masks.primitives.dense import Dense
from . import autograd, operator, quick
from .options import write
from .watch import nobody_else, recording


@dataclass(slots=True)
class Spelled:
    """The last arguments of the operator; and the way that such a call takes through it, once that was found."""

    integers: list[int]
    scale: float | None
    options: str
    prepared: quick.Prepared | None = None


_calls: Remembered[Hashable, Spelled] = Remembered()


def key_of(q: Any, k: Any, v: Any, mask: Any, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Hashable | None:
    """What an earlier call must share with this one; None for calls that are not remembered.

    Remembered are plain tensors of four axes on the CPU while nobody watches, without biases, sinks or dropout.

    Args:
        mask: remembered where it holds no arrays, or is one of booleans; arrays: bias, sinks and dropout.
        options: all others.
    """
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is Tensor):
        return None
    for array in arrays:
        if array is not None:
            return None
    for x in (q, k, v):
        if x.layout is not torch.strided or x.is_nested or x.dim() != 4:
            return None
    if not nobody_else((q, k, v)) or torch.is_autocast_enabled("cpu"):
        return None
    told: Hashable = None
    seen = booleans_of(mask)
    if seen is not None:
        told = ("dense", seen.shape, seen.stride())
    elif mask is not None:
        told = mask.fixed if isinstance(mask, Mask) else None
        if told is None:
            return None
    # 1, 1.0 and True are equal, but not all are a scale.
    key = (
        told, *options, *map(type, options), q.dtype, k.dtype, v.dtype,
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
    )  # fmt: skip
    try:
        hash(key)
    except TypeError:  # an option that is wrong
        return None
    return key


def booleans_of(mask: Any) -> Tensor | None:
    """The tensor of a mask that is nothing but booleans."""
    array = mask.array if type(mask) is Dense else mask
    plain = type(array) is Tensor and array.dtype == torch.bool and array.is_cpu and array.dim() <= 4
    return array if plain and array.layout is torch.strided and not array.is_nested else None


def find(key: Hashable | None) -> Spelled | None:
    """What stands for a call that was remembered under the key."""
    return None if key is None else _calls.get(key)  # torch's compiler would guard on all of them


def attend(known: Spelled, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of views (B, H, S, D); `seen`: the boolean mask."""
    operands, facts = [q, k, v], [] if seen is None else [seen]
    if recording(operands):
        return autograd.recorded(operands, facts, known.integers, known.scale, known.options)
    if known.prepared is not None:
        return known.prepared(operands, facts)
    rest = (operands, facts, known.integers, known.scale, known.options)
    results = operator.compute(*rest)
    known.prepared = quick.find(quick.key_of(*rest))
    return results


def remember(key: Hashable | None, scale: float | None, *told: Any) -> None:
    """Remember a call of three operands that went well; `told` are the arguments of `options.write` but the names."""
    if key is None:
        return
    _, integers, options = write("q,k,v", *told)
    _calls.keep(key, Spelled(integers, scale, options))
