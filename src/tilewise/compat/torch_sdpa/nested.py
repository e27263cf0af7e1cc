"""Nested queries, keys and values: torch's arguments become one call of `tilewise.torch.nested_attention`.

torch refuses a mask here, and on most devices causal, too; ours takes both. A mask is made for the longest sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...masks.algebra import Mask
from ...torch.call import autocast
from ...torch.ragged import nested_attention as ragged_attention
from .checks import SdpaError, check_mask, check_tensors


def nested_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, variant: Mask | None,
    dropout_p: float, is_causal: bool, *, scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """As the dense function; `variant` is the mask of a `CausalBias`."""
    from .attention import dropout_of, finite_scale, mask_and_bias, scaled_dot_product_attention

    query, key, value = autocast(query, key, value)
    check_tensors(query, key, value, None, dropout_p, is_causal)
    if all(_ragged_before_sequence(x) for x in (query, key, value)):
        rows = scaled_dot_product_attention(
            query.values(), key.values(), value.values(), attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
        return torch.nested.nested_tensor_from_jagged(rows, query.offsets(), query.lengths())
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() not in (3, 4):
            raise SdpaError(f"{name}: has {x.dim()} axes, expected 3 or 4 as torch takes nested tensors")
        if x.dim() == query.dim() == 4 and not enable_gqa and x.size(1) not in (1, query.size(1)):
            raise SdpaError(f"{name}: has {x.size(1)} heads, expected {query.size(1)} as query has, or enable_gqa=True")
    if attn_mask is not None:
        if attn_mask.is_nested:
            raise SdpaError("attn_mask: is nested, expected a plain tensor made for the longest sequence")
        check_mask(attn_mask, query, is_causal)
        attn_mask = attn_mask.unsqueeze(1) if query.dim() == 3 and attn_mask.dim() == 3 else attn_mask
    mask, bias = mask_and_bias(attn_mask, is_causal)
    query, scale = finite_scale(query, scale)
    return ragged_attention(
        query, key, value, mask=mask if variant is None else variant, bias=bias, scale=scale,
        dropout=dropout_of(float(dropout_p), query.device),
    )  # fmt: skip


def _ragged_before_sequence(x: Any) -> bool:
    """A jagged (B, j, L, E): the second axis is ragged, so the rows (T, L, E) are plain batches of plain sequences."""
    return bool(x.is_nested and x.layout == torch.jagged and x.dim() > 3 and x._ragged_idx == 1)
