"""Attention of one example, to be mapped over a batch by `jax.vmap`, as equinox has it.

`attention_one` stands for `equinox.nn._attention.dot_product_attention`, and `multihead_attention` for calling an
`equinox.nn.MultiheadAttention` (equinox 0.11 to 0.13), whose parameters it uses; equinox itself offers no hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..._api import attention
from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.biases import Bias
from ..keys import seed_of

Array = Any


def attention_one(
    query: Array,
    key_: Array,
    value: Array,
    mask: Array | Mask | None = None,
    *,
    bias: Array | Bias | None = None,
    dropout: float | Any = 0.0,
    key: Array | int | None = None,
    inference: bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    kernel: str | None = None,
) -> Array:
    """Attention without a batch axis, in memory linear in Sq + Sk; `jax.vmap` adds as many as are wanted.

    Args:
        query: (Sq, Hq, D), or (Sq, D) for one head. key_: (Sk, Hkv, D) or (Sk, D), where Hq may be a multiple of Hkv.
        value: (Sk, Hkv, Dv) or (Sk, Dv). Their dtypes are promoted to the common one.
        mask: True where a query attends, (Sq, Sk) or (Hq, Sq, Sk), or what broadcasts to them; or a tilewise mask.
        bias: floats of such a shape, added to the scores, or a tilewise bias.
        dropout: the probability to drop, or an `equinox.nn.Dropout`. key: a jax key, or an integer seed.
        inference: True drops nothing; None is what the `equinox.nn.Dropout` says, or False.
        scale, softcap, sinks, kernel: as for `tilewise.attention`.

    Returns:
        (Sq, Hq, Dv) or (Sq, Dv). A row that sees no key is 0; in equinox it is the mean of the values.

    Raises:
        ValueError: shapes that do not fit, or dropout without a key; the message begins with the argument's name.
    """
    arrays = [jnp.asarray(x) for x in (query, key_, value)]
    dtype = jnp.result_type(*arrays)
    for name, array in zip(("query", "key_", "value"), arrays, strict=True):
        if array.ndim != arrays[0].ndim or array.ndim not in (2, 3):
            raise ValueError(f"{name}: has shape {array.shape}, expected (S, H, D), or (S, D) for all three")
    heads = arrays[0].ndim == 3
    q, k, v = (array.astype(dtype)[None] if heads else array.astype(dtype)[None, :, None] for array in arrays)
    out = attention(
        q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks,
        dropout=_dropout(dropout, key, inference), layout="bshd", kernel=kernel,
    )  # fmt: skip
    return out[0] if heads else out[0, :, 0]


def multihead_attention(
    module: Any,
    query: Array,
    key_: Array,
    value: Array,
    mask: Array | Mask | None = None,
    *,
    key: Array | int | None = None,
    inference: bool | None = None,
    process_heads: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None,
    **options: Any,
) -> Array:
    """What `module(query, key_, value, mask, …)` computes, by `attention_one`.

    Args:
        module: an `equinox.nn.MultiheadAttention`, or any object with its fields.
        query: (Sq, query_size). key_: (Sk, key_size). value: (Sk, value_size).
        mask: (Sq, Sk) or (num_heads, Sq, Sk), True where a query attends; or a tilewise mask.
        key, inference: for dropout; the heads' patterns are those of `tilewise.Dropout`, not equinox's.
        process_heads: a function of the heads (S, num_heads, size) of query, key and value: rotary embedding, say.
        options: more of `attention_one`: bias, scale, softcap, sinks, kernel.

    Returns:
        (Sq, output_size).

    Raises:
        ValueError: key_ and value of different lengths, or heads that `process_heads` has reshaped.
    """
    if key_.shape[0] != value.shape[0]:
        raise ValueError(f"value: has {value.shape[0]} rows, expected {key_.shape[0]} as key_ has")
    projections = zip((module.query_proj, module.key_proj, module.value_proj), (query, key_, value), strict=True)
    q, k, v = (jax.vmap(project)(x).reshape(len(x), module.num_heads, -1) for project, x in projections)
    if process_heads is not None:
        before = [q.shape, k.shape, v.shape]
        q, k, v = process_heads(q, k, v)
        if [q.shape, k.shape, v.shape] != before:
            raise ValueError(f"process_heads: returned shapes {[q.shape, k.shape, v.shape]}, expected {before}")
    out = attention_one(q, k, v, mask, dropout=module.dropout, key=key, inference=inference, **options)
    return jax.vmap(module.output_proj)(out.reshape(len(query), -1))


def _dropout(dropout: Any, key: Array | int | None, inference: bool | None) -> Dropout | None:
    """A probability, or an `equinox.nn.Dropout` with the fields p and inference."""
    p = float(getattr(dropout, "p", dropout))
    inference = bool(getattr(dropout, "inference", False)) if inference is None else inference
    if not p or inference:
        return None
    if key is None:
        raise ValueError("key: got None, expected a jax key or an integer seed, as there is dropout")
    return Dropout(p, seed_of(key))
