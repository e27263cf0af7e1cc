"""`native_multi_head_attention`: projection, attention and projection of (B, T, D) in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..._api import attention
from ...masks.primitives import lengths
from .checks import AtenError, expect
from .masking import Masking, of_keys, of_scores, of_symbol
from .ragged import Ragged
from .weights import attention_weights


def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention of (B, T, D), as `torch._native_multi_head_attention`, with derivatives.

    Args:
        query, key, value: (B, T, D) of one shape, or nested (B, ragged, D) of equal lengths, of either layout.
        embed_dim: D. num_heads: H, a divisor of D.
        qkv_weight: (3 D, D). qkv_bias: (3 D,). proj_weight: (D, D). proj_bias: (D,).
        mask: True (or not 0) = masked out. Nested inputs take masks, too, with T the longest length.
        need_weights: also give the weights, whose memory is quadratic; without it memory is linear in T.
        average_attn_weights: give their mean over the heads.
        mask_type: 0: mask is (T, T); 1: (B, T), keys; 2: (B, H, T, T), which a 4-D mask is in any case.

    Returns:
        The output, as query in shape and layout, and the weights (B, T, T), or (B, H, T, T) where not averaged; None
        where not asked for, or where query has no elements. A row whose every key is masked out is 0 before the last
        projection, its weights too (aten: NaN).

    Raises:
        ValueError (also a RuntimeError, which aten raises): a shape or a mask type that does not fit.
    """
    _check(query, key, value, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias)
    ragged = Ragged.of(query) if query.is_nested else None
    batch, length = (len(ragged.lengths), ragged.longest) if ragged else (query.shape[0], query.shape[1])
    masking = _masking(mask, mask_type, batch, num_heads, length)
    if (ragged.rows if ragged else query).numel() == 0:
        return torch.empty_like(query), None

    projected = _project(*_rows(ragged, query, key, value), qkv_weight, qkv_bias)
    if ragged:
        projected = [ragged.padded(rows, length) for rows in projected]
        size = torch.tensor(ragged.lengths, device=query.device)
        masking = masking + of_symbol(lengths(q=size, k=size))
    q, k, v = (array.unflatten(-1, (num_heads, -1)).transpose(1, 2) for array in projected)  # (B, H, T, D / H)
    out = attention(q, k, v, mask=masking.mask)
    joined = out.transpose(1, 2).flatten(2)
    result = linear(ragged.unpadded(joined) if ragged else joined, proj_weight, proj_bias)

    weights = None
    if need_weights:
        hidden = masking.hidden(batch, num_heads, length, length, q.device)
        weights = attention_weights(q, k, scale=q.shape[-1] ** -0.5, hidden=hidden)
        weights = weights.mean(1) if average_attn_weights else weights
    return ragged.nested(result) if ragged else result, weights


def _rows(ragged: Ragged | None, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is projected; the same object where the same was given, which then is projected at once."""
    if ragged is None:
        return query, key, value
    found = {id(query): ragged.rows}
    for name, array in (("key", key), ("value", value)):
        if id(array) not in found:
            other = Ragged.of(array)
            expect(other.lengths == ragged.lengths, f"{name}: has lengths {other.lengths}, query {ragged.lengths}")
            found[id(array)] = other.rows
    return found[id(query)], found[id(key)], found[id(value)]


def _project(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The three projections (..., D); one product where all are of the same array."""
    if query is key and key is value:
        return list(linear(query, weight, bias).chunk(3, -1))
    parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    return [linear(array, part, offset) for array, part, offset in parts]


def _masking(mask: Tensor | None, mask_type: int | None, batch: int, heads: int, length: int) -> Masking:
    if mask is None:
        return Masking()
    mask = mask if mask.dtype == torch.bool else mask != 0
    kind = 2 if mask.dim() == 4 else mask_type
    if kind is None:
        raise AtenError("mask_type: got None, expected 0, 1 or 2: Mask Type should be defined")
    shapes = {0: (length, length), 1: (batch, length), 2: (batch, heads, length, length)}
    expect(
        kind in shapes,
        f"mask_type: got {mask_type}; Mask Type should be 0 (src_mask) or 1 (src_key_padding_mask), or 2 "
        "(default_mask)",
    )
    expect(tuple(mask.shape) == shapes[kind], f"mask: has shape {tuple(mask.shape)}, expected {shapes[kind]}")
    if kind == 1:
        return of_keys(mask, length)
    return of_scores(mask if kind == 2 else mask[None, None])


def _check(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int,
    qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
) -> None:  # fmt: skip
    nested = query.is_nested or key.is_nested or value.is_nested
    for name, array in (("query", query), ("key", key), ("value", value)):
        expect(array.dim() == 3, f"{name}: expected 3-D `{name}`, got {array.dim()}-D tensor")
        expect(array.is_nested == nested, f"{name}: expected query, key and value to be nested all three or not at all")
        expect(
            array.size(-1) == width,
            f"{name}: passed-in embed_dim {width} didn't match last dim of {name} {array.size(-1)}",
        )
    if not nested:
        shapes = [tuple(array.shape) for array in (query, key, value)]
        expect(
            shapes[0] == shapes[1] == shapes[2],
            f"key: expected `query`/`key`/`value` shapes to match, got {', '.join(map(str, shapes))}",
        )
    expect(
        heads > 0 and width % heads == 0,
        f"num_heads: `embed_dim` must divide evenly by `num_heads`, got {width} and {heads}",
    )
    for name, array, shape in (
        ("qkv_weight", qkv_weight, (3 * width, width)),
        ("qkv_bias", qkv_bias, (3 * width,)),
        ("proj_weight", proj_weight, (width, width)),
        ("proj_bias", proj_bias, (width,)),
    ):
        expect(
            array.dim() == len(shape),
            f"{name}: expected {len(shape)}-D `{name}`, got {array.dim()}-D tensor",
        )
        expect(tuple(array.shape) == shape, f"{name}: has shape {tuple(array.shape)}, expected {shape}")
