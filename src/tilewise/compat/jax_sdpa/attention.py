"""The function: arguments as jax has them, checked as jax checks them, become one call of `tilewise.attention`."""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..._api import attention
from ...kernels import cards
from ...masks.algebra import Mask
from ...masks.primitives import causal, dense, intervals, lengths, window

Array = Any

# Taken when this module is first imported, which is before anything can be put in its place.
JAX_OWN = jax.nn.dot_product_attention


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention with the interface of `jax.nn.dot_product_attention`, in memory linear in T + S.

    B batch, T queries, S keys, N query heads, K key heads of which N is a multiple, H width. Fewer axes than four are
    filled up with ones in front, for every array.

    Args:
        query: (B, T, N, H) or (T, N, H); float64, float32, float16 or bfloat16.
        key: (B, S, K, H) or (S, K, H), query's dtype. value: key's shape and dtype.
        bias: added to the logits; broadcasts to (B, N, T, S), or has K in N's place. A gradient flows to it.
        mask: booleans of such a shape; True takes part.
        scale: factor of the logits, 1 / sqrt(H) if None; may be traced, and then a gradient flows to it.
        is_causal: query t sees the keys up to t.
        query_seq_lengths, key_value_seq_lengths: int32 (B,); queries and keys beyond are padding.
        local_window_size: (left, right), both inclusive, or one int for both sides.
        implementation: None or "xla" for tilewise's choice, "cudnn" for jax's own, or the name of a tilewise kernel.
        return_residual: also return the log-sum-exp of each row of logits.

    Returns:
        Query's shape and dtype; with `return_residual` a pair with the residual, (B, T, N) or (T, N), key's dtype.
        Rows beyond their length, and rows that see no key, are 0, with residual -inf.

    Raises:
        ValueError: a shape, dtype or implementation that jax refuses, too; the message begins with the argument's name.
        TypeError: a dtype other than those four. KernelRefused: a kernel asked for by name cannot run this.
    """
    if implementation == "cudnn":
        options = {"return_residual": True} if return_residual else {}  # jax before 0.9 does not know the option
        return JAX_OWN(
            query, key, value, bias, mask, scale=scale, is_causal=is_causal, query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths, local_window_size=local_window_size,
            implementation=implementation, **options,
        )  # fmt: skip
    shape = jnp.asarray(query).shape
    q, k, v = _four(query), _four(key), _four(value)
    _check_qkv(q, k, v)
    groups = q.shape[2] // k.shape[2] if k.shape[2] else 1
    facts = _facts(q, k, mask, groups, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size)
    dtype = q.dtype
    if scale is not None:
        scale = jnp.asarray(scale) if isinstance(scale, Tracer) else _number(scale)
    if isinstance(scale, Tracer):
        q, k, v, scale = *_scaled(q, k, v, scale), 1.0
    out, lse = attention(
        q, k, v, mask=facts, bias=_bias(bias, groups, k.shape[2]), scale=scale, layout="bshd", return_lse=True,
        kernel=_kernel(implementation),
    )  # fmt: skip
    out = out.astype(dtype).reshape(shape)
    if not return_residual:
        return out
    residual = jax.lax.stop_gradient(lse.swapaxes(1, 2).astype(dtype))  # (B, T, N)
    return out, residual.reshape(shape[:-1])


def _four(array: Array) -> Array:
    array = jnp.asarray(array)
    return array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim < 4 else array


def _check_qkv(q: Array, k: Array, v: Array) -> None:
    for name, array in (("query", q), ("key", k), ("value", v)):
        if array.ndim != 4:
            raise ValueError(f"{name}: has shape {array.shape}, expected (B, T, N, H) or (T, N, H)")
    (batch, _, heads, _), (k_batch, _, k_heads, width) = q.shape, k.shape
    if v.shape != k.shape:
        raise ValueError(f"value: has shape {v.shape}, expected that of key, {k.shape}")
    if (batch, q.shape[3]) != (k_batch, width):
        raise ValueError(f"query: has shape {q.shape}, expected ({k_batch}, T, N, {width}) with key's B and H")
    for name, array in (("query", q), ("value", v)):
        if array.dtype != k.dtype:
            raise ValueError(f"{name}: got dtype {array.dtype}, expected that of key, {k.dtype}")
    if (heads % k_heads) if k_heads else heads:
        raise ValueError(f"query: has {heads} heads, expected a multiple of key's {k_heads}")


def _facts(
    q: Array, k: Array, mask: Array | None, groups: int, is_causal: bool,
    q_lengths: Array | None, k_lengths: Array | None, size: Any,
) -> Mask | None:  # fmt: skip
    """All that restricts who sees whom, as one mask."""
    parts: list[Mask] = []
    if mask is not None:
        mask = _four(mask)
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask: got dtype {mask.dtype}, expected bool (True takes part); floats go to bias")
        parts.append(dense(_per_head("mask", mask, groups, k.shape[2])))
    if is_causal:
        parts.append(causal("start"))
    if size is not None:
        parts.append(_window(size, q.shape[1]))
    if q_lengths is not None or k_lengths is not None:
        q_lengths = _lengths("query_seq_lengths", q_lengths, q.shape[0])
        k_lengths = _lengths("key_value_seq_lengths", k_lengths, q.shape[0])
        parts.append(lengths(q=q_lengths, k=k_lengths))
    return reduce(and_, parts) if parts else None


def _bias(bias: Array | None, groups: int, k_heads: int) -> Array | None:
    if bias is None:
        return None
    bias = _four(bias)
    bias = bias if jnp.issubdtype(bias.dtype, jnp.floating) else bias.astype(jnp.float32)
    return _per_head("bias", bias, groups, k_heads)


def _per_head(name: str, array: Array, groups: int, k_heads: int) -> Array:
    """(B', N', T', S') as it is, or with each of K heads repeated for the query heads of its group."""
    if array.ndim != 4:
        raise ValueError(f"{name}: has shape {array.shape}, expected at most 4 axes, (B, N, T, S)")
    return jnp.repeat(array, groups, axis=1) if groups > 1 and array.shape[1] == k_heads > 1 else array


def _lengths(name: str, array: Array | None, batch: int) -> Array | None:
    if array is None:
        return None
    array = jnp.asarray(array)
    if array.shape != (batch,) or array.dtype != jnp.int32:
        raise ValueError(f"{name}: has shape {array.shape} and dtype {array.dtype}, expected ({batch},) int32")
    return array


def _window(size: Any, q_len: int) -> Mask:
    left, right = (size, size) if isinstance(size, int | np.integer) else size
    if all(isinstance(side, int | np.integer) and side >= 0 for side in (left, right)):
        return window(int(left), int(right), "start")
    rows = jnp.arange(q_len)  # sides below zero, or traced ones
    return intervals(rows - left, rows + right + 1)


def _number(scale: Any) -> float:
    if np.size(scale) != 1:
        raise ValueError(f"scale: has shape {np.shape(scale)}, expected one number")
    return float(np.asarray(scale).item())


def _scaled(q: Array, k: Array, v: Array, scale: Array) -> tuple[Array, Array, Array]:
    """q times a factor known only when the program runs; wider than 16 bits, so that no second rounding is added."""
    if scale.size != 1:
        raise ValueError(f"scale: has shape {scale.shape}, expected one number")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return q.astype(wide) * scale.reshape(()).astype(wide), k.astype(wide), v.astype(wide)


def _kernel(implementation: str | None) -> str | None:
    if implementation in (None, "xla"):
        return None
    names = [card.name for card in cards()]
    if implementation not in names:
        raise ValueError(
            f"implementation: got {implementation!r}, expected None, 'xla', 'cudnn' or a kernel, {', '.join(names)}"
        )
    return implementation
