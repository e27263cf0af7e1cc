"""The public functions of flash-attention-jax 0.3.1 (lucidrains, MIT), which follow Rabe and Staats (2021).

Layout (b, h, n, d), and (n, d) for `rabe_attention` and `cosine_sim_flash_attention`. Kept: names, arguments, causal
masks that align the last query with the last key, scale 1/sqrt(d), and 10 for cosine similarity.

Repaired:

- every length is right: the original was wrong, or failed, above a chunk that does not divide the length;
- the result has the dtype of the arguments (the original's flash functions answered bfloat16 with float32, and had no
  gradient for it), and every function has forward and reverse derivatives, `vmap`, and memory linear in the lengths;
- a row that sees no key is 0, not NaN or the mean of the values; what is masked never shows;
- cosine similarity divides each vector by its own norm; the original divided by the norm of the whole array, of all
  heads and positions, which `norm="array"` restores;
- k and v may have fewer heads than q (a divisor), v another width, and masks are optional;
- chunk sizes change nothing but were an error under `jit`; here they may be anything, traced too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._api import attention as _attention
from ..masks.primitives import causal

Array = Any

__all__ = [
    "PRNGKeyGenerator",
    "attention",
    "causal_attention",
    "causal_flash_attention",
    "cosine_sim_attention",
    "cosine_sim_flash_attention",
    "flash_attention",
    "plain_attention",
    "rabe_attention",
    "value_and_grad_difference",
]

_EPSILON = 1e-10
_COSINE_SCALE = 10.0


def attention(q: Array, k: Array, v: Array, key_mask: Array | None = None) -> Array:
    """Attention in which a mask tells which keys take part.

    Args:
        q: (b, h, i, d), float64, float32, float16 or bfloat16. k: (b, h or 1, j, d). v: (b, h or 1, j, dv).
        key_mask: (b, j), True or not zero for keys that take part; None for all.

    Returns:
        (b, h, i, dv), in the common dtype of q, k and v.

    Raises:
        ValueError: shapes that do not fit; the message begins with the argument's name.
    """
    _check_rank(4, q=q, k=k, v=v)
    return _attend(q, k, v, key_mask)


plain_attention = attention
flash_attention = attention


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention in which the last query sees all keys, the one before it all but the last, and so on.

    Args:
        q: (…, i, d), any number of leading axes. k: (…, j, d). v: (…, j, dv). Leading axes broadcast.

    Returns:
        (…, i, dv), in the common dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) < 2:
            raise ValueError(f"{name}: has shape {jnp.shape(x)}, expected (…, n, d)")
    leading = jnp.broadcast_shapes(*(jnp.shape(x)[:-2] for x in (q, k, v)))
    rows, heads = (leading[:-1], leading[-1]) if leading else ((), 1)
    q, k, v = (_four(x, rows) for x in (q, k, v))
    q = jnp.broadcast_to(q, (q.shape[0], heads, *q.shape[2:]))
    out = _attention(*_alike(q, k, v), mask=causal("end"))
    return out.reshape(*leading, *out.shape[2:])


def causal_flash_attention(q: Array, k: Array, v: Array) -> Array:
    """`causal_attention` for arrays (b, h, n, d); k and v may have one head, or a divisor of q's.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_rank(4, q=q, k=k, v=v)
    return _attention(*_alike(q, k, v), mask=causal("end"))


def cosine_sim_attention(q: Array, k: Array, v: Array, key_mask: Array | None = None, *, norm: str = "vector") -> Array:
    """Attention with scores 10 * cos(q, k).

    Args:
        q, k, v, key_mask: as for `attention`.
        norm: "vector" divides each query and key by its own length; "array" divides q and k each by the norm of the
            whole array plus 1e-10, as the original does (so masked keys, and under `vmap` the mapped axes, matter).

    Returns:
        (b, h, i, dv), in the common dtype of q, k and v.

    Raises:
        ValueError: shapes that do not fit, or an unknown `norm`.
    """
    _check_rank(4, q=q, k=k, v=v)
    return _cosine(q, k, v, key_mask, norm)


def cosine_sim_flash_attention(
    q: Array, k: Array, v: Array, key_mask: Array | None = None, *, norm: str = "vector"
) -> Array:
    """`cosine_sim_attention` of one head, to be mapped over others by `vmap`; with four axes it is that function.

    Args:
        q: (n, d). k: (m, d). v: (m, dv). key_mask: (m,), True or not zero for keys that take part.
        norm: as for `cosine_sim_attention`.

    Returns:
        (n, dv), in the common dtype.

    Raises:
        ValueError: shapes that do not fit, or an unknown `norm`.
    """
    if jnp.ndim(q) == 4:
        return cosine_sim_attention(q, k, v, key_mask, norm=norm)
    _check_rank(2, q=q, k=k, v=v)
    mask = None if key_mask is None else jnp.asarray(key_mask)[None]
    q, k, v = (jnp.asarray(x)[None, None] for x in (q, k, v))
    return _cosine(q, k, v, mask, norm)[0, 0]


