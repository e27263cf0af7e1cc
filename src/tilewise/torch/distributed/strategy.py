"""Which strategy a call takes: the one asked for, or the cheapest of those that can run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...distributed.cost import costs, pick
from ...distributed.layout import Layout
from ...distributed.machine import machine_of
from ...distributed.schedule import Schedule, all_gather, grid, ring, ulysses
from .facts import Facts, has_own_rows

_WITH_OTHER_ROWS = ("ulysses", "grid")


def schedule_of(strategy: str, facts: Facts, operands: Sequence[Tensor], q: Layout, k: Layout) -> Schedule:
    """The schedule of a call.

    Args:
        strategy: as of `context_parallel_attention`; facts: of all heads; operands: of which the first are q, k and v.

    Raises:
        ValueError: the strategy cannot run this call.
    """
    heads, kv_heads, ranks = operands[0].shape[1], operands[1].shape[1], q.ranks
    own_rows = has_own_rows(facts)
    if strategy in _WITH_OTHER_ROWS and own_rows:
        raise ValueError(
            f"strategy: {strategy!r} needs the rows of other ranks, but a mask or bias holds this rank's alone; "
            f"expected it whole, or strategy 'ring' or 'all_gather'"
        )
    inner = _inner(q, heads, kv_heads) if strategy == "grid" and ranks > 1 else ranks
    if strategy == "auto":
        strategy, inner = _cheapest(facts, operands, q, k, own_rows)
    if strategy == "ulysses" and ranks > 1:
        return ulysses(q, k, facts.mask, heads, kv_heads)
    if strategy == "grid" and ranks > 1:
        return grid(q, k, facts.mask, heads, kv_heads, inner)
    if strategy == "all_gather":
        return all_gather(q, k, facts.mask)
    return ring(q, k, facts.mask)


def _cheapest(facts: Facts, operands: Sequence[Tensor], q: Layout, k: Layout, own_rows: bool) -> tuple[str, int]:
    """The strategy of the least predicted time, and the ranks that exchange heads in it."""
    given = facts.told.operands(operands, facts.mask)
    # With a backward pass whether or not one follows: it must find the strategy that the forward pass took.
    problem = replace(
        facts.told.problem(given, facts.scale, frozenset({"q", "k", "v"})), q_len=q.length, k_len=k.length
    )
    machine = machine_of(problem.device)
    able = [
        cost
        for cost in costs(problem, facts.mask, q, k, machine)
        if not (own_rows and cost.strategy in _WITH_OTHER_ROWS)
    ]
    choice = pick(problem, tuple(able), machine, q.ranks)
    return choice.strategy, choice.inner


def _inner(q: Layout, heads: int, kv_heads: int) -> int:
    """How many ranks of a grid exchange heads: as many as can, but not all."""
    if q.kind == "stripe":
        raise ValueError(
            "strategy: 'grid' cannot join the rows of sharding='stripe'; expected 'contiguous' or 'zigzag'"
        )
    fits = [
        n
        for n in range(2, q.ranks)
        if not q.ranks % n and not heads % n and kv_heads and not (kv_heads % n and n % kv_heads)
    ]
    if not fits:
        raise ValueError(
            f"strategy: 'grid' got {heads} query heads, {kv_heads} key heads and {q.ranks} ranks, expected a divisor "
            f"of the ranks, less than all, that shares the heads; 'ring' needs none"
        )
    return max(fits)
