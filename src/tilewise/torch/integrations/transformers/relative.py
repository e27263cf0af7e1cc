"""A relative bias that travels through a transformers model as if it were a matrix over all pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

# What can be asked of a bias without its elements.
_ABOUT = {
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.ndim.__get__,
    torch.Tensor.layout.__get__, torch.Tensor.is_leaf.__get__, torch.Tensor.grad_fn.__get__,
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point,
}  # fmt: skip


class RelativeBias(torch.Tensor):
    """A tensor (1, H, Sq, Sk) without memory, in place of a bias that depends on the distance j - i alone.

    A model makes its bias in one layer and hands it to the others. The attention takes `table()`, which is computed
    anew each time, so that a layer may be run again for its gradients; any other operation on the tensor becomes the
    same operation on `dense()`. Gradients flow through both.
    """

    make: Callable[..., torch.Tensor]
    past: int | torch.Tensor

    @staticmethod
    def __new__(
        cls, make: Callable[..., torch.Tensor], q_len: int, k_len: int, past: int | torch.Tensor, weight: torch.Tensor
    ) -> RelativeBias:
        self = torch.Tensor._make_wrapper_subclass(
            cls, (1, weight.shape[1], q_len, k_len), dtype=weight.dtype, device=weight.device
        )
        self.make, self.past = make, past
        return self

    def __init__(
        self, make: Callable[..., torch.Tensor], q_len: int, k_len: int, past: int | torch.Tensor, weight: torch.Tensor
    ) -> None:
        """The model's function of (Sq, Sk, past), the sizes, the position of query 0, the weight (buckets, H)."""

    def table(self) -> torch.Tensor:
        """(H, Sq + Sk - 1): the bias at j - i = d stands at d + Sq - 1.

        These are the distances of one query, that in the last row, from as many keys.
        """
        q_len, k_len = self.shape[2:]
        return self.make(1, q_len + k_len - 1, past_seen_tokens=self.past + q_len - 1)[0, :, 0]

    def dense(self) -> torch.Tensor:
        """The elements, (1, H, Sq, Sk)."""
        return self.make(*self.shape[2:], past_seen_tokens=self.past)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"RelativeBias(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # Reentrant checkpoints detach what they hand to a layer and ask what needs a gradient: this object never does,
        # since all gradients reach the weight by `table`.
        if func is torch.Tensor.detach:
            return args[0]
        if func is torch.Tensor.requires_grad.__get__:
            return False
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)
