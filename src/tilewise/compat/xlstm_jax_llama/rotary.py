"""Rotary position embedding (Su et al., 2021) of interleaved pairs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any


def precompute_freqs(
    feat_dim: int,
    pos_idx: Array | None = None,
    max_length: int | None = None,
    theta: float = 10000.0,
    dtype: Any = jnp.float32,
) -> tuple[Array, Array]:
    """Sines and cosines of position * theta^(-2i / feat_dim), computed in float32, then cast.

    Args:
        feat_dim: width of a head. pos_idx: positions (B, S) or (S,); None is 0 … max_length - 1.
        max_length: read only where `pos_idx` is None. theta: base of the frequencies. dtype: of the result.

    Returns:
        (sin, cos), the sine first, each (B or 1, S, feat_dim // 2).

    Raises:
        AssertionError: neither `pos_idx` nor `max_length`.
    """
    if pos_idx is None:
        if max_length is None:
            raise AssertionError("pos_idx: got None and no max_length, expected one of them")
        pos_idx = jnp.arange(max_length)
    positions = jnp.atleast_2d(jnp.asarray(pos_idx, jnp.float32))
    frequencies = jnp.asarray(theta, jnp.float32) ** (-2.0 * jnp.arange(feat_dim // 2, dtype=jnp.float32) / feat_dim)
    angles = positions[..., None] * frequencies
    return jnp.sin(angles).astype(dtype), jnp.cos(angles).astype(dtype)


def apply_rotary_emb(
    xq: Array,
    xk: Array,
    freqs_sin: Array | None = None,
    freqs_cos: Array | None = None,
    theta: float = 10000.0,
) -> tuple[Array, Array]:
    """Queries and keys turned by their positions: pair (2i, 2i + 1) by the angle of frequency i.

    Args:
        xq: (B, Sq, NH, D), D even. xk: (B, Sk, NK, D), where NK may differ from NH.
        freqs_sin, freqs_cos: tables (B or 1, S, D // 2) of `precompute_freqs`; without both, positions count from 0.
        theta: base of the frequencies where there are no tables.

    Returns:
        Both, with shapes and dtypes kept.

    Raises:
        ValueError: arrays that are not 4-D or of odd width, or tables of another length.
    """
    turned = []
    for name, x in (("xq", xq), ("xk", xk)):
        if x.ndim != 4 or x.shape[3] % 2:
            raise ValueError(f"{name}: has shape {x.shape}, expected (B, S, NH, D) with D even")
        sin, cos = freqs_sin, freqs_cos
        if sin is None or cos is None:
            sin, cos = precompute_freqs(x.shape[3], max_length=x.shape[1], theta=theta)
        for label, table in (("freqs_sin", sin), ("freqs_cos", cos)):
            size = (x.shape[1], x.shape[3] // 2)
            if table.shape[-2:] != size:
                raise ValueError(
                    f"{label}: has shape {table.shape}, expected (B or 1, {size[0]}, {size[1]}) for {name}"
                )
        turned.append(_turn(x, sin, cos))
    return turned[0], turned[1]


def _turn(x: Array, sin: Array, cos: Array) -> Array:
    """x (B, S, N, D) by tables (B or 1, S, D // 2), in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sin, cos = (table.astype(wide)[..., None, :] for table in (sin, cos))
    even, odd = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)
