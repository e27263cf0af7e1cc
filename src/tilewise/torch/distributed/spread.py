"""Where a call's rows lie and which processes work together: all of it integers, the same for every process.

A process works in two circles. Within the inner one rows are exchanged for heads, so that its members hold the rows of
all of them for some of the heads (Ulysses, Jacobs et al., 2023). Around the outer one keys and values travel (ring
attention, Liu et al., 2023) or are gathered. A circle of one is no circle: the ring alone has inner circles of one,
Ulysses alone an outer one of one, and the grid has both (Fang and Zhao, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from ...distributed.layout import Kind, Layout
from .peers import Peers

Strategy = Literal["auto", "ring", "all_gather", "ulysses", "grid"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
SHARDINGS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Spread:
    """A call's rows over the ranks of a group.

    Attributes:
        group: its name in torch.distributed.
        strategy: not "auto"; inner: ranks in a circle that exchanges heads.
        q, k: where the queries and the keys lie.
    """

    group: str
    strategy: str
    inner: int
    q: Layout
    k: Layout

    @property
    def ranks(self) -> int:
        """Of the group."""
        return self.q.ranks

    def heads_circle(self) -> Peers:
        """The ranks with which this one exchanges rows for heads."""
        rank, outer = self._rank(), self.ranks // self.inner
        if self.q.kind == "stripe":  # ranks that together hold every outer-th row
            ranks = range(rank % outer, self.ranks, outer)
        else:
            first = rank - rank % self.inner
            ranks = range(first, first + self.inner)
        return self._peers(ranks, rank)

    def keys_circle(self) -> Peers:
        """The ranks whose keys and values this one sees."""
        rank, outer = self._rank(), self.ranks // self.inner
        if self.q.kind == "stripe":
            first = rank - rank % outer
            return self._peers(range(first, first + outer), rank)
        return self._peers(range(rank % self.inner, self.ranks, self.inner), rank)

    def outer(self, layout: Layout) -> Layout:
        """Where rows lie once every inner circle has joined its own.

        Raises:
            ValueError: beginning with "strategy:", where a circle's rows are no shard of a layout.
        """
        count = self.ranks // self.inner
        if self.inner == 1:
            return layout
        if layout.kind == "contiguous":
            lengths = [layout.local_length(rank) for rank in range(layout.ranks)]
            sums = tuple(sum(lengths[n : n + self.inner]) for n in range(0, layout.ranks, self.inner))
            return Layout(layout.kind, layout.length, count, sums)
        if layout.kind == "zigzag" and count > 1 and layout.length % (2 * layout.ranks):
            raise ValueError(
                f"strategy: 'grid' with zigzag shards got {layout.length} rows, expected a multiple of twice the "
                f"{layout.ranks} ranks"
            )
        return Layout(layout.kind, layout.length, count)

    def gathered(self, layout: Layout) -> tuple[list[int], np.ndarray | None]:
        """How the rows of an inner circle join: how many each member has, and in which order the whole stands.

        Returns:
            lengths: of the members' shards; order: the outer shard is joined[order], None where it stands so already.
        """
        circle, place = self.heads_circle(), self.keys_circle().place
        shards = [layout.positions(rank) for rank in circle.ranks]
        joined = np.concatenate(shards)
        places = np.full(layout.length, -1)
        places[joined] = np.arange(joined.size)
        order = places[self.outer(layout).positions(place)]
        lengths = [len(shard) for shard in shards]
        return lengths, None if (order == np.arange(order.size)).all() else order

    def _rank(self) -> int:
        return dist.get_rank(_resolve_process_group(self.group))

    def _peers(self, ranks: Sequence[int], rank: int) -> Peers:
        return Peers(_resolve_process_group(self.group), tuple(ranks), list(ranks).index(rank))


def layout_of(name: str, sharding: Any, lengths: Sequence[int]) -> Layout:
    """The layout in which the ranks have so many rows each.

    Args:
        name: of the argument that has the rows, for errors.

    Raises:
        ValueError: beginning with the name, if the sharding gives the ranks other numbers of rows.
    """
    lengths = tuple(int(length) for length in lengths)
    even = Layout(sharding, sum(lengths), len(lengths))
    expected = tuple(even.local_length(rank) for rank in range(len(lengths)))
    if lengths == expected:
        return even
    if sharding == "contiguous":
        return Layout(sharding, sum(lengths), len(lengths), lengths)
    raise ValueError(
        f"{name}: has {_listed(lengths)} rows on the ranks, expected {_listed(expected)} for sharding={sharding!r} of "
        f"{sum(lengths)} rows"
    )


def group_of(mesh: Any, group: Any) -> Any:
    """The process group of a one-dimensional mesh, or the group, or the default one.

    Raises:
        ValueError: both are given, the mesh has several dimensions, or there is no group yet.
    """
    if mesh is not None:
        if group is not None:
            raise ValueError("mesh: got a group too, expected one of both")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh: has {mesh.ndim} dimensions {mesh.mesh_dim_names}, expected 1, such as mesh[name] of the "
                f"dimension that the sequence lies over"
            )
        return mesh.get_group()
    if group is not None:
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: there is none; expected torch.distributed.init_process_group to be called first")
    return dist.group.WORLD


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))
