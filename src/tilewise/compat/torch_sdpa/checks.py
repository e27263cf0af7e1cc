"""What torch refuses, we refuse: the same classes of errors, the argument named first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SdpaError(ValueError, RuntimeError):
    """A wrong argument: what tilewise promises (ValueError) and what torch raises (RuntimeError) at once."""


def check_arguments(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> None:
    """TypeErrors where torch's parser of arguments raises them."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    for position, (name, tensor) in enumerate(tensors.items(), 1):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "attn_mask"):
            raise _wrong_type(name, "Tensor", tensor, position)
    if not _is_number(dropout_p):
        raise _wrong_type("dropout_p", "float", dropout_p, 5)
    if not isinstance(is_causal, bool):
        raise _wrong_type("is_causal", "bool", is_causal, 6)
    if scale is not None and not _is_number(scale):
        raise _wrong_type("scale", "float", scale)
    if not isinstance(enable_gqa, bool):
        raise _wrong_type("enable_gqa", "bool", enable_gqa)


def _wrong_type(name: str, wanted: str, got: Any, position: int | None = None) -> TypeError:
    place = f" (position {position})" if position else ""
    return TypeError(f"{name}: argument '{name}'{place} must be {wanted}, not {type(got).__name__}")


def _is_number(value: Any) -> bool:
    """Whether torch takes a value for a number: a tensor of no axes that wants no gradient is one."""
    if isinstance(value, float | int | torch.SymFloat | torch.SymInt):
        return True
    if isinstance(value, Tensor):
        return not value.dim() and not value.requires_grad
    return hasattr(value, "__float__") and getattr(value, "shape", None) == ()


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> None:
    """Ranks, dtypes, devices and the options that exclude each other; tensors as autocast left them."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise SdpaError(
            f"query: Expected query, key, and value to all be at least 2 dimensional, but got query.dim: {query.dim()} "
            f"key.dim: {key.dim()} and value.dim: {value.dim()} instead"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise SdpaError(
                f"{name}: Expected query, key, and value to have the same dtype, but got query.dtype: {query.dtype} "
                f"key.dtype: {key.dtype} and value.dtype: {value.dtype} instead"
            )
        if tensor.device != query.device:
            raise SdpaError(
                f"{name}: Expected query, key, and value to have the same device type, but got query.device: "
                f"{query.device} key.device: {key.device} and value.device: {value.device} instead"
            )
        if tensor.layout != torch.strided and not tensor.is_nested:
            raise SdpaError(f"{name}: has layout {tensor.layout}, expected torch.strided, or a nested tensor")
    if query.dtype not in _DTYPES:
        raise SdpaError(f"query: got dtype {query.dtype}, expected float64, float32, float16 or bfloat16")
    if not 0.0 <= dropout_p <= 1.0:
        raise SdpaError(f"dropout_p: dropout probability has to be between 0 and 1, but got {dropout_p}")
    if attn_mask is not None:
        check_mask(attn_mask, query, is_causal)


def check_mask(attn_mask: Tensor, query: Tensor, is_causal: bool) -> None:
    """The mask's dtype and device, and that there is no second one."""
    if is_causal:
        raise SdpaError("attn_mask: Explicit attn_mask should not be set when is_causal=True")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not _cast(attn_mask, query.device.type):
        raise SdpaError(
            "attn_mask: Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            f"attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead"
        )
    if attn_mask.device != query.device:
        raise SdpaError(f"attn_mask: is on {attn_mask.device}, not on the expected device {query.device}")


def _cast(attn_mask: Tensor, kind: str) -> bool:
    """Whether autocast would bring the mask to the queries' dtype. Ours reads it as it is, so it need not be."""
    halves = (torch.float16, torch.bfloat16)
    return attn_mask.dtype in halves and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
