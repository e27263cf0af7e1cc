"""Attention weights as a matrix: quadratic, so only where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_weights(
    q: Tensor, k: Tensor, *, scale: float, added: Sequence[Tensor] = (), hidden: Tensor | None = None
) -> Tensor:
    """The probabilities behind an attention, with every derivative.

    Args:
        q: (B, Hq, L, D). k: (B, Hkv, S, D), Hkv a divisor of Hq; half types are multiplied in float32.
        scale: factor of q.k.
        added: floats that broadcast to (B, Hq, L, S).
        hidden: booleans that broadcast to (B, Hq, L, S), True where the weight is 0 whatever the score.

    Returns:
        (B, Hq, L, S), q's dtype; rows add up to 1, or to 0 where nothing is seen.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    for bias in added:
        scores = scores + bias.to(wide)
    if hidden is None:
        return scores.softmax(-1).to(q.dtype)
    # A row of -inf alone has no softmax, and its NaN would reach the gradients; it is put aside and set to 0 after.
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(empty, 0.0)
    return scores.softmax(-1).masked_fill(empty, 0.0).to(q.dtype)
