"""What a cache asks of its arguments, before anything is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...problem import ACCUMULATOR
from .slots import Slots


def own(name: str, array: Tensor, layout: str) -> Tensor:
    """(B, H, n, D), a view."""
    if not isinstance(array, Tensor):
        raise TypeError(f"{name}: got {type(array).__name__}, expected a tensor")
    if array.ndim != 4:
        raise ValueError(f"{name}: has shape {tuple(array.shape)}, expected 4 axes for layout={layout!r}")
    return array if layout == "bhsd" else array.transpose(1, 2)


def check_tokens(k: Tensor, v: Tensor, slots: Slots | None) -> None:
    """Raise unless k and v (B, Hkv, n, D or Dv) match each other and what was appended before."""
    for name, new in (("k", k), ("v", v)):
        if new.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient; a cache is written in place, use torch.no_grad()")
    check_dtype("k", k.dtype)
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            f"v: has shape {tuple(v.shape)}, {v.dtype}, {v.device} as (B, H, n, D), expected it to match k: "
            f"{tuple(k.shape)}, {k.dtype}, {k.device}"
        )
    if slots is None:
        return
    for name, new, buffer in zip("kv", (k, v), slots.buffers, strict=True):
        batch, heads, _, width = buffer.shape
        fits = new.shape[:2] == buffer.shape[:2] and new.shape[3] == width
        if not fits or new.dtype != buffer.dtype or new.device != buffer.device:
            raise ValueError(
                f"{name}: has shape {tuple(new.shape)}, {new.dtype}, {new.device} as (B, H, n, D), expected "
                f"({batch}, {heads}, n, {width}), {buffer.dtype}, {buffer.device} as appended before"
            )


def check_dtype(name: str, dtype: Any) -> None:
    """Raise TypeError unless keys and values may have the dtype."""
    if str(dtype).removeprefix("torch.") not in ACCUMULATOR or not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: got dtype {dtype}, expected {', '.join(ACCUMULATOR)}")


def check_room(needed: int, capacity: int | None) -> None:
    """Raise unless so many tokens fit a fixed capacity; None is no limit."""
    if capacity is not None and needed > capacity:
        raise ValueError(f"k: needs room for {needed} tokens, but the capacity is fixed at {capacity}")


def counts_of(lengths: Any, batch: int, width: int) -> np.ndarray:
    """How many of `width` tokens are real in each row, (B,)."""
    if lengths is None:
        return np.full(batch, width, np.int64)
    counts = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    if counts.dtype.kind not in "iu" or counts.shape != (batch,):
        raise ValueError(f"lengths: got {lengths!r}, expected {batch} integers, one per batch row")
    if ((counts < 0) | (counts > width)).any():
        raise ValueError(f"lengths: got {counts.tolist()}, expected 0 to {width}")
    return counts.astype(np.int64)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless an option is an int of at least that."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected {least} or more")
