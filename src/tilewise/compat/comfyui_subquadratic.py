"""Sub-quadratic attention as ComfyUI has it: `efficient_dot_product_attention`, and `attention_sub_quad` above it.

Origin: `comfy/ldm/modules/sub_quadratic_attention.py` and `attention_sub_quad` of `comfy/ldm/modules/attention.py` in
ComfyUI, with its `mask` argument; by way of memory-efficient-attention (Rezaei; Birch) after Rabe and Staats,
"Self-attention Does Not Need O(n^2) Memory" (2021). Layout: heads folded into the batch, keys transposed.

Kept: every name and argument, additive masks, the value's dtype for the output. Different:

- chunk sizes and `use_checkpoint` are taken and need not be heeded: no kernel holds more than tiles smaller than any
  useful chunk, forward or backward, so nothing has to be retried in smaller pieces when memory runs out;
- scores are always made in float32 (float64 for float64), as `upcast_attention` and `attn_precision` ask for;
- a boolean mask means True = attend; the original adds it to the scores as 0 and 1;
- a row whose mask is -inf everywhere is 0; the original gives NaN;
- all of it has derivatives of every order; the original overwrites what its own backward pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import attention, merge
from ..statistics import attention_statistics

__all__ = [
    "AttnChunk",
    "ComputeQueryChunkAttn",
    "ScannedChunk",
    "SummarizeChunk",
    "attention_sub_quad",
    "dynamic_slice",
    "efficient_dot_product_attention",
]


class AttnChunk(NamedTuple):
    """What is known of some queries after a chunk of keys.

    Attributes:
        exp_values: (BH, Tq, Cv) sum of exp(score - max_score) * value.
        exp_weights_sum: (BH, Tq) sum of exp(score - max_score).
        max_score: (BH, Tq) largest score, no gradient.
    """

    exp_values: Tensor
    exp_weights_sum: Tensor
    max_score: Tensor


class ScannedChunk(NamedTuple):
    """A chunk and where its keys begin."""

    chunk_idx: int
    attn_chunk: AttnChunk


class SummarizeChunk(Protocol):
    """A function from query (BH, Tq, C), key_t (BH, C, Tk) and value (BH, Tk, Cv) to an `AttnChunk`."""

    @staticmethod
    def __call__(query: Tensor, key_t: Tensor, value: Tensor, **options: Any) -> AttnChunk: ...


class ComputeQueryChunkAttn(Protocol):
    """A function from query (BH, Tq, C), key_t (BH, C, Tk) and value (BH, Tk, Cv) to the output (BH, Tq, Cv)."""

    @staticmethod
    def __call__(query: Tensor, key_t: Tensor, value: Tensor) -> Tensor: ...


def dynamic_slice(x: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """x[starts[0] : starts[0] + sizes[0], …], a view.

    Args:
        x: any tensor; starts, sizes: one int per axis, or for the first axes alone.

    Raises:
        ValueError: as many starts as sizes are not given, or more than x has axes.
    """
    if len(starts) != len(sizes) or len(sizes) > x.ndim:
        raise ValueError(f"sizes: got {len(sizes)} sizes and {len(starts)} starts, expected as many, up to {x.ndim}")
    return x[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def efficient_dot_product_attention(
    query: Tensor,
    key_t: Tensor,
    value: Tensor,
    query_chunk_size: int = 1024,
    kv_chunk_size: int | None = None,
    kv_chunk_size_min: int | None = None,
    use_checkpoint: bool = True,
    upcast_attention: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention in linear memory, scaled by 1 / sqrt(C).

    Args:
        query: (BH, Tq, C); key_t: (BH, C, Tk); value: (BH, Tk, Cv); BH is batch times heads.
        query_chunk_size, kv_chunk_size, kv_chunk_size_min: hints, which no result depends on.
        use_checkpoint, upcast_attention: see above; results are those of both.
        mask: added to the scores, or booleans with True = attend: (BH or 1, Tq or 1, Tk), or (Tq or 1, Tk).

    Returns:
        (BH, Tq, Cv), value's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """
    if query_chunk_size < 1:
        raise ValueError(f"query_chunk_size: got {query_chunk_size}, expected a positive number of tokens")
    for name, hint in (("kv_chunk_size", kv_chunk_size), ("kv_chunk_size_min", kv_chunk_size_min)):
        if hint is not None and hint < 0:
            raise ValueError(f"{name}: got {hint}, expected a number of tokens or None")
    _check_folded(query, key_t, value)
    q, k, v = _one_dtype(query[:, None], key_t.mT[:, None], value[:, None])
    mask = mask if mask is None or mask.ndim == 2 else mask[:, None]
    return attention(q, k, v, **_masks(mask))[:, 0].to(value.dtype)


