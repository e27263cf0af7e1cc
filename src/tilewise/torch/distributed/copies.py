"""Tensors that every rank has: what flows into the work of all, and the sum of what each computed.

Source: the two conjugate operators of Megatron-LM (Shoeybi et al., 2019), f and g.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.distributed_c10d import _resolve_process_group

from .peers import answered
from .spread import group_of


def copied(x: Tensor, *, mesh: Any = None, group: Any = None) -> Tensor:
    """x, the same on every rank; its gradient is the sum of what each rank's work with it asks for.

    Raises:
        ValueError: beginning with "mesh" or "group". In the backward pass, PeerLost: a rank does not answer.
    """
    return _Copied.apply(x, group_of(mesh, group).group_name)


def summed(x: Tensor, *, mesh: Any = None, group: Any = None) -> Tensor:
    """The sum over the ranks of their x, which all of them get; the gradient to x is that of the sum, on each rank.

    Raises:
        ValueError: beginning with "mesh" or "group". PeerLost: a rank does not answer.
    """
    return _Summed.apply(x, group_of(mesh, group).group_name)


# A graph remembers a group by its name: holding the group itself, it would keep its threads alive after the group was
# destroyed, until the process ends, which some of them do not survive.


class _Copied(Function):
    """(x, name of the group) -> x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(gradient, ctx.group), None


class _Summed(Function):
    """(x, name of the group) -> the sum of all x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group, total, ranks = group, x.contiguous().clone(), _resolve_process_group(group)
        answered(ranks, "added up with all ranks", lambda: dist.all_reduce(total, group=ranks))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Copied.apply(gradient, ctx.group), None
