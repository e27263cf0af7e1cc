"""aten's attention functions of every device: flash-attention on the CPU, and the plain formula with its weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..._api import attention
from ...masks.primitives import causal, dense
from ..torch_mha.checks import expect
from ..torch_mha.weights import attention_weights
from .calls import Dense, gradients
from .shapes import Four, expect_one_mask


def _scaled_dot_product_flash_attention_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, S, D), as aten's function of this name.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D). value: (B, Hkv, Sk, Dv). One floating dtype.
        dropout_p: must be 0.
        is_causal: top-left, query i sees the keys up to i; with `attn_mask` both hold.
        attn_mask: floats added to the scores, (Sq, Sk) or (B or 1, Hq or 1, Sq, Sk).

    Returns:
        output (B, Hq, Sq, Dv), logsumexp (B, Hq, Sq).

    Raises:
        ValueError (also a RuntimeError): inputs or a mask of another rank or kind, or dropout.
    """
    expect(dropout_p == 0, f"dropout_p: got {dropout_p}; Currently do not support dropout > 0")
    for name, array in (("query", query), ("key", key), ("value", value)):
        expect(array.dim() == 4, f"{name}: Accept only 4 dims inputs shape of {{B, H, T, K}}, got {tuple(array.shape)}")
    if attn_mask is not None:
        expect(attn_mask.dim() in (2, 4), f"attn_mask: Attention mask dim in {{2, 4}}, got {attn_mask.dim()}")
        expect(
            attn_mask.is_floating_point(),
            f"attn_mask: got {attn_mask.dtype}, expected floats; Attention mask is the same data type as query",
        )
    return _for_cpu(is_causal, scale)(query, key, value, *([] if attn_mask is None else [attn_mask]))


def _scaled_dot_product_flash_attention_for_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to query, key and value of `_scaled_dot_product_flash_attention_for_cpu`; arguments as there.

    `out` and `logsumexp` may be those of a larger whole that the call was merged into.
    """
    expect(dropout_p == 0, f"dropout_p: got {dropout_p}; Currently do not support dropout > 0")
    inputs = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    return gradients(_for_cpu(is_causal, scale), grad_out, inputs, out, logsumexp)[:3]


def _for_cpu(is_causal: bool, scale: float | None) -> Dense:
    return Dense(causal("start") if is_causal else None, None, scale)


def _scaled_dot_product_attention_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights, as aten's function of this name: quadratic, for the weights are what it is for.

    Args:
        query: (..., Hq, Sq, D). key: (..., Hkv, Sk, D). value: (..., Hkv, Sk, Dv). Leading axes broadcast; Hq and Hkv
            differ only with `enable_gqa`.
        attn_mask: booleans, True = attend (aten, which wants them converted before, adds them as numbers), or floats
            added to the scores, that broadcast to (..., Hq, Sq, Sk).
        dropout_p: torch's own generator draws torch's own pattern.
        is_causal: top-left; not together with `attn_mask`.
        dropout_mask: booleans (..., Hq, Sq, Sk), True = keep, in place of drawn ones.

    Returns:
        output (..., Hq, Sq, Dv) and the weights (..., Hq, Sq, Sk), after dropout (without its factor 1 / (1 - p) where
        `dropout_mask` is given).

    Raises:
        ValueError (also a RuntimeError): a mask together with `is_causal`, or heads that differ unannounced.
    """
    expect_one_mask(attn_mask, is_causal)
    four = Four.of(query, key, value, attn_mask, enable_gqa)
    q, k, v = four.q, four.k, four.v
    mask = bias = hidden = None
    if is_causal:
        mask = causal("start")
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    elif four.mask is not None and four.mask.dtype == torch.bool:
        mask, hidden = dense(four.mask), ~four.mask
    elif four.mask is not None:
        bias, hidden = four.mask, four.mask == -torch.inf
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weights = attention_weights(q, k, scale=factor, added=() if bias is None else (bias,), hidden=hidden)
    if dropout_mask is not None:
        weights = weights.masked_fill(~dropout_mask.reshape(weights.shape), 0.0)
        out = weights @ _as_many(v / (1 - dropout_p), q.shape[1])
    elif dropout_p:
        weights = dropout(weights, dropout_p)
        out = weights @ _as_many(v, q.shape[1])
    else:
        out = attention(q, k, v, mask=mask, bias=bias, scale=scale)
    return four.restore(out), four.restore(weights)


def _as_many(v: Tensor, heads: int) -> Tensor:
    """v (B, Hkv, S, D) with each head repeated for its group of queries."""
    return v if v.shape[1] == heads else v.repeat_interleave(heads // v.shape[1], 1)
