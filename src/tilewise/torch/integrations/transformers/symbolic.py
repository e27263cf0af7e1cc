"""A tilewise mask that travels through a transformers model as if it were a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ....masks.algebra import Mask
from ....masks.materialize import materialize

# Operations after which the mask is still the same mask, perhaps on another device.
_KEEPING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class SymbolicMask(torch.Tensor):
    """A tensor (B, 1, Sq, Sk) without memory, that holds a mask in place of its elements.

    Models hand their mask from the place where it is made to the attention, and on the way look at its type and shape;
    a few cut or combine it. Between the two nothing of size Sq * Sk needs to exist, so this tensor has a shape, a dtype
    and a device alone. The attention takes `mask`; any other operation on the tensor first becomes the same operation
    on `dense()`, so that a model that computes with its mask stays right, in the memory that it asked for.

    Its dtype says what those elements are, as in transformers: booleans, True = attend; or floats to be added to the
    scores, 0 or the dtype's lowest value.

    Attributes:
        mask: the mask, whose operands are NumPy arrays; None where every query sees every key.
    """

    mask: Mask | None

    @staticmethod
    def __new__(
        cls, mask: Mask | None, shape: Iterable[int], device: torch.device | str, dtype: torch.dtype = torch.bool
    ) -> SymbolicMask:
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device(device))
        self.mask = mask
        return self

    def __init__(
        self, mask: Mask | None, shape: Iterable[int], device: torch.device | str, dtype: torch.dtype = torch.bool
    ) -> None:
        """The mask, (B, 1, Sq, Sk), the device that elements would be on, and what they would be."""

    def dense(self) -> torch.Tensor:
        """The elements (B, 1, Sq, Sk)."""
        seen = self._seen()
        if self.dtype == torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(
            ~seen, torch.finfo(self.dtype).min
        )

    def _seen(self) -> torch.Tensor:
        batch, heads, q_len, k_len = self.shape
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        return torch.from_numpy(materialize(self.mask, q_len, k_len, batch=batch, heads=heads)).to(self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SymbolicMask({self.mask}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEEPING:
            return cls(args[0].mask, args[0].shape, args[0].device, args[0].dtype)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return cls(args[0].mask, args[0].shape, kwargs.get("device") or args[0].device, args[0].dtype)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)

    # Without this, torch would wrap every result as this class again, though results have elements.
    __torch_function__ = torch._C._disabled_torch_function_impl
