"""The checks of `multi_head_attention_forward`: torch's own, in its error classes, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks.algebra import Mask
from .checks import ShapeError


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | Mask | None,
    num_heads: int,
    embed_dim: int,
) -> bool:
    """Whether the call is batched, (L, B, E), or not, (L, E).

    Raises:
        ValueError (also an AssertionError): ranks, dtypes of masks or sizes that do not fit.
    """
    if query.dim() not in (2, 3):
        raise ShapeError(
            f"query: query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    rank = query.dim()
    kind = "batched (3-D)" if rank == 3 else "unbatched (2-D)"
    if key.dim() != rank or value.dim() != rank:
        raise ShapeError(
            f"key: For {kind} `query`, expected `key` and `value` to be {rank}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if isinstance(mask, Tensor) and mask.dtype != torch.bool and not mask.is_floating_point():
            raise ShapeError(f"{name}: only bool and floating types of {name} are supported, got {mask.dtype}")
    if key_padding_mask is not None and key_padding_mask.dim() != rank - 1:
        raise ShapeError(
            f"key_padding_mask: For {kind} `query`, expected `key_padding_mask` to be `None` or {rank - 1}-D"
            f" but found {key_padding_mask.dim()}-D tensor instead"
        )
    if isinstance(attn_mask, Tensor):
        if attn_mask.dim() not in (2, 3):
            raise ShapeError(
                f"attn_mask: For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
                f" but found {attn_mask.dim()}-D tensor instead"
            )
        expected = (num_heads, query.shape[0], key.shape[0])
        if rank == 2 and attn_mask.dim() == 3 and tuple(attn_mask.shape) != expected:
            raise ShapeError(f"attn_mask: Expected `attn_mask` shape to be {expected} but got {tuple(attn_mask.shape)}")
    if query.shape[-1] != embed_dim:
        raise ShapeError(f"query: was expecting embedding dimension of {embed_dim}, but got {query.shape[-1]}")
    if num_heads < 1 or embed_dim % num_heads:
        raise ShapeError(f"num_heads: embed_dim {embed_dim} not divisible by num_heads {num_heads}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ShapeError(
            f"key: key's sequence and batch dims {tuple(key.shape[:-1])} do not match value's {tuple(value.shape[:-1])}"
        )
    return rank == 3


def check_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | Mask | None,
    batch: int,
    num_heads: int,
    q_len: int,
    k_len: int,
    static_k: Tensor | None,
) -> None:
    """Raise unless the masks fit: RuntimeError for `attn_mask`, ShapeError for `key_padding_mask`, as torch does."""
    if isinstance(attn_mask, Tensor):
        expected = (q_len, k_len) if attn_mask.dim() == 2 else (batch * num_heads, q_len, k_len)
        if tuple(attn_mask.shape) != expected:
            raise RuntimeError(
                f"attn_mask: The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, "
                f"but should be {expected}."
            )
    if key_padding_mask is not None:
        length = k_len if static_k is None else static_k.shape[1]
        for axis, size in enumerate((batch, length)):
            if key_padding_mask.shape[axis] != size:
                raise ShapeError(
                    f"key_padding_mask: Expected key_padded_mask.shape[{axis}] to be {size}, "
                    f"but got {key_padding_mask.shape[axis]}"
                )
