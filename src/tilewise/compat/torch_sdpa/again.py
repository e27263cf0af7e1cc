"""Calls with the shapes and options of an earlier one: nothing is left to check, to fold or to spell."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...torch import again
from ...torch.watch import nobody_else
from .shapes import Folding


def key_of(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> Hashable | None:
    """What an earlier call must share with this one; None for calls that are not remembered.

    Remembered are plain tensors of four axes on the CPU, without dropout, floats to add, or anybody watching.
    """
    if torch.compiler.is_compiling() or not (type(query) is type(key) is type(value) is Tensor) or dropout_p != 0.0:
        return None
    if query.is_nested or key.is_nested or value.is_nested or query.dim() != 4:
        return None
    if attn_mask is not None and (
        type(attn_mask) is not Tensor or attn_mask.dtype != torch.bool or attn_mask.dim() > 4
    ):
        return None
    if not nobody_else((query, key, value)) or torch.is_autocast_enabled("cpu"):
        return None
    if type(is_causal) is not bool or type(enable_gqa) is not bool or not (scale is None or type(scale) is float):
        return None
    mask = None if attn_mask is None else (attn_mask.shape, attn_mask.stride(), attn_mask.device)
    return (
        "sdpa", query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
        query.dtype, key.dtype, value.dtype, key.device, value.device, mask, is_causal, scale, enable_gqa,
    )  # fmt: skip


def attend(
    found: Hashable | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> Tensor | None:
    """The result, where such a call was remembered."""
    known = again.find(found)
    return None if known is None else again.attend(known, query, key, value, attn_mask)[0]


def remember(
    found: Hashable | None, folding: Folding, given: tuple[Tensor, Tensor, Tensor], mask: Any, scale: float | None
) -> None:
    """Remember a call that went well, where its tensors were taken as they came."""
    query, key, value = given
    if found is None or folding.query is not query or folding.key is not key or folding.value is not value:
        return
    if (
        not query.shape[3]
        or not value.shape[3]
        or (not query.is_contiguous() and query.transpose(1, 2).is_contiguous())
    ):
        return
    again.remember(found, scale, mask, "bhsd", None, None, None, False)
