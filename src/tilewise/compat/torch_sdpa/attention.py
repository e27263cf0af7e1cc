"""The function itself: torch's arguments become one call of `tilewise.attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function

from ... import _api
from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.primitives import causal, dense
from ...torch.call import autocast
from ..torch_seeds import fresh_seed
from . import again
from .checks import SdpaError, check_arguments, check_tensors
from .shapes import Folding, fold

_TOP_LEFT = causal("start")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, for every shape and option, in linear memory.

    Args:
        query: (…, Hq, L, E), two or more axes; float64, float32, float16 or bfloat16. Or nested, as torch takes it.
        key: (…, Hkv, S, E), query's dtype and device. value: (…, Hkv, S, Ev). Leading axes broadcast.
        attn_mask: broadcasts to (…, Hq, L, S). Booleans: True = attend; floats (float32, or query's dtype) are added to
            the scores and get a gradient. Or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: probability of dropping; the bits come from the device's default generator (`torch.manual_seed`).
        is_causal: query i sees keys j <= i, whatever L and S.
        scale: factor of the scores; None is 1 / sqrt(E).
        enable_gqa: Hq may be a multiple of Hkv (of key and of value); query head h reads head h // (Hq // Hkv).

    Returns:
        (…, Hq, L, Ev) in query's dtype (autocast's, where it is on). A row that sees nothing is 0.

    Raises:
        TypeError: an argument of a wrong type. RuntimeError (a ValueError, too): shapes, dtypes or devices that do not
            fit, a mask together with `is_causal`, a probability outside 0 … 1.
    """
    like = again.key_of(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    known = again.attend(like, query, key, value, attn_mask)
    if known is not None:
        return known
    check_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    given, variant = attn_mask, None
    if attn_mask is not None and type(attn_mask) not in (Tensor, Parameter):
        attn_mask, variant = _causal_bias(attn_mask, query, key, is_causal)
    if query.is_nested or key.is_nested or value.is_nested:
        from .nested import nested_attention  # nested tensors are rare, and their room is large

        return nested_attention(
            query, key, value, attn_mask, variant, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            scaled_dot_product_attention, tensors, query, key, value, attn_mask=given, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    query, key, value = autocast(query, key, value)
    check_tensors(query, key, value, attn_mask, dropout_p, is_causal)
    folding = fold(query, key, value, attn_mask, enable_gqa)
    mask, bias = mask_and_bias(folding.mask, is_causal)
    out = _attend(folding, variant if variant is not None else mask, bias, float(dropout_p), scale)
    again.remember(like, folding, (query, key, value), mask, scale)
    return folding.unfold(out)


def mask_and_bias(attn_mask: Tensor | None, is_causal: bool) -> tuple[Mask | None, Tensor | None]:
    """torch's one mask as ours: booleans mask, floats are a bias."""
    if attn_mask is None:
        return (_TOP_LEFT if is_causal else None), None
    return (dense(attn_mask), None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def dropout_of(p: float, device: torch.device) -> Dropout | None:
    """Dropout with a seed from the device's default generator; None for 0."""
    return Dropout(p, fresh_seed(device)) if p else None


def finite_scale(query: Tensor, scale: Any) -> tuple[Tensor, float | None]:
    """query and scale, so that the scale is finite: torch lets any number through, and inf and NaN with it."""
    if scale is None:
        return query, None if query.size(-1) else 1.0
    scale = float(scale)
    return (query, scale) if math.isfinite(scale) else (query * scale, 1.0)


def _attend(folding: Folding, mask: Mask | None, bias: Tensor | None, p: float, scale: Any) -> Tensor:
    """out (B, Hq, L, Ev)."""
    q, k, v = folding.query, folding.key, folding.value
    q, scale = finite_scale(q, scale)
    width = v.shape[3]
    if not q.shape[3]:  # no feature: all scores are equal
        q, k = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k))
    if not width:
        v = torch.nn.functional.pad(v, (0, 1))
    # Memory in the order of the queries, so that whoever transposed (B, L, H, E) can view the result back.
    swapped = not q.is_contiguous() and q.transpose(1, 2).is_contiguous()
    if swapped:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _api.attention(
        q, k, v, mask=mask, bias=bias, scale=scale, dropout=dropout_of(p, q.device),
        layout="bshd" if swapped else "bhsd",
    )  # fmt: skip
    out = out.transpose(1, 2) if swapped else out
    return out if width else out[..., :0]


def _causal_bias(attn_mask: Any, query: Tensor, key: Tensor, is_causal: bool) -> tuple[Tensor | None, Mask | None]:
    """(mask, None) for what is a tensor after all, (None, mask of ours) for torch's `CausalBias`."""
    from torch.nn.attention.bias import CausalBias, CausalVariant  # loads torch's compiler, so only when needed

    if not isinstance(attn_mask, CausalBias):
        return attn_mask, None
    if is_causal:
        raise SdpaError("attn_mask: CausalBias should not be used with is_causal=True")
    if attn_mask.variant == CausalVariant.UPPER_LEFT:
        return None, _TOP_LEFT
    sizes, expected = (query.shape[-2], key.shape[-2]), (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if not query.is_nested and not key.is_nested and sizes != expected:
        raise SdpaError(f"attn_mask: causal_lower_right{expected} got {sizes[0]} queries and {sizes[1]} keys")
    return None, causal("end")
