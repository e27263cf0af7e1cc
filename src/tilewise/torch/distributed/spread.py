"""Where a call's rows lie, and which ranks of a group work together.

A rank works in two circles. Within one, of neighbouring ranks, rows are exchanged for heads, so that its members hold
the rows of all of them for some of the heads. Around the other keys and values travel or are gathered. A circle of one
is no circle: the ring alone exchanges no heads, heads alone leave no ring, and the grid has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch.distributed as dist

from ...distributed.layout import Kind, Layout
from ...distributed.schedule import Schedule
from .peers import Peers

Strategy = Literal["auto", "ring", "all_gather", "ulysses", "grid"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
SHARDINGS: tuple[str, ...] = get_args(Kind)


def heads_circle(group: Any, schedule: Schedule) -> Peers:
    """The ranks with which this one exchanges rows for heads."""
    rank = dist.get_rank(group)
    first = rank - rank % schedule.inner
    return Peers(group, tuple(range(first, first + schedule.inner)), rank - first)


def keys_circle(group: Any, schedule: Schedule) -> Peers:
    """The ranks whose keys and values this one sees, by their places in the schedule."""
    rank = dist.get_rank(group)
    ranks = range(rank % schedule.inner, schedule.q.ranks, schedule.inner)
    return Peers(group, tuple(ranks), rank // schedule.inner)


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
