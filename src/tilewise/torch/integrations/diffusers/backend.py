"""tilewise as a backend of diffusers' attention dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from .attention import attend


def register(name: str = "tilewise") -> Any:
    """Make a backend known to diffusers' dispatcher: `model.set_attention_backend(name)`, `attention_backend(name)`.

    The dispatcher takes backends of its own list alone, so the list gets one more member. Registering again changes
    nothing.

    Args:
        name: of the backend, in lower case.

    Returns:
        The member of diffusers' `AttentionBackendName`.
    """
    known = AttentionBackendName._value2member_map_
    if name not in known:
        member = str.__new__(AttentionBackendName, name)
        member._name_, member._value_ = name.upper(), name
        known[name] = AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._member_names_.append(member._name_)
        _AttentionBackendRegistry.register(member)(_attention)
    return known[name]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """The call of the dispatcher: (B, S, H, D) throughout, lse (B, Sq, H); a mask (B, Sk) hides keys.

    Raises:
        ValueError: the model is set up for context parallelism.
    """
    if _parallel_config is not None:
        raise ValueError('_parallel_config: the backend "tilewise" does not support context parallelism')
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    out, lse = attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout="bshd", return_lse=True
    )
    return (out, lse.transpose(1, 2)) if return_lse else out
