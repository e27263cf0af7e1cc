"""`FlashAttentionTwo` of zeta, as its documentation describes it (the class itself was removed from zeta in 2023).

Layout: (B, N, dim) in and out; projections without bias, named `to_q`, `to_kv` and `to_out` as in the original, so its
checkpoints load. Different:

- causal with more keys than queries lets the last query see the last key; the original's offset had the wrong sign;
- sums are not clamped, and a row whose keys are all masked is 0;
- bucket sizes are taken and need not be heeded: no kernel holds more than tiles smaller than any useful bucket;
- `parallel` splits the heads over the processes of torch.distributed; the original tried to copy itself to all devices;
- with `mixed_precision` the output still has the input's dtype.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import attention, causal, dense

__all__ = ["FlashAttentionTwo"]


class FlashAttentionTwo(nn.Module):
    """Multi-head attention with its projections, in linear memory.

    Args:
        dim: width of the input and the output.
        heads, dim_head: number of heads and their width.
        causal: whether a query sees only the keys up to its own place, counted from the end.
        q_bucket_size, k_bucket_size: hints, which no result depends on.
        parallel: split the heads over the processes of torch.distributed's default group, all of which must be given
            the same weights, inputs and gradients, and get the same results; without a group it says so and has no
            effect.
        mixed_precision: project and attend in the device's half type (`torch.get_autocast_dtype`), summing in float32.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = False,
        q_bucket_size: int = 512,
        k_bucket_size: int = 1024,
        parallel: bool = False,
        mixed_precision: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("dim_head", dim_head)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected a positive int")
        _check_buckets(q_bucket_size, k_bucket_size)
        self.heads, self.dim_head, self.causal = heads, dim_head, causal
        self.q_bucket_size, self.k_bucket_size = q_bucket_size, k_bucket_size
        self.parallel, self.mixed_precision = parallel, mixed_precision
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
    ) -> Tensor:
        """Attention of x to the context.

        Args:
            x: (B, N, dim); context: (B, M, dim), None is x itself.
            mask: (B, M), True or not 0 = a key to attend to.
            q_bucket_size, k_bucket_size: as for the class.

        Returns:
            (B, N, dim), x's dtype.

        Raises:
            ValueError: an argument is wrong; the message begins with its name.
            PeerLost: with `parallel`, a process is gone or does not answer.
        """
        _check_buckets(q_bucket_size, k_bucket_size)
        context = x if context is None else context
        seen = self._mask(x, context, mask)
        precise = torch.autocast(x.device.type) if self.mixed_precision else nullcontext()
        with precise:
            if self.parallel and self._processes() > 1:
                return self._share_of_heads(x, context, seen).to(x.dtype)
            q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, -1)
            return self.to_out(self._attend(q, k, v, self.heads, seen)).to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any) -> Tensor:
        """q (B, N, heads * dim_head), k and v (B, M, heads * dim_head): (B, N, heads * dim_head)."""
        q, k, v = (part.unflatten(-1, (heads, self.dim_head)) for part in (q, k, v))
        return attention(q, k, v, mask=mask, layout="bshd").flatten(2)

    def _share_of_heads(self, x: Tensor, context: Tensor, mask: Any) -> Tensor:
        """The same output, each process computing some of the heads."""
        from ..torch.distributed import copied, summed  # needed by few, and torch need not have been built for it

        count, rank = dist.get_world_size(), dist.get_rank()
        first, last = self.heads * rank // count, self.heads * (rank + 1) // count
        own = slice(first * self.dim_head, last * self.dim_head)
        x, context = (copied(x), copied(context)) if x is not context else (copied(x),) * 2
        to_q, to_kv, to_out = (copied(part.weight) for part in (self.to_q, self.to_kv, self.to_out))
        to_k, to_v = to_kv.chunk(2, 0)
        q, k, v = linear(x, to_q[own]), linear(context, to_k[own]), linear(context, to_v[own])
        return summed(linear(self._attend(q, k, v, last - first, mask), to_out[:, own]))

    def _mask(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Any:
        """The mask of the attention, or None."""
        for name, array, length in (("x", x, "N"), ("context", context, "M")):
            if array.ndim != 3 or array.shape[-1] != self.to_q.in_features:
                expected = f"(B, {length}, {self.to_q.in_features})"
                raise ValueError(f"{name}: has shape {tuple(array.shape)}, expected {expected}")
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context: has {context.shape[0]} as batch size, expected {x.shape[0]} as x has")
        seen = causal("end") if self.causal else None
        if mask is None:
            return seen
        if tuple(mask.shape) != tuple(context.shape[:2]):
            raise ValueError(f"mask: has shape {tuple(mask.shape)}, expected {tuple(context.shape[:2])}, one per key")
        keys = dense(mask.to(x.device).bool()[:, None, None])
        return keys if seen is None else keys & seen

    def _processes(self) -> int:
        """How many processes share the heads; 1 without a group, which is worth saying."""
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
        if not FlashAttentionTwo._told:
            FlashAttentionTwo._told = True
            warnings.warn(
                "parallel=True has no effect without a process group: call torch.distributed.init_process_group first",
                stacklevel=4,
            )
        return 1

    _told = False


def _check_buckets(q_bucket_size: int | None, k_bucket_size: int | None) -> None:
    for name, size in (("q_bucket_size", q_bucket_size), ("k_bucket_size", k_bucket_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name}: got {size}, expected a positive number of tokens")
