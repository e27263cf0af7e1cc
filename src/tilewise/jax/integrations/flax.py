"""An `attention_fn` for flax: `linen.MultiHeadDotProductAttention` and `nnx.MultiHeadAttention` take it as it is.

The protocol is that of `flax.linen.dot_product_attention` and `flax.nnx.dot_product_attention` (flax 0.12): linen
passes those keywords that the function names, nnx passes all of its own. Options that flax does not know are given by
`functools.partial(attention_fn, softcap=30.0)`, and `mask` may be a mask of tilewise, which flax hands through.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..._api import attention
from ...contract import Dropout
from ...errors import QuadraticMemory
from ...masks.algebra import Mask
from ...masks.biases import Bias
from ...masks.primitives import Predicate, causal, dense
from ..keys import seed_of

Array = Any


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | int | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    promote_dtype: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    kernel: str | None = None,
) -> Array:
    """Attention as flax's modules call it, in memory linear in Sq + Sk.

    Args:
        query: (…, Sq, Hq, D), any number of batch axes. key: (…, Sk, Hkv, D), where Hq may be a multiple of Hkv.
            value: (…, Sk, Hkv, Dv).
        bias: floats that broadcast to (…, Hq, Sq, Sk), or a tilewise bias; a gradient flows to it.
        mask: of such a shape, True or not zero where a query attends; or a tilewise mask, for which all batch axes are
            one axis B.
        broadcast_dropout: one pattern of dropout (Sq, Sk) for all batch rows and heads, flax's default; the heads are
            then computed one by one. False draws for each: faster, and the bits are those of `tilewise.attention`.
        dropout_rng: a jax key, or an integer seed. dropout_rate: probability to drop. deterministic: do not drop.
        dtype: of the computation and the result; None is the common dtype of query, key and value.
        precision: at least this one for products, where the device has several; accumulation is never below float32.
        module: flax's wish to have the weights stored, which is refused: they are quadratic.
        is_causal: query i sees the keys up to i.
        promote_dtype: as nnx has it, a function of a tuple of arrays and `dtype`; None is flax's own rule.
        force_fp32_for_softmax: nothing to do, since it always is.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: products to be used instead; refused,
            since products and softmax are one computation here.
        scale, softcap, sinks, kernel: as for `tilewise.attention`.

    Returns:
        (…, Sq, Hq, Dv). A row that sees no key is 0; in flax it is a mean of values.

    Raises:
        ValueError: shapes that do not fit, an option that cannot be had; the message begins with the argument's name.
        QuadraticMemory: `module` is given, by `sow_weights=True`.
    """
    if module is not None:
        raise QuadraticMemory(
            "module: sow_weights=True asks for all Sq * Sk weights, which this attention never makes; "
            "leave it out, or use flax's own attention_fn where they are needed"
        )
    for name, einsum in (
        ("einsum_dot_general", einsum_dot_general),
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if einsum is not None:
            raise ValueError(f"{name}: got {einsum!r}, expected None, as products and softmax are one computation here")
    query, key, value = (promote_dtype or _promote)((query, key, value), dtype=dtype)
    batch = _check(query, key, value)
    query, key, value = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    case = _Case(
        query,
        key,
        value,
        mask=_mask(mask, batch),
        is_causal=is_causal,
        bias=_collapse("bias", bias, batch) if bias is not None else None,
        sinks=sinks,
        options={"scale": scale, "softcap": softcap, "kernel": kernel},
    )
    drop = None
    if dropout_rate > 0.0 and not deterministic:
        if dropout_rng is None:
            raise ValueError("dropout_rng: got None, expected a jax key or an integer seed, as dropout_rate is not 0")
        drop = Dropout(dropout_rate, seed_of(dropout_rng))
    with _at_least(precision):
        out = case.attend(drop) if drop is None or not broadcast_dropout else case.attend_with_one_pattern(drop)
    return out.reshape(*batch, *out.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """A call with one batch axis.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv); array masks and biases (B or 1, Hq or 1, Sq or 1, Sk or 1).
    """

    q: Array
    k: Array
    v: Array
    mask: Any
    is_causal: bool
    bias: Any
    sinks: Array | float | None
    options: dict[str, Any]

    def attend(self, dropout: Dropout | None) -> Array:
        mask = self.mask
        if self.is_causal:
            mask = (
                causal("start") if mask is None else causal("start") & (mask if isinstance(mask, Mask) else dense(mask))
            )
        return attention(
            self.q, self.k, self.v, mask=mask, bias=self.bias, sinks=self.sinks, dropout=dropout,
            layout="bshd", **self.options,
        )  # fmt: skip

    def attend_with_one_pattern(self, dropout: Dropout) -> Array:
        """Every head of every batch row as a call of its own: each counts from 0, so all draw the same pattern."""
        for name, symbolic in (("mask", self.mask), ("bias", self.bias)):
            if isinstance(symbolic, Bias) or (isinstance(symbolic, Mask) and _may_differ(symbolic)):
                raise ValueError(
                    f"broadcast_dropout: got True with a {name} that may differ between batch rows or heads, "
                    "expected False, or an array in its place"
                )
        kv_heads = self.k.shape[2]
        groups = self.q.shape[2] // kv_heads if kv_heads else 1

        def split(array: Array, axis: int) -> Array:
            """Query heads as (Hkv, G)."""
            return array.reshape(*array.shape[:axis], kv_heads, groups, *array.shape[axis + 1 :])

        # Mapped, in this order, over batch rows, key heads, and the query heads of each; None where all share.
        parts = {"q": (split(self.q, 2), [0, 1, 1]), "k": (self.k, [0, 1, None]), "v": (self.v, [0, 1, None])}
        for name, array in (("mask", self.mask), ("bias", self.bias)):
            if array is not None and not isinstance(array, Mask):
                rows, heads = array.shape[:2]
                array = split(array, 1) if heads > 1 else array[:, 0]
                array, row_axis = (array, 0) if rows > 1 else (array[0], None)
                parts[name] = (array, [row_axis, *([0, 0] if heads > 1 else [None, None])])
        if self.sinks is not None and jnp.ndim(self.sinks):
            parts["sinks"] = (split(jnp.asarray(self.sinks), 0), [None, 0, 0])

        def one(parts: dict[str, Array]) -> Array:
            q, k, v = (parts[name][None, :, None] for name in "qkv")
            mask, bias = parts.get("mask", self.mask), parts.get("bias", self.bias)
            sinks = parts["sinks"].reshape(1) if "sinks" in parts else self.sinks
            return replace(self, q=q, k=k, v=v, mask=mask, bias=bias, sinks=sinks).attend(dropout)[0, :, 0]

        for level in reversed(range(3)):
            one = jax.vmap(one, in_axes=({name: axes[level] for name, (_, axes) in parts.items()},))
        out = one({name: array for name, (array, _) in parts.items()})  # (B, Hkv, G, Sq, Dv)
        return jnp.moveaxis(out, 3, 1).reshape(*self.q.shape[:3], self.v.shape[3])


def _may_differ(mask: Mask) -> bool:
    """Whether the mask may tell batch rows or heads apart."""
    return mask.extent() != (1, 1) or any(isinstance(leaf, Predicate) for leaf in mask.primitives())


def _promote(arrays: tuple[Array, ...], dtype: Any = None) -> list[Array]:
    """Flax's rule: the dtype asked for, or the common one, which is a float."""
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(jnp.float32, dtype)
    return [jnp.asarray(array, dtype) for array in arrays]


