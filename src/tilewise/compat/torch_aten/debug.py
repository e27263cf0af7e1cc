"""The matrix of probabilities that aten gives for debugging."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Dropout
from ...masks.algebra import Mask
from ...philox import keep_mask
from ..torch_mha.masking import seen_by
from ..torch_mha.weights import attention_weights


def debug_mask(q: Tensor, k: Tensor, mask: Mask | None, scale: float | None, dropout: Dropout | None) -> Tensor:
    """(B, H, Sq, Sk) probabilities before dropout, those that were dropped negative; quadratic.

    Args:
        q: (B, H, Sq, D). k: (B, Hkv, Sk, D). dropout: with a seed of one element.
    """
    batch, heads, q_len, head_dim = q.shape
    k_len = k.shape[2]
    hidden = None
    if mask is not None:
        hidden = ~seen_by(mask, batch, heads, q_len, k_len, q.device)
    weights = attention_weights(q, k, scale=head_dim**-0.5 if scale is None else scale, hidden=hidden)
    if dropout is None:
        return weights
    sizes = (batch, heads, q_len, k_len)
    b, h, i, j = (
        torch.arange(size, device=q.device).reshape([-1 if axis == n else 1 for axis in range(4)])
        for n, size in enumerate(sizes)
    )
    words = Dropout(dropout.p, (dropout.seed & 0xFFFFFFFF, (dropout.seed >> 32) & 0xFFFFFFFF), dropout.stream)
    kept = keep_mask(words, b, h, i, j, heads, q_len, k_len, torch)
    return torch.where(kept, weights, -weights)