def rabe_attention(q: Array, k: Array, v: Array, q_chunk_size: Any = 1024, k_chunk_size: Any = 4096) -> Array:
    """Attention of one head (Rabe and Staats, 2021), to be mapped over others by `vmap`.

    Args:
        q: (n, d). k: (m, d). v: (m, dv).
        q_chunk_size, k_chunk_size: hints, which the kernels need not follow; results do not depend on them.

    Returns:
        (n, dv), in the common dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_rank(2, q=q, k=k, v=v)
    with jax.default_matmul_precision("highest"):
        return _attention(*_alike(*(jnp.asarray(x)[None, None] for x in (q, k, v))))[0, 0]


def value_and_grad_difference(
    fn1: Callable[..., Array],
    fn2: Callable[..., Array],
    seed: int = 42,
    batch: int = 2,
    heads: int = 4,
    q_seq_len: int = 4096,
    k_seq_len: int = 8192,
    add_key_mask: bool = True,
    dim: int = 512,
) -> tuple[Array, list[Array]]:
    """How far two attentions differ on random q, k, v and, with `add_key_mask`, a mask that keeps half of the keys.

    Args:
        fn1, fn2: functions of q (batch, heads, q_seq_len, dim), k and v (batch, heads, k_seq_len, dim), and of
            key_mask (batch, k_seq_len) if there is one.
        seed: of the random numbers. batch, heads, q_seq_len, k_seq_len, dim: the sizes.

    Returns:
        The difference of the summed outputs, and a list of the largest differences of their gradients to q, k and v.
    """
    keys = PRNGKeyGenerator(seed)
    lengths = (q_seq_len, k_seq_len, k_seq_len)
    arrays = [jax.random.normal(next(keys), (batch, heads, length, dim)) for length in lengths]
    mask = jax.random.randint(next(keys), (batch, k_seq_len), 0, 2) == 1
    rest = (mask,) if add_key_mask else ()

    def total(fn: Callable[..., Array]) -> tuple[Array, tuple[Array, ...]]:
        return jax.value_and_grad(lambda *qkv: jnp.sum(fn(*qkv, *rest)), argnums=(0, 1, 2))(*arrays)

    (out1, grads1), (out2, grads2) = total(fn1), total(fn2)
    return jnp.abs(out1 - out2), [jnp.max(jnp.abs(a - b)) for a, b in zip(grads1, grads2, strict=True)]


def PRNGKeyGenerator(seed: int = 42) -> Iterator[Array]:
    """Fresh keys without end, the same for the same seed."""
    key = jax.random.PRNGKey(seed)
    while True:
        fresh, key = jax.random.split(key)
        yield fresh


def _attend(q: Array, k: Array, v: Array, key_mask: Array | None, scale: float | None = None) -> Array:
    """q (b, h, i, d), k (b, h', j, d), v (b, h', j, dv), key_mask (b, j)."""
    q, k, v = _alike(q, k, v)
    mask = None if key_mask is None else _keys(key_mask, k)[:, None, None, :]
    return _attention(q, k, v, mask=mask, scale=scale)


def _keys(key_mask: Array, k: Array) -> Array:
    mask = jnp.asarray(key_mask)
    if mask.ndim != 2 or mask.shape[0] not in (1, k.shape[0]) or mask.shape[1] != k.shape[2]:
        raise ValueError(f"key_mask: has shape {mask.shape}, expected one entry for each key, {k.shape[::2]}")
    return mask if mask.dtype == jnp.bool_ else mask != 0


def _alike(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Arrays of one dtype, k and v with the same number of heads where one of them has one for all."""
    dtype = jnp.result_type(q, k, v)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    heads = max(k.shape[1], v.shape[1])
    k, v = (jnp.broadcast_to(x, (x.shape[0], heads, *x.shape[2:])) if x.shape[1] == 1 else x for x in (k, v))
    return q, k, v


def _cosine(q: Array, k: Array, v: Array, key_mask: Array | None, norm: str) -> Array:
    if norm not in ("vector", "array"):
        raise ValueError(f"norm: got {norm!r}, expected 'vector' or 'array'")
    dtype = jnp.result_type(q, k, v)
    # Wider than 16 bits, where scores of up to 10 would otherwise inherit the rounding of the norms.
    wide = jnp.promote_types(dtype, jnp.float32)
    q, k, v = (jnp.asarray(x, wide) for x in (q, k, v))
    if key_mask is not None and norm == "vector":
        # The norm of a masked key must not show in its gradient either, so it is never taken.
        k = jnp.where(_keys(key_mask, k)[:, None, :, None], k, 0.0)
    q, k = (_unit(x, -1 if norm == "vector" else None) for x in (q, k))
    return _attend(q, k, v, key_mask, _COSINE_SCALE).astype(dtype)


def _unit(x: Array, axis: int | None) -> Array:
    """x over its norm along an axis, or the norm of all; a zero stays zero and has a gradient, which is 0."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (length + _EPSILON)


def _four(x: Array, rows: tuple[int, ...]) -> Array:
    """(…, h, n, d), or with fewer axes, as (b, h, n, d): `rows` are the leading axes that become one, but for heads."""
    x = jnp.asarray(x)
    x = x.reshape((1,) * (len(rows) + 3 - x.ndim) + x.shape)
    return jnp.broadcast_to(x, (*rows, *x.shape[-3:])).reshape(math.prod(rows), *x.shape[-3:])


def _check_rank(rank: int, **arrays: Array) -> None:
    for name, array in arrays.items():
        if jnp.ndim(array) != rank:
            expected = "(b, h, n, d)" if rank == 4 else "(n, d); use vmap for heads and batch"
            raise ValueError(f"{name}: has shape {jnp.shape(array)}, expected {expected}")