def attention_sub_quad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention of several heads, as ComfyUI's models call it.

    Args:
        query: (B, Tq, heads * C), key: (B, Tk, heads * C), value: (B, Tk, heads * Cv); with `skip_reshape` they are
            (B, heads, T, C) already.
        heads: number of query heads.
        mask: added to the scores, or booleans with True = attend: (Tq, Tk), (B or 1, Tq or 1, Tk) or
            (B or 1, heads or 1, Tq or 1, Tk); booleans (B, Tk) say which keys are real, where they are no (Tq, Tk).
        attn_precision: see above; it is never less than float32.
        skip_output_reshape: give (B, heads, Tq, Cv).
        kwargs: `scale`, a factor of q.k in place of 1 / sqrt(C); `enable_gqa`, whether key and value may have fewer
            heads. What else ComfyUI passes along (`transformer_options`, …) does not matter here.

    Returns:
        (B, Tq, heads * Cv), query's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """
    if not skip_reshape:
        query = _split("query", query, heads)
        kv_heads = heads
        if kwargs.get("enable_gqa", False):
            kv_heads = key.shape[-1] // query.shape[-1]
        key, value = _split("key", key, kv_heads), _split("value", value, kv_heads)
    q, k, v = _one_dtype(query, key, value)
    mask = _over_heads(mask, query.shape[0], query.shape[2], key.shape[2])
    out = attention(q, k, v, scale=kwargs.get("scale"), **_masks(mask)).to(query.dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _summarize_chunk(
    query: Tensor, key_t: Tensor, value: Tensor, scale: float, upcast_attention: bool, mask: Tensor | None = None
) -> AttnChunk:
    """The summary of one chunk of keys; mask (BH or 1, Tq or 1, Tk). Others' patches import it."""
    q, k, v = _one_dtype(query[:, None], key_t.mT[:, None], value[:, None])
    options = {"scale": scale, **_masks(None if mask is None else mask[:, None])}
    out, lse = (found[:, 0] for found in attention(q, k, v, **options, return_lse=True))
    peak = attention_statistics(q.detach(), k.detach(), **options, max_logit=True).max_logit
    assert peak is not None
    peak = peak[:, 0]
    total = torch.where(lse == -math.inf, 0.0, torch.exp(lse - torch.where(peak == -math.inf, 0.0, peak)))
    return AttnChunk((out * total[..., None]).to(value.dtype), total.to(value.dtype), peak)


def _query_chunk_attention(
    query: Tensor,
    key_t: Tensor,
    value: Tensor,
    summarize_chunk: SummarizeChunk,
    kv_chunk_size: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Chunks of keys as `summarize_chunk` sees them, merged: (BH, Tq, Cv). Others' patches import it."""
    parts: list[Tensor] = []
    for first in range(0, key_t.shape[-1], kv_chunk_size):
        keys = slice(first, first + kv_chunk_size)
        chunk = query, key_t[..., keys], value[:, keys]
        values, weights, peak = (
            summarize_chunk(*chunk) if mask is None else summarize_chunk(*chunk, mask=mask[..., keys])
        )
        nothing = weights == 0
        weights = torch.where(nothing, 1.0, weights).to(peak.dtype)
        parts += [values / weights[..., None].to(values.dtype), torch.where(nothing, -math.inf, peak + weights.log())]
    if not parts:
        return value.new_zeros((*query.shape[:2], value.shape[2]))
    merged = parts[0] if len(parts) == 2 else merge(*(part[:, None] for part in parts))[0][:, 0]
    return merged.to(value.dtype)


def _get_attention_scores_no_kv_chunking(
    query: Tensor, key_t: Tensor, value: Tensor, scale: float, upcast_attention: bool, mask: Tensor | None = None
) -> Tensor:
    """All keys at once: (BH, Tq, Cv)."""
    q, k, v = _one_dtype(query[:, None], key_t.mT[:, None], value[:, None])
    mask = None if mask is None else mask[:, None]
    return attention(q, k, v, scale=scale, **_masks(mask))[:, 0].to(value.dtype)


def _check_folded(query: Tensor, key_t: Tensor, value: Tensor) -> None:
    for name, array, axes in (
        ("query", query, "(BH, Tq, C)"),
        ("key_t", key_t, "(BH, C, Tk)"),
        ("value", value, "(BH, Tk, Cv)"),
    ):
        if array.ndim != 3:
            raise ValueError(f"{name}: has shape {tuple(array.shape)}, expected {axes}")
    if key_t.shape[:2] != (query.shape[0], query.shape[2]):
        raise ValueError(f"key_t: has shape {tuple(key_t.shape)}, expected ({query.shape[0]}, {query.shape[2]}, Tk)")
    if value.shape[:2] != (query.shape[0], key_t.shape[2]):
        raise ValueError(f"value: has shape {tuple(value.shape)}, expected ({query.shape[0]}, {key_t.shape[2]}, Cv)")


def _one_dtype(*arrays: Tensor) -> tuple[Tensor, ...]:
    """Promoted to what torch makes of them: models keep values in a half type beside float32 queries."""
    dtype = reduce(torch.promote_types, (array.dtype for array in arrays))
    return tuple(array.to(dtype) for array in arrays)


def _masks(mask: Tensor | None) -> dict[str, Tensor]:
    """A mask as the argument of `attention` that it is."""
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"mask": mask}
    return {"bias": mask if mask.is_floating_point() else mask.to(torch.float32)}


def _split(name: str, array: Tensor, heads: int) -> Tensor:
    """(B, T, heads * C) as (B, heads, T, C), a view."""
    if array.ndim != 3 or heads < 1 or array.shape[-1] % heads:
        raise ValueError(f"{name}: has shape {tuple(array.shape)}, expected (B, T, heads * C) with {heads} heads")
    return array.unflatten(-1, (heads, -1)).transpose(1, 2)


def _over_heads(mask: Tensor | None, batch: int, q_len: int, k_len: int) -> Tensor | None:
    """The mask as it broadcasts to (B, heads, Tq, Tk)."""
    if mask is None or mask.ndim > 3:
        return mask
    if mask.ndim == 3:
        return mask[:, None]
    padding = mask.dtype == torch.bool and mask.shape == (batch, k_len) and mask.shape[0] not in (1, q_len)
    return mask[:, None, None] if padding else mask
