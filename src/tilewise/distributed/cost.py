"""What a call costs by each strategy, and the choice among them: a pure function of numbers that every rank has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..masks.lower import LoweredMask
from ..problem import ITEM_BYTES, AttentionProblem
from .layout import Layout
from .machine import Machine, machine_of
from .schedule import head_shares
from .timing import Load, load_of, ring_seconds

_EQUAL = 1.01  # times whose ratio is less are equal: a prediction knows no more


@dataclass(frozen=True)
class Cost:
    """What the busiest rank does by one strategy; all zeros where it is refused.

    Attributes:
        strategy: "ring", "all_gather", "ulysses" or "grid"; kind: the layout's; inner: ranks among which heads are
            spread.
        refused: why it cannot be used, or "".
        steps: kernel rounds; sent: bytes sent, forward; held: bytes of keys held beside the own shard.
        flops: of the forward pass; imbalance: the most work of a rank over the mean.
        forward, backward: predicted seconds; computing: seconds of the forward that are products.
    """

    strategy: str
    kind: str
    inner: int = 1
    refused: str = ""
    steps: int = 0
    sent: float = 0.0
    held: float = 0.0
    flops: float = 0.0
    imbalance: float = 1.0
    forward: float = 0.0
    backward: float = 0.0
    computing: float = 0.0

    @property
    def name(self) -> str:
        """Strategy, and how ranks are grouped in a grid."""
        return f"grid of {self.inner} inside" if self.strategy == "grid" else self.strategy


@dataclass(frozen=True)
class Sizes:
    """What a prediction needs of a problem.

    Attributes:
        key, query, out: bytes of k and v, of q, of out with lse, for one position, all heads and the batch.
        gradient: bytes of the gradients to k and v for one key while they are summed.
        flops: for one pair of one head and batch row, times all heads and batch rows: forward; backward: its own.
    """

    heads: int
    kv_heads: int
    key: float
    query: float
    out: float
    gradient: float
    flops: float
    backward: float

    @classmethod
    def of(cls, problem: AttentionProblem) -> Sizes:
        """The sizes of a whole call."""
        width, values, item = problem.head_dim, problem.value_dim, ITEM_BYTES[problem.dtype]
        wide = ITEM_BYTES[problem.accumulator]
        rows, keys = problem.batch * problem.q_heads, problem.batch * problem.kv_heads
        return cls(
            problem.q_heads,
            max(1, problem.kv_heads),
            keys * (width + values) * item,
            rows * width * item,
            rows * (values * item + wide),
            keys * (width + values) * wide,
            rows * 2.0 * (width + values),
            # Scores again, then the gradients to p, v, q and k: five products for the forward pass's two.
            rows * (6.0 * width + 4.0 * values),
        )


@dataclass(frozen=True)
class Choice:
    """The strategy chosen, and the table that it was chosen from; `str` prints it.

    Attributes:
        best: the cheapest that is not refused; costs: all, in the order in which they were weighed.
        problem, machine, ranks: what was asked.
    """

    best: Cost
    costs: tuple[Cost, ...]
    problem: AttentionProblem
    machine: Machine
    ranks: int

    @property
    def strategy(self) -> str:
        """Name of the strategy chosen."""
        return self.best.strategy

    @property
    def inner(self) -> int:
        """Ranks among which it spreads heads."""
        return self.best.inner

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:
        """(strategy, why it was or was not chosen), in words."""
        return tuple((f"{cost.name}, {cost.kind}", self._why(cost)) for cost in self.costs)

    def _why(self, cost: Cost) -> str:
        if cost.refused:
            return cost.refused
        if cost is self.best:
            return "chosen: of the least times (within 1 %), the one that holds and sends least"
        ratio = _total(cost, self.problem) / _total(self.best, self.problem)
        if ratio <= _EQUAL:
            return "as fast, but holds or sends as much or more"
        return f"{ratio:.3g} times the time of {self.best.name}"

    def __str__(self) -> str:
        from .explain import table  # words are made where words are asked for

        return table(self)


def choose_strategy(
    problem: AttentionProblem, mask: LoweredMask | None, q: Layout, k: Layout, machine: Machine | None = None
) -> Choice:
    """The strategy of the least predicted time for a call whose sequences lie so over ranks.

    Every rank gets the same answer, since the answer depends on the whole call alone. The ring is never refused.

    Args:
        problem: of the whole call; its `gradients` say whether a backward pass counts.
        mask: the whole call's facts; None: every row sees every key.
        machine: rates of ranks and links; None: assumed by the problem's device.

    Raises:
        ValueError: layouts over different numbers of ranks, or a mask of other lengths.
    """
    machine = machine or machine_of(problem.device)
    return pick(problem, tuple(costs(problem, mask, q, k, machine)), machine, q.ranks)


def choose_layout(
    problem: AttentionProblem, mask: LoweredMask | None, ranks: int, machine: Machine | None = None
) -> Choice:
    """The same where the layout is still open: the cheapest pair of strategy and layout.

    Args, Raises: as `choose_strategy`.
    """
    machine = machine or machine_of(problem.device)
    found: list[Cost] = []
    for kind in ("contiguous", "zigzag", "stripe"):
        q, k = (Layout(kind, length, ranks) for length in (problem.q_len, problem.k_len))
        found += costs(problem, mask, q, k, machine)
    return pick(problem, tuple(found), machine, ranks)


def pick(problem: AttentionProblem, found: tuple[Cost, ...], machine: Machine, ranks: int) -> Choice:
    """The cheapest of some costs; of equal ones that which holds and sends less, then the first."""
    allowed = [cost for cost in found if not cost.refused]
    least = min(_total(cost, problem) for cost in allowed)
    close = [cost for cost in allowed if _total(cost, problem) <= _EQUAL * least]
    return Choice(min(close, key=lambda cost: (cost.held, cost.sent)), found, problem, machine, ranks)


def costs(
    problem: AttentionProblem, mask: LoweredMask | None, q: Layout, k: Layout, machine: Machine
) -> Iterator[Cost]:
    """The costs of ring, all-gather, Ulysses, and of every grid that divides the ranks."""
    sizes = Sizes.of(problem)
    load = load_of(mask, q, k)
    yield ring_cost(sizes, load, q, machine)
    yield _within(machine, gather_cost(sizes, load, q, k, machine))
    for inner in (n for n in range(2, q.ranks + 1) if q.ranks % n == 0):
        strategy = "ulysses" if inner == q.ranks else "grid"
        try:
            head_shares(sizes.heads, sizes.kv_heads, inner)
            rows, keys = q.grouped(inner), k.grouped(inner)
        except ValueError as refusal:
            yield Cost(strategy, q.kind, inner, refused=str(refusal))
            continue
        yield spread_cost(sizes, load_of(mask, rows, keys), q, k, machine, inner)


def ring_cost(sizes: Sizes, load: Load, q: Layout, machine: Machine, inner: int = 1) -> Cost:
    """A ring over groups of `inner` ranks, without the exchange inside the groups."""
    share, kv_share = 1 / inner, max(1, sizes.kv_heads // inner) / sizes.kv_heads
    first = load.places[None, :] * inner
    far = np.diff(load.hops)[:, None]
    inside = ((first - far * inner) % (load.ranks * inner)) // machine.node == first // machine.node
    if not load.whole:  # every place keeps pace with its neighbours, and one of them waits for the slower link
        inside = np.broadcast_to(load.ranks * inner <= machine.node, inside.shape)
    working = (load.pairs > 0) * machine.overhead
    compute = load.pairs * (sizes.flops * share / machine.flops)
    forward = ring_seconds(load, compute + working, machine.transfer(load.received * sizes.key * kv_share, inside))
    travelling = (sizes.key + sizes.gradient) * kv_share
    backward = ring_seconds(
        load,
        load.pairs * (sizes.backward * share / machine.flops) + working,
        machine.transfer(load.received * travelling, inside),
    )
    if len(load.hops) > 1:  # the summed gradients go home
        home = load.received.max(initial=0) * sizes.gradient * kv_share
        backward += float(machine.transfer(home, load.ranks * inner <= machine.node))
    arriving = load.received * (sizes.key * kv_share)
    return Cost(
        "ring", q.kind, inner, steps=len(load.hops), sent=float(arriving.sum(0).max(initial=0)),
        held=float(arriving.max(initial=0)), flops=float(load.pairs.sum(0).max(initial=0)) * sizes.flops * share,
        imbalance=_imbalance(load), forward=forward, backward=backward, computing=float(compute.sum(0).max(initial=0)),
    )  # fmt: skip


def gather_cost(sizes: Sizes, load: Load, q: Layout, k: Layout, machine: Machine) -> Cost:
    """Everything gathered first (a ring of all but the own shard), then one round of products; gradients to k and v are
    scattered back as sums. Nothing overlaps."""
    ranks, flops = q.ranks, float(load.pairs.sum(0).max(initial=0)) * sizes.flops
    foreign = k.length * (ranks - 1) / ranks
    waits = (ranks - 2) * (machine.latency if ranks > machine.node else machine.node_latency or machine.latency)
    inside = ranks <= machine.node
    gather = float(machine.transfer(foreign * sizes.key, inside)) + max(0.0, waits)
    scatter = float(machine.transfer(foreign * sizes.gradient, inside)) + max(0.0, waits)
    computing = flops / machine.flops
    return Cost(
        "all_gather", q.kind, steps=1, sent=foreign * sizes.key, held=foreign * sizes.key, flops=flops,
        imbalance=_imbalance(load), computing=computing, forward=gather + computing + machine.overhead,
        backward=gather + computing * sizes.backward / sizes.flops + machine.overhead + scatter,
    )  # fmt: skip


def spread_cost(sizes: Sizes, load: Load, q: Layout, k: Layout, machine: Machine, inner: int) -> Cost:
    """Heads spread over `inner` ranks, with a ring of groups around them where there are several."""
    cost = ring_cost(sizes, load, q, machine, inner)
    kv_sent = (inner - 1) * max(1, sizes.kv_heads // inner) / sizes.kv_heads
    rows, keys = (side.length / side.ranks for side in (q, k))
    there = rows * sizes.query * (inner - 1) / inner + keys * sizes.key * kv_sent
    back = rows * sizes.out * (inner - 1) / inner
    inside = machine.one_node(inner)
    waits = (inner - 2) * (machine.latency if not inside else machine.node_latency or machine.latency)
    exchange = sum((float(machine.transfer(amount, inside)) + waits for amount in (there, back)), 0.0)
    return Cost(
        "ulysses" if inner == q.ranks else "grid", q.kind, inner, steps=cost.steps, sent=cost.sent + there + back,
        held=cost.held + keys * sizes.key * (max(1, sizes.kv_heads // inner) * inner / sizes.kv_heads - 1),
        flops=cost.flops, imbalance=cost.imbalance, computing=cost.computing,
        # Backward, the gradient of out goes there and those of q, k and v come back: the same bytes.
        forward=cost.forward + exchange, backward=cost.backward + exchange,
    )  # fmt: skip


def _within(machine: Machine, cost: Cost) -> Cost:
    """The cost, or its refusal where what is held does not fit."""
    if machine.memory is None or cost.held <= machine.memory:
        return cost
    why = f"memory: would hold {cost.held:.3g} bytes of others' keys, expected at most {machine.memory:.3g}"
    return Cost(cost.strategy, cost.kind, cost.inner, refused=why)


def _imbalance(load: Load) -> float:
    mean = load.total / load.ranks
    return float(load.pairs.sum(0).max(initial=0)) / mean if mean else 1.0


def _total(cost: Cost, problem: AttentionProblem) -> float:
    return cost.forward + (cost.backward if problem.gradients else 0.0)
