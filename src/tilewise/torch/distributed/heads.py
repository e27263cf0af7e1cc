"""Rows exchanged for heads within a circle of ranks, and back (Ulysses, Jacobs et al., 2023).

Before: a rank has its own rows of all heads. After: the rows of the whole circle of some of the heads. Where there are
fewer key heads than ranks, a key head goes to every rank that has query heads of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...distributed.schedule import HeadShare, Schedule
from ...masks.heads import Heads
from .peers import Peers
from .spread import heads_circle


@dataclass(frozen=True, eq=False)
class HeadsCircle:
    """A circle of ranks and what heads each has.

    Attributes:
        peers: the circle; shares: the heads of each member; q_heads, kv_heads: of the whole call.
        q_rows, k_rows: how many rows each member has; q_order, k_order: where each row of the circle stands when the
            members' rows are put one member after the other.
    """

    peers: Peers
    shares: tuple[HeadShare, ...]
    q_heads: int
    kv_heads: int
    q_rows: list[int]
    k_rows: list[int]
    q_order: Tensor
    k_order: Tensor

    @classmethod
    def of(cls, group: Any, schedule: Schedule, q_heads: int, kv_heads: int, device: torch.device) -> HeadsCircle:
        """This rank's circle."""
        peers, place = heads_circle(group, schedule), dist.get_rank(group) // schedule.inner
        layouts = schedule.q, schedule.k
        rows = [[layout.local_length(rank) for rank in peers.ranks] for layout in layouts]
        orders = [torch.as_tensor(layout.group_order(schedule.inner, place), device=device) for layout in layouts]
        return cls(peers, schedule.heads, q_heads, kv_heads, *rows, *orders)

    @property
    def own(self) -> Heads:
        """The query heads of this rank."""
        share = self.shares[self.peers.place]
        return Heads(share.first, share.count, self.q_heads)

    @property
    def shared_keys(self) -> bool:
        """Whether some key head goes to several ranks."""
        return sum(share.kv_count for share in self.shares) != self.kv_heads

    def join(self, rows: Sequence[Tensor], keys: Sequence[Tensor], what: str) -> list[Tensor]:
        """This rank's heads of the circle's rows.

        Args:
            rows: (B, Hq, rows, …), those of wider dtypes first; keys: (B, Hkv, keys, …); what: for errors.
        """
        own = self.shares[self.peers.place]
        out = [
            [*(x.narrow(1, to.first, to.count) for x in rows), *(x.narrow(1, to.kv_first, to.kv_count) for x in keys)]
            for to in self.shares
        ]
        shapes = [
            [(x.shape[0], own.count, n, *x.shape[3:]) for x in rows]
            + [(x.shape[0], own.kv_count, m, *x.shape[3:]) for x in keys]
            for n, m in zip(self.q_rows, self.k_rows, strict=True)
        ]
        joined = [torch.cat(parts, 2) for parts in zip(*self.peers.swap(out, shapes, what), strict=True)]
        orders = [self.q_order] * len(rows) + [self.k_order] * len(keys)
        return [x.index_select(2, order) for x, order in zip(joined, orders, strict=True)]

    def part(self, rows: Sequence[Tensor], keys: Sequence[Tensor], what: str) -> list[Tensor]:
        """The reverse: this rank's rows of all heads; what several ranks have of one key head is added up."""
        place = self.peers.place
        rows_back = [_split_back(x, self.q_order, self.q_rows) for x in rows]
        keys_back = [_split_back(x, self.k_order, self.k_rows) for x in keys]
        out = [[part[n] for part in (*rows_back, *keys_back)] for n in range(len(self.peers))]
        shapes = [
            [(x.shape[0], share.count, self.q_rows[place], *x.shape[3:]) for x in rows]
            + [(x.shape[0], share.kv_count, self.k_rows[place], *x.shape[3:]) for x in keys]
            for share in self.shares
        ]
        arrived = list(zip(*self.peers.swap(out, shapes, what), strict=True))
        found = [torch.cat(parts, 1) for parts in arrived[: len(rows)]]
        return found + [self._added(parts) for parts in arrived[len(rows) :]]

    def _added(self, parts: Sequence[Tensor]) -> Tensor:
        if not self.shared_keys:
            return torch.cat(tuple(parts), 1)
        batch, _, length, *rest = parts[0].shape
        total = parts[0].new_zeros((batch, self.kv_heads, length, *rest))
        for share, part in zip(self.shares, parts, strict=True):
            total.narrow(1, share.kv_first, share.kv_count).add_(part)
        return total


def _split_back(x: Tensor, order: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    joined = torch.empty_like(x)
    joined.index_copy_(2, order, x)
    return joined.split(list(rows), 2)