def _check(q: Array, k: Array, v: Array) -> tuple[int, ...]:
    """The batch axes."""
    if q.ndim < 3:
        raise ValueError(f"query: has shape {q.shape}, expected (…, Sq, H, D)")
    for name, array in (("key", k), ("value", v)):
        if array.shape[:-3] != q.shape[:-3] or array.ndim != q.ndim:
            raise ValueError(f"{name}: has shape {array.shape}, expected the batch axes {q.shape[:-3]} of query")
    return q.shape[:-3]


def _mask(mask: Any, batch: tuple[int, ...]) -> Mask | Array | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    mask = jnp.asarray(mask)
    return _collapse("mask", mask if mask.dtype == jnp.bool_ else mask != 0, batch)


def _collapse(name: str, array: Array | Bias, batch: tuple[int, ...]) -> Array | Bias:
    """(…, H', Sq', Sk') with its batch axes made one; without a copy where they are all 1 or all full."""
    if isinstance(array, Bias):
        return array
    array = jnp.asarray(array)
    if array.ndim > len(batch) + 3:
        raise ValueError(f"{name}: has shape {array.shape}, expected at most {len(batch)} batch axes as query has")
    array = array.reshape((1,) * (len(batch) + 3 - array.ndim) + array.shape)
    own, rest = array.shape[:-3], array.shape[-3:]
    if any(size not in (1, full) for size, full in zip(own, batch, strict=True)):
        raise ValueError(f"{name}: has the batch axes {own}, which do not broadcast to those of query, {batch}")
    if own != batch and any(size != 1 for size in own):
        array = jnp.broadcast_to(array, batch + rest)
    return array.reshape(math.prod(array.shape[:-3]), *rest)


# Names for `jax.default_matmul_precision`, by how much they keep; a pair of precisions asks for the better one.
_KEPT = {"default": 0, "bfloat16": 0, "fastest": 0, "high": 1, "bfloat16_3x": 1, "tensorfloat32": 1,
         "highest": 2, "float32": 2}  # fmt: skip


def _at_least(precision: Any) -> AbstractContextManager[Any]:
    """Products traced within have at least this precision."""
    if precision is None:
        return nullcontext()
    wanted = precision if isinstance(precision, tuple) else (precision,)
    names = [str(getattr(one, "name", one)) for one in wanted if one is not None]
    names = [name.lower() if name.lower() in _KEPT else name for name in names]
    return jax.default_matmul_precision(max(names, key=lambda name: _KEPT.get(name, 2), default="default"))
