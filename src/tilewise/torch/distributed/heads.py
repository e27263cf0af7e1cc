"""Rows exchanged for heads within a circle of ranks, and back.

Before: a rank has its own rows of all heads. After: the rows of the whole circle of some of the heads. Where there are
fewer key heads than ranks, a key head goes to every rank that has query heads of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...masks.heads import Heads
from .peers import Peers
from .spread import Spread


@dataclass(frozen=True, eq=False)
class HeadsCircle:
    """A circle of ranks and what heads each has.

    Attributes:
        peers: the circle; q_heads, kv_heads: of the whole call.
        q_rows, k_rows: how many rows each member has; q_order, k_order: how they stand once joined, None: as they come.
    """

    peers: Peers
    q_heads: int
    kv_heads: int
    q_rows: list[int]
    k_rows: list[int]
    q_order: Tensor | None
    k_order: Tensor | None

    @classmethod
    def of(cls, spread: Spread, q_heads: int, kv_heads: int, device: torch.device) -> HeadsCircle:
        """This rank's circle."""
        (q_rows, q_order), (k_rows, k_order) = spread.gathered(spread.q), spread.gathered(spread.k)
        orders = [None if order is None else torch.as_tensor(order, device=device) for order in (q_order, k_order)]
        return cls(spread.heads_circle(), q_heads, kv_heads, q_rows, k_rows, *orders)

    @property
    def own(self) -> Heads:
        """The query heads of this rank."""
        return Heads(self.peers.place * self._share, self._share, self.q_heads)

    @property
    def shared_keys(self) -> bool:
        """Whether some key head goes to several ranks."""
        return sum(len(self.kv_of(place)) for place in range(len(self.peers))) != self.kv_heads

    def kv_of(self, place: int) -> list[int]:
        """The key heads that a member needs, such that each serves equally many of its query heads, in order."""
        group = self.q_heads // self.kv_heads if self.kv_heads else 1
        heads = [head // group for head in range(place * self._share, (place + 1) * self._share)]
        if not self._share % group:
            return heads[::group]
        return heads[:1] if not group % self._share else heads

    def join(self, rows: Sequence[Tensor], keys: Sequence[Tensor], what: str) -> list[Tensor]:
        """This rank's heads of the circle's rows.

        Args:
            rows: (B, Hq, rows, …), those of wider dtypes first; keys: (B, Hkv, keys, …).
        """
        count = len(self.peers)
        out = [[*(x[:, self._queries(n)] for x in rows), *(x[:, self.kv_of(n)] for x in keys)] for n in range(count)]
        shapes = [
            [(x.shape[0], self._share, self.q_rows[n], *x.shape[3:]) for x in rows]
            + [(x.shape[0], len(self.kv_of(self.peers.place)), self.k_rows[n], *x.shape[3:]) for x in keys]
            for n in range(count)
        ]
        arrived = self.peers.swap(out, shapes, what)
        joined = [torch.cat(parts, 2) for parts in zip(*arrived, strict=True)]
        orders = [self.q_order] * len(rows) + [self.k_order] * len(keys)
        return [x if order is None else x.index_select(2, order) for x, order in zip(joined, orders, strict=True)]

    def part(self, rows: Sequence[Tensor], keys: Sequence[Tensor], what: str) -> list[Tensor]:
        """The reverse: this rank's rows of all heads; what several ranks have of one key head is added up."""
        count = len(self.peers)
        rows_back = [_split_back(x, self.q_order, self.q_rows) for x in rows]
        keys_back = [_split_back(x, self.k_order, self.k_rows) for x in keys]
        own = self.peers.place
        out = [[*(x[n] for x in rows_back), *(x[n] for x in keys_back)] for n in range(count)]
        shapes = [
            [(x.shape[0], self._share, self.q_rows[own], *x.shape[3:]) for x in rows]
            + [(x.shape[0], len(self.kv_of(n)), self.k_rows[own], *x.shape[3:]) for x in keys]
            for n in range(count)
        ]
        arrived = list(zip(*self.peers.swap(out, shapes, what), strict=True))
        found = [torch.cat(parts, 1) for parts in arrived[: len(rows)]]
        for parts in arrived[len(rows) :]:
            if not self.shared_keys:
                found.append(torch.cat(parts, 1))
                continue
            batch, _, length, *rest = parts[0].shape
            total = parts[0].new_zeros((batch, self.kv_heads, length, *rest))
            for n, part in enumerate(parts):
                for place, head in enumerate(self.kv_of(n)):
                    total[:, head] += part[:, place]
            found.append(total)
        return found

    @property
    def _share(self) -> int:
        return self.q_heads // len(self.peers)

    def _queries(self, place: int) -> slice:
        return slice(place * self._share, (place + 1) * self._share)


def _split_back(x: Tensor, order: Tensor | None, rows: Sequence[int]) -> tuple[Tensor, ...]:
    if order is not None:
        joined = torch.empty_like(x)
        joined.index_copy_(2, order, x)
        x = joined
    return x.split(list(rows), 2)
