"""Inputs of any rank as (B, H, S, D), by the rules of aten's plain formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_mha.checks import expect


@dataclass(frozen=True, eq=False)
class Four:
    """q (B, Hq, Sq, D), k, v (B, Hkv, Sk, D) and a mask (B or 1, Hq or 1, Sq or 1, Sk or 1), from inputs of one rank.

    Attributes:
        lead: the axes before (Sq, D) as the caller has them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    lead: tuple[int, ...]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> Four:
        """Leading axes broadcast, heads too unless `enable_gqa` lets queries share keys.

        Raises:
            ValueError (also a RuntimeError): fewer than 2 axes, or leading axes that do not broadcast.
        """
        for name, array in (("query", query), ("key", key), ("value", value)):
            expect(array.dim() >= 2, f"{name}: has {array.dim()} axes, expected at least 2")
        keep = 3 if enable_gqa else 2
        arrays = (query, key, value)
        try:
            batch = torch.broadcast_shapes(*(array.shape[:-keep] for array in arrays))
        except RuntimeError:
            shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
            expect(False, f"key: leading axes of {shapes} do not broadcast; heads may differ with enable_gqa alone")
        arrays = tuple(array.expand(*batch, *array.shape[-keep:]) for array in arrays)
        lead = tuple(arrays[0].shape[:-2])
        if mask is not None:
            if any(size != 1 for size in mask.shape[:-3]):
                mask = mask.expand(*lead[:-1], *mask.shape[-3:])
            mask = _four_of(mask)
        q, k, v = (_four_of(array) for array in arrays)
        return cls(q, k, v, mask, lead)

    def restore(self, array: Tensor) -> Tensor:
        """(B, Hq, Sq, X) with the caller's leading axes."""
        return array.reshape(*self.lead, *array.shape[-2:])


def _four_of(array: Tensor) -> Tensor:
    """The last three axes, with all before them as one."""
    while array.dim() < 4:
        array = array[None]
    return array.flatten(0, -4)


def expect_one_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise unless at most one of them is given."""
    expect(
        attn_mask is None or not is_causal,
        "attn_mask: Explicit attn_mask should not be set when is_causal=True",
    )
