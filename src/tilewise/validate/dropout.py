"""Dropout: its probability, and its seed as two words."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from .._arrays import Family, dtype_name, family_of, namespace
from ..contract import Dropout
from .operand import real


def check_dropout(dropout: Dropout | None, family: Family) -> Dropout | None:
    if dropout is None:
        return None
    if not isinstance(dropout, Dropout):
        raise TypeError(f"dropout: got {type(dropout).__name__}, expected tilewise.Dropout(p, seed) or None")
    p = real("dropout", dropout.p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: got p = {p}, expected a probability from 0 to 1")
    if isinstance(dropout.stream, bool) or not isinstance(dropout.stream, int) or not 0 <= dropout.stream < 2**64:
        raise ValueError(f"dropout: got stream = {dropout.stream!r}, expected an int from 0 to 2^64 - 1")
    strides = dropout.strides
    if strides is None:
        if not isinstance(dropout.first, int) or dropout.first != 0:
            raise ValueError("dropout: got first without strides, expected both or neither")
    elif (
        not isinstance(strides, tuple | list)
        or len(strides) != 4
        or not all(isinstance(n, int | np.integer) and -(2**63) <= n < 2**63 for n in strides)
    ):
        raise ValueError(f"dropout: got strides = {strides!r}, expected four integers of 64 bits")
    elif not any(strides):
        raise ValueError("dropout: got strides = (0, 0, 0, 0), expected pairs of different numbers")
    if not p:
        return None
    first: Any = 0 if strides is None else _words("first", dropout.first, family)
    return replace(dropout, p=p, seed=_words("seed", dropout.seed, family), first=first)


def _words(name: str, seed: Any, family: Family) -> Any:
    """A 64-bit number as (low, high) 32-bit words: two ints, or an array of two where it is an array."""
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"dropout: got {name} = {seed}, expected an integer of 64 bits")
        return int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF
    kind = family_of(seed)
    if kind is None or (kind != family and kind != "numpy"):
        raise TypeError(
            f"dropout: got a {name} of type {type(seed).__name__}, expected an int or an integer array of q's framework"
        )
    if kind == "jax":
        # A key of four words draws two, typed or raw, as in `jax/keys.py`.
        random = sys.modules["jax"].random
        if str(seed.dtype) == "uint32" and seed.shape == (4,):
            seed = random.wrap_key_data(seed, impl="rbg")
        if str(seed.dtype).startswith("key<"):
            words = random.key_data(seed)
            seed = words if seed.shape or words.size <= 2 else random.bits(seed, (2,), "uint32")
    if not dtype_name(seed).startswith(("int", "uint")) or math.prod(seed.shape) not in (1, 2):
        raise TypeError(
            f"dropout: got a {name} of dtype {dtype_name(seed)} and shape {tuple(seed.shape)}, expected 1 or 2 integers"
        )
    words = seed.reshape(-1)
    if kind == "numpy":
        low, *high = (int(word) for word in words)
        return (low & 0xFFFFFFFF, high[0] & 0xFFFFFFFF) if high else (low & 0xFFFFFFFF, (low >> 32) & 0xFFFFFFFF)
    xp = namespace(family, getattr(seed, "device", None))
    if kind == "torch" and dtype_name(words) == "uint64":
        words = words.view(xp.int64)  # the same bits, which torch can shift
    if words.shape[0] == 1:
        narrow = dtype_name(words) in ("int8", "int16", "int32", "uint8", "uint16", "uint32")
        # A narrow signed seed continues its sign, as the same number does in 64 bits; shifts by 32 need 64 bits.
        high = words >> 31 if narrow and dtype_name(words).startswith("int") else 0 * words if narrow else words >> 32
        words = xp.concatenate([words, high], 0)
    if kind == "jax":
        return words.astype(xp.uint32)
    return words.to(xp.int64) & 0xFFFFFFFF
