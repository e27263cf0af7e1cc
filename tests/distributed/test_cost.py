"""Costs and the choice among strategies: pure functions, held against the schedules and against a plain replay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tilewise as tw
from tilewise.distributed import (
    MACHINES,
    Cost,
    Layout,
    Machine,
    Schedule,
    all_gather,
    choose_layout,
    choose_strategy,
    explain,
    grid,
    ring,
    ulysses,
)
from tilewise.distributed.cost import Sizes, costs, ring_cost
from tilewise.distributed.timing import load_of
from tilewise.masks.lower import LoweredMask, lower
from tilewise.masks.site import Site
from tilewise.problem import AttentionProblem

SIMPLE = Machine(flops=1e9, bandwidth=1e6, latency=1e-3)
_RNG = np.random.default_rng(4)
MASKS = {
    "full": None,
    "causal": tw.causal(),
    "window": tw.causal() & tw.window(100, 0),
    "both sides": tw.window(70, 90),
    "documents": tw.causal() & tw.documents(np.sort(_RNG.integers(0, 9, 1024))),
}


def problem_of(n: int, **changes: object) -> AttentionProblem:
    made = AttentionProblem("torch", "cpu", "float32", 2, 8, 4, n, n, 16, 16, gradients=frozenset({"q", "k", "v"}))
    return replace(made, **changes)


def lowered(mask: tw.Mask | None, n: int) -> LoweredMask:
    return lower(mask, Site(1, 1, n, n))


def replayed(schedule: Schedule, sizes: Sizes, machine: Machine) -> float:
    """The forward ring, played step by step over the schedule's own objects, each rank by itself."""
    start = dict.fromkeys(range(schedule.q.ranks), 0.0)
    for t in range(len(schedule.steps[0])):
        over, busy = {}, dict.fromkeys(start, 0.0)
        for rank, steps in enumerate(schedule.steps):
            work = sum(block.pairs for block in steps[t].blocks)
            over[rank] = start[rank] + work * sizes.flops / machine.flops + (machine.overhead if work else 0.0)
        for rank, steps in enumerate(schedule.steps):
            to = steps[t].send_to
            amount = schedule.k.local_length(steps[t].source)
            if to is not None and amount:
                near = rank // machine.node == to // machine.node
                rate = (machine.node_bandwidth if near else None) or machine.bandwidth
                wait = machine.latency if not near or machine.node_latency is None else machine.node_latency
                done = max(start[rank], start[to]) + wait + amount * sizes.key / rate
                busy[rank], busy[to] = max(busy[rank], done), max(busy[to], done)
        start = {rank: max(over[rank], busy[rank]) for rank in start}
    return max(start.values())


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "stripe"])
@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize(
    "machine", [SIMPLE, replace(SIMPLE, bandwidth=1e9, node=4, node_bandwidth=1e11, overhead=1e-4)]
)
def test_the_time_of_a_ring_is_that_of_its_schedule_replayed(kind: str, name: str, machine: Machine) -> None:
    n, mask = 1024, lowered(MASKS[name], 1024)
    layout, sizes = Layout(kind, n, 8), Sizes.of(problem_of(n))
    cost = ring_cost(sizes, load_of(mask, layout, layout), layout, machine)
    schedule = ring(layout, layout, mask)
    assert cost.forward == pytest.approx(replayed(schedule, sizes, machine), rel=1e-9)
    assert cost.steps == len(schedule.steps[0])
    assert cost.imbalance == pytest.approx(schedule.imbalance())
    assert cost.flops == max(schedule.pairs(rank) for rank in range(8)) * sizes.flops
    assert cost.backward > cost.forward


@pytest.mark.parametrize("name", list(MASKS))
def test_bytes_are_those_that_the_schedules_promise(name: str) -> None:
    n, mask, problem = 1024, lowered(MASKS[name], 1024), problem_of(1024)
    layout, sizes = Layout("zigzag", n, 4), Sizes.of(problem)
    made = {"ring": ring(layout, layout, mask), "all_gather": all_gather(layout, layout, mask)}
    made["ulysses"] = ulysses(layout, layout, mask, 8, 4)
    made["grid"] = grid(layout, layout, mask, 8, 4, 2)
    for cost in costs(problem, mask, layout, layout, SIMPLE):
        promised = max(made[cost.strategy].bytes(rank, sizes.key, sizes.query, sizes.out) for rank in range(4))
        assert cost.sent == pytest.approx(promised, abs=1)


def test_sizes_are_those_of_the_arrays() -> None:
    problem = problem_of(100, dtype="bfloat16", value_dim=24)
    sizes = Sizes.of(problem)
    assert sizes.key == 2 * 4 * (16 + 24) * 2 and sizes.query == 2 * 8 * 16 * 2
    assert sizes.out == 2 * 8 * (24 * 2 + 4) and sizes.gradient == 2 * sizes.key
    assert sizes.flops * 100 * 100 == problem.flops()


def test_where_links_are_free_the_busiest_rank_decides() -> None:
    free = Machine(flops=1e9, bandwidth=1e30, latency=0.0)
    for kind in ("contiguous", "zigzag"):
        layout = Layout(kind, 1024, 8)
        for cost in costs(problem_of(1024), lowered(tw.causal(), 1024), layout, layout, free):
            if not cost.refused:
                # Contiguous shards make ranks wait for none but those that have more to do anyway.
                assert cost.forward == pytest.approx(cost.flops / 1e9) == pytest.approx(cost.computing)


