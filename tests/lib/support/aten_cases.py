"""Plain attention by torch's own operations, whose every derivative torch knows, and the patterns to hold it under."""

from __future__ import annotations

import math
from functools import partial

import torch

make = partial(torch.randn, dtype=torch.float64)


def plain(q, k, v, *, visible=None, bias=None, scale=None):
    """(out, lse) of q (B, Hq, Sq, D), k, v (B, Hkv, Sk, D); `visible` and `bias` broadcast to (B, Hq, Sq, Sk)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores if bias is None else scores + bias
    scores = scores if visible is None else scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    empty = lse == -math.inf
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    return weights @ v, lse


def band(q_len, k_len, offset, left=None, right=None):
    """(Sq, Sk) booleans: offset + i - left <= j <= offset + i + right."""
    distance = torch.arange(k_len) - torch.arange(q_len)[:, None] - offset
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    seen &= True if left is None else distance >= -left
    return seen & (True if right is None else distance <= right)


def starts(lengths):
    """Cumulative lengths (B + 1,), int32."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def schema(name):
    """(names of the arguments, number of results) of aten's operator."""
    found = getattr(torch.ops.aten, name).default._schema
    return [(x.name, x.kwarg_only) for x in found.arguments], len(found.returns)
