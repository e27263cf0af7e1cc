"""Shards of a sequence: cut from the whole, joined to it, and where their rows stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.distributed_c10d import _resolve_process_group

from ...distributed.layout import Layout
from .peers import Peers, answered
from .spread import SHARDINGS, group_of, layout_of


def shard(
    x: Tensor, dim: int, *, mesh: Any = None, group: Any = None, sharding: str = "contiguous",
    lengths: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """This rank's rows of a tensor that every rank has whole. Nothing is exchanged.

    Differentiable: the gradient to x is this rank's part, 0 outside its rows.

    Args:
        x: any tensor; dim: the axis of the sequence.
        mesh, group, sharding: as of `context_parallel_attention`; lengths: rows of each rank, None: as equal as can be.

    Raises:
        ValueError: beginning with the argument's name.
    """
    process_group = group_of(mesh, group)
    layout = _layout(process_group, sharding, x.shape[dim], lengths)
    runs = layout.runs(dist.get_rank(process_group))
    index: list[slice] = [slice(None)] * x.ndim
    parts = []
    for run in runs:
        index[dim] = slice(run.start, run.start + run.step * run.count, run.step)
        parts.append(x[tuple(index)])
    if not parts:
        index[dim] = slice(0, 0)
        return x[tuple(index)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def unshard(
    x: Tensor, dim: int, *, mesh: Any = None, group: Any = None, sharding: str = "contiguous",
    lengths: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The whole, of which every rank has a shard: the reverse of `shard`.

    Differentiable: the gradient to x is the sum over the ranks of what each needs of these rows. So where every rank
    computes the same loss from the whole, that loss counts once for each rank.

    Args:
        x: this rank's rows, of the same other sizes and dtype on every rank; dim, mesh, group, sharding: as of `shard`.
        lengths: rows of each rank; None asks the other ranks.

    Raises:
        ValueError: beginning with the argument's name. PeerLost: a rank does not answer.
    """
    process_group = group_of(mesh, group)
    if lengths is None:
        own = torch.tensor([x.shape[dim]], device=x.device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
        answered(process_group, "asked all ranks for their rows", lambda: dist.all_gather(rows, own, process_group))
        lengths = torch.cat(rows).tolist()
    return _Unshard.apply(x, dim % x.ndim, process_group.group_name, layout_of("x", _known(sharding), lengths))


def positions(
    length: int, *, mesh: Any = None, group: Any = None, sharding: str = "contiguous",
    lengths: Sequence[int] | None = None, device: Any = None,
) -> Tensor:  # fmt: skip
    """Where this rank's rows stand in the whole, (rows,) int64: what a rotary embedding of a shard needs.

    Args:
        length: of the whole; the rest as of `shard`.
    """
    process_group = group_of(mesh, group)
    layout = _layout(process_group, sharding, length, lengths)
    return torch.as_tensor(layout.positions(dist.get_rank(process_group)), device=device)


class _Unshard(Function):
    """(shard, dim, name of the group, layout) -> whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str, layout: Layout) -> Tensor:
        ctx.dim, ctx.group, ctx.layout = dim, group, layout
        peers, own = _everyone(_resolve_process_group(group)), x.movedim(dim, 0)
        shapes = [[(layout.local_length(rank), *own.shape[1:])] for rank in range(len(peers))]
        found = peers.swap([[own]] * len(peers), shapes, "rows of the whole")
        joined = torch.cat([part for (part,) in found])
        whole = torch.empty_like(joined)
        whole[torch.as_tensor(layout.order(), device=x.device)] = joined
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        peers, layout = _everyone(_resolve_process_group(ctx.group)), ctx.layout
        whole = gradient.movedim(ctx.dim, 0)
        parts = [[whole[torch.as_tensor(layout.positions(rank), device=whole.device)]] for rank in range(len(peers))]
        shape = (layout.local_length(peers.place), *whole.shape[1:])
        found = peers.swap(parts, [[shape]] * len(peers), "gradients of the whole")
        total = torch.stack([part for (part,) in found]).sum(0)
        return total.movedim(0, ctx.dim), None, None, None


def _everyone(group: Any) -> Peers:
    return Peers(group, tuple(range(dist.get_world_size(group))), dist.get_rank(group))


def _layout(group: Any, sharding: str, length: int, lengths: Sequence[int] | None) -> Layout:
    count = dist.get_world_size(group)
    if lengths is None:
        return Layout(_known(sharding), length, count)
    if len(lengths) != count or sum(lengths) != length:
        raise ValueError(f"lengths: got {list(lengths)}, expected one for each of {count} ranks, {length} in all")
    return layout_of("lengths", _known(sharding), lengths)


def _known(sharding: str) -> Any:
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding: got {sharding!r}, expected {', '.join(map(repr, SHARDINGS))}")
    return sharding
