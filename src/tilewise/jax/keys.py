"""jax keys as the 64-bit seeds of counter-based dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def seed_of(key: Array | int) -> Array | int:
    """The seed that a key stands for: two uint32 words (low, high), which may be traced; an int is a seed already.

    Keys of two words (jax's default, threefry) are their own words, so the same numbers give the same bits in NumPy and
    torch; keys of other generators draw two words.

    Args:
        key: `jax.random.key(…)` or `jax.random.PRNGKey(…)`, one key; an int, or an integer array of one element.

    Raises:
        ValueError: several keys in one array.
    """
    if isinstance(key, int):
        return key
    key = jnp.asarray(key) if not isinstance(key, jax.Array) else key
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if typed and key.shape:
        raise ValueError(f"key: got an array of keys, of shape {key.shape}, expected one key")
    words = jax.random.key_data(key) if typed else key
    if words.size <= 2:
        return words
    if words.ndim != 1 or not (typed or words.size == 4):
        raise ValueError(f"key: has shape {words.shape}, expected one key")
    # Four raw words are a key of XLA's own generator, whatever the default is now; "unsafe_rbg" draws the same bits.
    return jax.random.bits(key if typed else jax.random.wrap_key_data(words, impl="rbg"), (2,), jnp.uint32)