def test_better_links_and_ranks_never_cost_time() -> None:
    problem, mask = problem_of(1024), lowered(MASKS["documents"], 1024)
    layout = Layout("zigzag", 1024, 8)

    def seconds(machine: Machine) -> list[float]:
        return [cost.forward + cost.backward for cost in costs(problem, mask, layout, layout, machine)]

    base = replace(SIMPLE, node=4, node_bandwidth=1e8, node_latency=1e-4, overhead=1e-3)
    for better in ({"bandwidth": 1e7}, {"latency": 1e-4}, {"flops": 1e10}, {"node_bandwidth": 1e9}, {"overhead": 0.0}):
        assert all(a <= b for a, b in zip(seconds(replace(base, **better)), seconds(base), strict=True)), better


# (ranks, tokens, heads, kv heads, mask, machine) -> (strategy, layout): what the page says in words.
TABLE = [
    (8, 65536, 32, 8, "window", "h100", ("ring", "contiguous")),
    (64, 65536, 32, 8, "window", "h100", ("ring", "contiguous")),
    (8, 65536, 32, 8, "causal", "h100", ("ring", "zigzag")),
    (8, 8192, 32, 32, "causal", "h100", ("ulysses", "contiguous")),
    (8, 8192, 30, 5, "causal", "h100", ("ring", "zigzag")),
    (16, 65536, 32, 8, "causal", "h100", ("grid", "zigzag")),
    (8, 65536, 7, 7, "causal", "h100", ("ring", "zigzag")),
    (64, 65536, 32, 8, "causal", "ethernet", ("grid", "zigzag")),
    (4, 4096, 7, 1, "full", "cpu", ("ring", "contiguous")),
    (1, 4096, 8, 8, "causal", "cpu", ("ring", "contiguous")),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_table_of_choices(row: tuple) -> None:
    ranks, n, heads, kv_heads, name, machine, expected = row
    mask = {"window": tw.causal() & tw.window(1023, 0), "causal": tw.causal(), "full": None}[name]
    problem = problem_of(n, q_heads=heads, kv_heads=kv_heads, head_dim=128, value_dim=128, dtype="bfloat16", batch=1)
    choice = choose_layout(problem, lowered(mask, n), ranks, MACHINES[machine])
    assert (choice.strategy, choice.best.kind) == expected, str(choice)


def test_a_choice_names_every_strategy_and_why_not() -> None:
    layout = Layout("stripe", 512, 8)
    choice = choose_strategy(problem_of(512, q_heads=12), lowered(tw.causal(), 512), layout, layout)
    reasons = dict(choice.reasons)
    assert sum(why.startswith("chosen") for why in reasons.values()) == 1
    assert reasons["ulysses, stripe"].startswith("heads: got 12 query heads, expected a multiple of 8 ranks")
    assert reasons["grid of 4 inside, stripe"].startswith("inner: ")
    for name in reasons:
        assert name in str(choice)


def test_equal_questions_have_equal_answers() -> None:
    layout = Layout("zigzag", 512, 8)
    first, second = (
        choose_strategy(problem_of(512), lowered(tw.causal(), 512), layout, layout, SIMPLE) for _ in range(2)
    )
    assert first == second


def test_what_does_not_fit_is_not_chosen() -> None:
    # Little work and slow starts: one gather is quicker than seven exchanges, unless its memory is not there.
    slow = Machine(flops=1e15, bandwidth=1e12, latency=1e-3, node=8, node_latency=0.0, overhead=1.0)
    layout, problem = Layout("contiguous", 1024, 8), problem_of(1024, q_heads=7, kv_heads=7)
    assert choose_strategy(problem, None, layout, layout, slow).strategy == "all_gather"
    small = choose_strategy(problem, None, layout, layout, replace(slow, memory=1000))
    assert small.strategy == "ring"
    assert "memory: would hold" in dict(small.reasons)["all_gather, contiguous"]


def test_explain_takes_arrays_of_the_whole_call() -> None:
    outline = np.broadcast_to(np.float32(0), (1, 8, 4096, 64))
    choice = explain(outline, outline, outline, ranks=4, layout="zigzag", mask=tw.causal())
    assert {cost.kind for cost in choice.costs} == {"zigzag"}
    assert all(isinstance(cost, Cost) and cost.backward > 0 for cost in choice.costs)
    assert str(choice).splitlines()[0].startswith("strategy")
    forward = explain(outline, outline, outline, ranks=4, mask=tw.causal(), backward=False)
    assert "backward" not in str(forward)
    with pytest.raises(TypeError, match="^options: got return_lse"):
        explain(outline, outline, outline, ranks=4, return_lse=True)
    with pytest.raises(ValueError, match="^mask: "):
        explain(outline, outline[:, :, :9], outline[:, :, :9], ranks=4, mask=tw.causal())


@pytest.mark.parametrize(("name", "value"), [("flops", 0), ("bandwidth", -1), ("node", 0), ("latency", -1e-9)])
def test_impossible_machines_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got {value}"):
        replace(SIMPLE, **{name: value})
