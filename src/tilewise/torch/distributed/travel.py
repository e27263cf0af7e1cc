"""Keys and values on their way, and the parts of their gradients on the way home.

A ring step computes with the shard it holds while that shard travels on and the next arrives. The gradients' parts go
straight home, in the accumulator's dtype, while the next step computes; home adds them in the order of the steps. So
no rank holds more than two shards of keys and two of their gradients beside its own, and each run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...distributed.layout import Layout
from ...distributed.schedule import Block, Schedule, Step
from .peers import Peers, Pending


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """k (B, Hkv, n, D) and v (B, Hkv, n, Dv) in one piece of memory, or gradients of them in their place."""

    memory: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, memory: Tensor, k: Tensor, v: Tensor, count: int) -> Shard:
        """Views into memory for `count` keys of the others' heads and widths."""
        (batch, heads, _, d_k), d_v = k.shape, v.shape[3]
        split = batch * heads * count * d_k
        return cls(memory, memory[:split].view(batch, heads, count, d_k), memory[split:].view(batch, heads, count, d_v))

    @classmethod
    def like(cls, k: Tensor, v: Tensor, count: int, dtype: torch.dtype | None = None, zero: bool = False) -> Shard:
        """Memory for `count` keys."""
        size = k.shape[0] * k.shape[1] * count * (k.shape[3] + v.shape[3])
        memory = (torch.zeros if zero else torch.empty)(size, dtype=dtype or k.dtype, device=k.device)
        return cls.of(memory, k, v, count)

    @classmethod
    def packed(cls, k: Tensor, v: Tensor) -> Shard:
        """A copy of both in one piece."""
        shard = cls.like(k, v, k.shape[2])
        shard.k.copy_(k)
        shard.v.copy_(v)
        return shard

    def keys(self, block: Block) -> tuple[Tensor, Tensor]:
        """The block's keys and values."""
        return self.k.narrow(2, block.k_begin, block.keys.count), self.v.narrow(2, block.k_begin, block.keys.count)


def around(peers: Peers, schedule: Schedule, k: Tensor, v: Tensor) -> Iterator[tuple[int, Step, Shard]]:
    """Each step with the shard that it computes with; exchanges run while the caller computes."""
    steps, layout = schedule.steps[peers.place], schedule.k
    held = Shard.packed(k, v)
    for number, step in enumerate(steps):
        coming, sends, receives = None, [], []
        if step.send_to is not None:
            sends = [(step.send_to, held.memory)]
        if step.receive_from is not None:
            coming = Shard.like(k, v, layout.local_length(steps[number + 1].source))
            receives = [(step.receive_from, coming.memory)]
        pending = peers.post(sends, receives, f"keys of step {number}")
        yield number, step, held
        pending.wait()
        held = coming if coming is not None else held


def gathered(peers: Peers, schedule: Schedule, k: Tensor, v: Tensor) -> Iterator[tuple[int, Step, Shard]]:
    """Likewise with every shard brought straight from its home before anything is computed."""
    steps, own, layout = schedule.steps, Shard.packed(k, v), schedule.k
    needed = [step.source for step in steps[peers.place] if step.blocks and step.source != peers.place]
    shards = {source: Shard.like(k, v, layout.local_length(source)) for source in needed}
    receives = [(source, shards[source].memory) for source in needed]
    sends = [(rank, own.memory) for rank in _users(steps, peers.place)]
    peers.post(sends, receives, "keys").wait()
    shards[peers.place] = own
    for number, step in enumerate(steps[peers.place]):
        yield number, step, shards.get(step.source, own)


class Homeward:
    """Gradients of the keys and values of every rank, brought home and added up there."""

    def __init__(self, peers: Peers, schedule: Schedule, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self._peers, self._schedule = peers, schedule
        self._like = (k, v, dtype)
        self.total = self.fresh(k.shape[2])
        self._under_way: list[tuple[Pending, Shard | None, list[Shard]]] = []

    def fresh(self, count: int) -> Shard:
        """Zeros for the gradients of `count` keys."""
        k, v, dtype = self._like
        return Shard.like(k, v, count, dtype, zero=True)

    def send(self, number: int, step: Step, part: Shard | None) -> None:
        """After a step: its part goes home, and what comes home from the same step of another rank is received."""
        place = self._peers.place
        sends = [] if part is None or step.source == place else [(step.source, part.memory)]
        users = [rank for rank in _users(self._schedule.steps, place, number) if rank != place]
        arriving = [(rank, self.fresh(self.total.k.shape[2])) for rank in users]
        pending = self._peers.post(
            sends, [(rank, shard.memory) for rank, shard in arriving], f"gradients of step {number}"
        )
        self.land()
        if part is not None and step.source == place:
            self.total.memory.add_(part.memory)
        # What is sent is held here until it has left.
        self._under_way.append((pending, part, [shard for _, shard in arriving]))

    def land(self) -> None:
        """Wait for what is under way, and add what has come."""
        for pending, _, arrived in self._under_way:
            pending.wait()
            for shard in arrived:
                self.total.memory.add_(shard.memory)
        self._under_way.clear()


def _users(steps: Sequence[Sequence[Step]], source: int, number: int | None = None) -> list[int]:
    """The other ranks that compute with a shard, at any step or at one."""
    return [
        rank
        for rank, of_rank in enumerate(steps)
        for n, step in enumerate(of_rank)
        if step.source == source and step.blocks and rank != source and number in (None, n)
    ]


def empty_rows(q: Tensor, v: Tensor, layout: Layout, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse of rows that have seen nothing."""
    rows = (*q.shape[:2], layout.local_length(place))
    out = torch.zeros((*rows, v.shape[3]), dtype=dtype, device=q.device)
    return out, torch.full(rows, float("-inf"), dtype=dtype, device=q.device)
