"""Keys and values on their way, and the parts of their gradients on the way home.

A ring step computes with the shard it holds while that shard travels on and the next arrives. The gradients' parts go
straight home, in the accumulator's dtype, while the next step computes; home adds them in the order of the steps. So
no rank holds more than two shards of keys and two of their gradients beside its own, and each run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...distributed.schedule import WHOLE, Block, Schedule, Step
from ...masks.part import Run
from .peers import Peers, Pending, answered

# torch renamed it; the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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

    def keys(self, step: Step, block: Block) -> tuple[Tensor, Tensor]:
        """The block's keys and values."""
        stride = block.keys.step if step.source == WHOLE else 1
        run = Run(block.k_begin, block.keys.count, stride)
        return run.of(self.k, 2, torch), run.of(self.v, 2, torch)


def around(peers: Peers, schedule: Schedule, k: Tensor, v: Tensor) -> Iterator[tuple[int, Step, Shard]]:
    """Each step of this rank with the shard that it computes with; exchanges run while the caller computes."""
    steps = schedule.steps[peers.place]
    if schedule.strategy == "all_gather":
        yield 0, steps[0], _gathered(peers, schedule, k, v)
        return
    held: Shard | None = Shard.packed(k, v)
    for number, step in enumerate(steps):
        coming, sends, receives = None, [], []
        if step.send_to is not None:
            sends = [(step.send_to, held.memory)]
        if step.receive_from is not None:
            coming = Shard.like(k, v, schedule.keys.local_length(steps[number + 1].source))
            receives = [(step.receive_from, coming.memory)]
        pending = peers.post(sends, receives, f"keys of step {number}")
        yield number, step, held
        pending.wait()
        held = coming


def _gathered(peers: Peers, schedule: Schedule, k: Tensor, v: Tensor) -> Shard:
    """All keys in global order. Shards are padded to the longest, since a gather takes equal ones."""
    layout = schedule.k
    lengths = [layout.local_length(rank) for rank in range(len(peers))]
    longest = max(lengths)
    own = torch.zeros((longest, *k.shape[:2], k.shape[3] + v.shape[3]), dtype=k.dtype, device=k.device)
    own[: k.shape[2]] = torch.cat([k, v], -1).movedim(2, 0)
    everything = own.new_empty((len(peers) * longest, *own.shape[1:]))
    if own.numel():
        answered(
            peers.group, "gathered the keys of all ranks",
            lambda: _all_gather(everything, own, group=peers.group),
        )  # fmt: skip
    places = np.concatenate([rank * longest + np.arange(length) for rank, length in enumerate(lengths)])
    in_order = torch.as_tensor(places[np.argsort(layout.order())], device=k.device)
    shard = Shard.like(k, v, layout.length)
    shard.k.copy_(everything[..., : k.shape[3]].index_select(0, in_order).movedim(0, 2))
    shard.v.copy_(everything[..., k.shape[3] :].index_select(0, in_order).movedim(0, 2))
    return shard


class Homeward:
    """Gradients of the keys and values of every rank, brought home and added up there.

    Attributes:
        total: the sum at home, complete after `land`.
    """

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
        if step.source == WHOLE:
            self._distribute(part)
            return
        place, count = self._peers.place, len(self._peers)
        if step.source == place:
            if part is not None:
                self.total.memory.add_(part.memory)
            return
        # The rank as far ahead as this step's shard is from behind: at this step it computes with this rank's keys.
        user = (2 * place - step.source) % count
        arriving = []
        if self._schedule.steps[user][number].blocks:
            arriving = [(user, self.fresh(self.total.k.shape[2]))]
        sends = [] if part is None else [(step.source, part.memory)]
        pending = self._peers.post(
            sends, [(rank, shard.memory) for rank, shard in arriving], f"gradients of step {number}"
        )
        self.land()
        # What is sent is held here until it has left.
        self._under_way.append((pending, part, [shard for _, shard in arriving]))

    def _distribute(self, part: Shard | None) -> None:
        """Every rank's rows of a part of all keys go to that rank, which adds them up in the order of the ranks."""
        layout, whole = self._schedule.k, part or self.fresh(self._schedule.k.length)
        orders = [torch.as_tensor(layout.positions(rank), device=whole.k.device) for rank in range(len(self._peers))]
        out = [[whole.k.index_select(2, order), whole.v.index_select(2, order)] for order in orders]
        shapes = [[self.total.k.shape, self.total.v.shape]] * len(orders)
        for d_k, d_v in self._peers.swap(out, shapes, "gradients"):
            self.total.k.add_(d_k)
            self.total.v.add_(d_v)

    def land(self) -> None:
        """Wait for what is under way, and add what has come."""
        for pending, _, arrived in self._under_way:
            pending.wait()
            for shard in arrived:
                self.total.memory.add_(shard.memory)
        self._under_way.clear()
