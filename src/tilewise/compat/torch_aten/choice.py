"""Which kernel would run: aten's number for it, from our plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._api import explain
from ...contract import Dropout, Plan
from ...masks.primitives import causal, dense
from .shapes import Four, expect_one_mask

# aten's numbers (`torch.nn.attention.SDPBackend`): 0 the plain formula, quadratic; 1 flash, a fused kernel; 2 the
# memory-efficient one, here linear memory out of the framework's own operations.
NUMBERS = {"reference": 0, "portable": 2}
FUSED = 1


def _fused_sdp_choice(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    """The number of the kernel that `scaled_dot_product_attention` of the same arguments would run on.

    Returns:
        1 (flash) where our plan names a fused kernel, 2 (memory-efficient) where it names the portable one, which is
        composed of torch's operations in linear memory, 0 (math) for the quadratic reference. `explain_sdp_choice`
        says why.

    Raises:
        As `explain_sdp_choice`.
    """
    plan = explain_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return NUMBERS.get(plan.kernel, FUSED)


def explain_sdp_choice(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Plan:
    """The plan behind `_fused_sdp_choice`: print it to read which kernel would run and why no other.

    Args:
        query: (..., Hq, Sq, D). key: (..., Hkv, Sk, D). value: (..., Hkv, Sk, Dv). Fake tensors will do.
        attn_mask: booleans, True = attend, or floats added to the scores, that broadcast to (..., Hq, Sq, Sk).

    Raises:
        ValueError (also a RuntimeError): a mask together with `is_causal`, or heads that differ without `enable_gqa`.
    """
    expect_one_mask(attn_mask, is_causal)
    four = Four.of(query, key, value, attn_mask, enable_gqa)
    mask = bias = None
    if is_causal:
        mask = causal("start")
    elif four.mask is not None and four.mask.dtype == torch.bool:
        mask = dense(four.mask)
    else:
        bias = four.mask
    drop = Dropout(dropout_p) if dropout_p else None
    return explain(four.q, four.k, four.v, mask=mask, bias=bias, scale=scale, dropout=drop)
