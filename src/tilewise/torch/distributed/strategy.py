"""Which strategy a call takes: the one asked for, or the cheapest of those that can run it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...distributed.layout import Layout
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
    if strategy == "ulysses" and ranks > 1:
        return ulysses(q, k, facts.mask, heads, kv_heads)
    if strategy == "grid" and ranks > 1:
        return grid(q, k, facts.mask, heads, kv_heads, _inner(q, heads, kv_heads))
    if strategy == "all_gather":
        return all_gather(q, k, facts.mask)
    return ring(q, k, facts.mask)


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
