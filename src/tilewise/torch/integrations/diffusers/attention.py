"""Attention with the arguments of `torch.nn.functional.scaled_dot_product_attention`, in either layout."""

from __future__ import annotations

from typing import Any

import torch

from ...._api import attention
from ....contract import Dropout
from ....masks.algebra import Mask
from ....masks.primitives import causal, dense
from ..autocast import as_autocast


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bhsd",
    return_lse: bool = False,
) -> Any:
    """As torch's function, on tilewise.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D). value: (B, Hkv, Sk, Dv). With `layout="bshd"` S is before H.
        attn_mask: booleans, True = attend, or floats to be added; broadcasts to (B, Hq, Sq, Sk).
        dropout_p: probability to drop; the seed is drawn from torch's default generator.
        is_causal: query i sees keys up to i, also where Sq and Sk differ; in addition to `attn_mask`.
        scale: factor of the scores; None is 1 / sqrt(D).
        enable_gqa: nothing to do; fewer kv heads than query heads are always allowed.
        return_lse: also return the log of each row's denominator, float32.

    Returns:
        out (B, Hq, Sq, Dv) in the layout, query's dtype or torch.autocast's; with `return_lse` the
        pair (out, lse), lse (B, Hq, Sq).
    """
    query, key, value = as_autocast(query, key, value)
    mask: Mask | None = causal("start") if is_causal else None
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = dense(attn_mask)
        mask = seen if mask is None else mask & seen
    else:
        bias = attn_mask
    dropout = Dropout(dropout_p, torch.randint(2**63 - 1, (), device="cpu")) if dropout_p else None
    return attention(
        query, key, value, mask=mask, bias=bias, scale=scale, dropout=dropout, layout=layout, return_lse=return_lse
    )
