"""Which rank attends to which keys at which step, and what it passes on to whom. Integers only, no framework.

Every rank computes the whole schedule from what all ranks know (layouts and the whole call's mask), so all agree
without a message. A schedule leaves out what no row needs: blocks without a visible pair, steps that are empty on every
rank, and the journey of a shard beyond the last rank that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..masks.lower import LoweredMask
from ..masks.part import Run
from .layout import Layout
from .pairs import by_rank, fold, journey, pairs_between

WHOLE = -1  # as a step's source: all keys, put in global order


@dataclass(frozen=True)
class Block:
    """One kernel call: local rows [q_begin, q_begin + rows.count) against the keys [k_begin, …) of the visiting shard.

    Attributes:
        rows, keys: their global positions.
        q_begin, k_begin: where these runs begin in the local shard and in the visiting one. Where the source is
            `WHOLE`, `keys` are also the places in the gathered sequence, and may have a step.
        pairs: visible pairs, or an upper bound where the mask has labels or bits (see `pairs_between`).
    """

    rows: Run
    keys: Run
    q_begin: int
    k_begin: int
    pairs: int


@dataclass(frozen=True)
class Step:
    """What a rank does between two exchanges.

    Attributes:
        source: whose keys are attended to: a rank (of the ring; a group in a grid), or `WHOLE`.
        blocks: the kernel calls; empty where no row needs a key of this shard.
        send_to: the rank to pass the shard held on to, while computing; None: nobody needs it any more.
        receive_from: the rank that passes on the shard of the next step; None: none comes.
    """

    source: int
    blocks: tuple[Block, ...]
    send_to: int | None = None
    receive_from: int | None = None


@dataclass(frozen=True)
class HeadShare:
    """The heads that a rank attends with when heads are spread: `count` query heads from `first` on, and kv heads."""

    first: int
    count: int
    kv_first: int
    kv_count: int


@dataclass(frozen=True)
class Schedule:
    """A call over ranks.

    Attributes:
        strategy: "ring", "all_gather", "ulysses" or "grid".
        q, k: how queries and keys lie over all ranks.
        steps: `steps[n][t]`: step t of the ring's n-th place; as many for every place. Without heads spread, places
            are ranks; else place n is the group of the ranks n * inner … (n + 1) * inner - 1, whose rows stand together
            in the order of `q.grouped(inner)`, and a step's numbers are groups.
        heads: of each rank of a group; empty where heads are not spread.
        fold: number of batch rows x heads that pairs are summed over; 1 where all are alike.
    """

    strategy: str
    q: Layout
    k: Layout
    steps: tuple[tuple[Step, ...], ...]
    heads: tuple[HeadShare, ...] = ()
    fold: int = 1

    @property
    def inner(self) -> int:
        """Ranks in a group that spreads heads."""
        return max(1, len(self.heads))

    @cached_property
    def rows(self) -> Layout:
        """How queries lie over the places of the ring."""
        return self.q.grouped(self.inner)

    @cached_property
    def keys(self) -> Layout:
        """How keys lie over the places of the ring."""
        return self.k.grouped(self.inner)

    def steps_of(self, rank: int) -> tuple[Step, ...]:
        """The steps of a rank's place."""
        return self.steps[rank // self.inner]

    def bytes(self, rank: int, bytes_per_key: float, bytes_per_query: float = 0, bytes_per_out: float = 0) -> int:
        """Bytes that the rank sends in the forward pass.

        Args:
            bytes_per_key: of k and v together, for one position, all kv heads and the batch.
            bytes_per_query, bytes_per_out: likewise of q and of out with lse; they move where heads are spread.
        """
        if self.strategy == "all_gather":
            # A gather in a ring: a rank passes on every shard but its successor's.
            return int((self.k.length - self.k.local_length((rank + 1) % self.k.ranks)) * bytes_per_key)
        sent = sum(self.keys.local_length(step.source) for step in self.steps_of(rank) if step.send_to is not None)
        if not self.heads:
            return int(sent * bytes_per_key)
        own, place = self.heads[rank % self.inner], rank // self.inner
        heads, kv_heads = sum(share.count for share in self.heads), self.heads[-1].kv_first + self.heads[-1].kv_count
        others = [share for n, share in enumerate(self.heads) if n != rank % self.inner]
        total = sent * bytes_per_key * own.kv_count / kv_heads
        total += self.k.local_length(rank) * bytes_per_key * sum(share.kv_count for share in others) / kv_heads
        total += self.q.local_length(rank) * bytes_per_query * sum(share.count for share in others) / heads
        foreign = self.rows.local_length(place) - self.q.local_length(rank)
        return int(total + foreign * bytes_per_out * own.count / heads)

    def exchanges(self, rank: int) -> int:
        """Times that the rank sends: shards (k and v together) passed on, and collectives, of which a gather of k and v
        is one and heads take two: q, k, v there and out with lse back."""
        if self.strategy == "all_gather":
            return 1 if self.k.ranks > 1 else 0
        sent = sum(1 for step in self.steps_of(rank) if step.send_to is not None)
        return sent + (2 if self.inner > 1 else 0)

    def pairs(self, rank: int) -> int:
        """Visible pairs that the rank computes for each of its heads (summed over `fold`)."""
        return sum(block.pairs for step in self.steps_of(rank) for block in step.blocks)

    def imbalance(self) -> float:
        """The most pairs of a rank over the mean of all; 1.0 is perfect balance, and the answer where no pair is."""
        pairs = [self.pairs(rank) for rank in range(0, self.q.ranks, self.inner)]
        return max(pairs) * len(pairs) / sum(pairs) if sum(pairs) else 1.0


def needs(mask: LoweredMask | None, q: Layout, k: Layout) -> np.ndarray:
    """(ranks, ranks) int64: visible pairs of rank r's rows with shard s's keys; 0: r does not need s.

    An upper bound where the mask is more than ranges, see `pairs_between`.

    Raises:
        ValueError: layouts over different numbers of ranks, or a mask of other lengths.
    """
    _check(mask, q, k)
    rows = [run for rank in range(q.ranks) for run in q.runs(rank)]
    return by_rank(pairs_between(mask, rows, k), q, k)


def ring(q: Layout, k: Layout, mask: LoweredMask | None = None) -> Schedule:
    """Shards of keys travel round the ranks (ring attention, Liu et al., 2023); queries stay.

    At step t rank r attends to shard r - d[t], where d[0] = 0 and the other distances are those, in ascending order,
    at which some rank needs a shard. The shard then hops d[t + 1] - d[t] ranks on: one where no step is left out. A
    window to both sides takes its few ranks behind, then jumps to its few ranks ahead.

    Args:
        mask: the whole call's facts, for `q.length` queries and `k.length` keys; None: every row sees every key.

    Raises:
        ValueError: as `needs`.
    """
    return Schedule("ring", q, k, _ring_steps(q, k, mask), fold=fold(mask))


def all_gather(q: Layout, k: Layout, mask: LoweredMask | None = None) -> Schedule:
    """Every rank gets all keys, put in global order, and attends to them at once: one step, memory in Sk on each rank.

    Args, Raises: as `ring`.
    """
    _check(mask, q, k)
    # Rows of a stripe meet keys of the same step, so that a bias over the distance is one over the parts' own.
    keys = Layout("stripe", k.length, q.ranks) if q.kind == "stripe" else Layout("contiguous", k.length, 1)
    key_runs = [run for rank in range(keys.ranks) for run in keys.runs(rank)]
    steps = []
    for rank in range(q.ranks):
        rows = q.runs(rank)
        counts = pairs_between(mask, rows, keys)
        blocks, begin = [], 0
        for n, run in enumerate(rows):
            for m, seen in enumerate(key_runs):
                if counts[n, m]:
                    blocks.append(Block(run, seen, begin, seen.start, int(counts[n, m])))
            begin += run.count
        steps.append((Step(WHOLE, tuple(blocks)),))
    return Schedule("all_gather", q, k, tuple(steps), fold=fold(mask))


def ulysses(q: Layout, k: Layout, mask: LoweredMask | None, heads: int, kv_heads: int) -> Schedule:
    """Sequences are exchanged for heads, so that each rank attends to all rows with some heads (Jacobs et al., 2023).

    Args:
        heads, kv_heads: Hq and Hkv; see `head_shares`.
    Raises:
        ValueError: as `needs` and `head_shares`.
    """
    return _spread("ulysses", q, k, mask, heads, kv_heads, q.ranks)


def grid(q: Layout, k: Layout, mask: LoweredMask | None, heads: int, kv_heads: int, inner: int) -> Schedule:
    """Heads spread inside groups of `inner` neighbouring ranks, a ring of groups outside (Fang and Zhao, 2024).

    Raises:
        ValueError: as `needs` and `head_shares`; `inner` does not divide the ranks, or cuts a stripe layout.
    """
    return _spread("grid", q, k, mask, heads, kv_heads, inner)


def head_shares(heads: int, kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """The heads of each rank when heads are spread: equal shares, the kv heads that they read with them.

    With fewer kv heads than ranks, each goes to all the ranks whose query heads read it.

    Raises:
        ValueError: "heads: …" where ranks do not divide the query heads, or where a rank's query heads would read parts
            of several kv heads' groups.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads: got {heads} query heads and {kv_heads} kv heads, expected a multiple of 1 or more")
    if heads % ranks:
        raise ValueError(f"heads: got {heads} query heads, expected a multiple of {ranks} ranks to spread them over")
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(f"heads: got {kv_heads} kv heads, expected a multiple or a divisor of {ranks} ranks")
    count, group = heads // ranks, heads // kv_heads
    shares = ((rank * count, (rank * count) // group) for rank in range(ranks))
    return tuple(HeadShare(first, count, kv_first, max(1, kv_heads // ranks)) for first, kv_first in shares)


def _spread(
    strategy: str, q: Layout, k: Layout, mask: LoweredMask | None, heads: int, kv_heads: int, inner: int
) -> Schedule:
    _check(mask, q, k)
    rows, keys = q.grouped(inner), k.grouped(inner)
    shares = head_shares(heads, kv_heads, inner)
    return Schedule(strategy, q, k, _ring_steps(rows, keys, mask), shares, fold(mask))


def _ring_steps(q: Layout, k: Layout, mask: LoweredMask | None) -> tuple[tuple[Step, ...], ...]:
    ranks = q.ranks
    blocks = _blocks(mask, q, k)
    needed = np.zeros((ranks, ranks), bool)
    for pair in blocks:
        needed[pair] = True
    way = journey(needed)
    hops, wanted = way.hops, way.wanted
    steps = []
    for rank in range(ranks):
        line = []
        for t, hop in enumerate(hops):
            source, send_to, receive_from = (rank - hop) % ranks, None, None
            if t + 1 < len(hops):
                far = hops[t + 1] - hop
                send_to = (rank + far) % ranks if wanted[t + 1, source] else None
                receive_from = (rank - far) % ranks if wanted[t + 1, (rank - hops[t + 1]) % ranks] else None
            line.append(Step(source, blocks.get((rank, source), ()), send_to, receive_from))
        steps.append(tuple(line))
    return tuple(steps)


def _blocks(mask: LoweredMask | None, q: Layout, k: Layout) -> dict[tuple[int, int], tuple[Block, ...]]:
    """The blocks with a visible pair, by (rank, source)."""
    _check(mask, q, k)
    rows = [(rank, begin, run) for rank in range(q.ranks) for begin, run in _begins(q.runs(rank))]
    keys = [(rank, begin, run) for rank in range(k.ranks) for begin, run in _begins(k.runs(rank))]
    counts = pairs_between(mask, [run for _, _, run in rows], k)
    found: dict[tuple[int, int], list[Block]] = {}
    for n, m in zip(*(side.tolist() for side in np.nonzero(counts)), strict=True):
        (rank, q_begin, run), (source, k_begin, seen) = rows[n], keys[m]
        found.setdefault((rank, source), []).append(Block(run, seen, q_begin, k_begin, int(counts[n, m])))
    return {pair: tuple(blocks) for pair, blocks in found.items()}


def _begins(runs: tuple[Run, ...]) -> list[tuple[int, Run]]:
    """Each run with where it begins in its shard."""
    begins = np.cumsum([0, *(run.count for run in runs)]).tolist()
    return list(zip(begins[:-1], runs, strict=True))


def _check(mask: LoweredMask | None, q: Layout, k: Layout) -> None:
    if q.ranks != k.ranks:
        raise ValueError(f"k: lies over {k.ranks} ranks, expected {q.ranks}, as q")
    if mask is not None and (mask.site.q_len, mask.site.k_len) != (q.length, k.length):
        raise ValueError(
            f"mask: made for {mask.site.q_len} queries and {mask.site.k_len} keys, expected those of the whole call,"
            f" {q.length} and {k.length}"
        )
