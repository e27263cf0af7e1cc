"""Predictions for sizes at which neither a mask's facts nor a schedule fit: 100M tokens, 16,384 ranks.

The same model as `cost.py`, fed with estimates. Masks are given as patterns: functions from a row to its interval of
keys, both ends of which never decrease, so that the shards which a run of rows needs follow from its first and its last
row. Pairs are sums over some rows of a run, and only some ranks are looked at; each is taken to keep pace with its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..problem import AttentionProblem
from .cost import Cost, Sizes, gather_cost, ring_cost, spread_cost
from .layout import Kind, Layout
from .machine import Machine
from .pairs import capped_sums
from .schedule import head_shares
from .timing import Load

_ROWS = 1 << 16  # rows that are looked at in a whole mask


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask of self-attention as intervals: row i sees the keys [start(i), stop(i)), neither of which ever decreases.

    Attributes:
        name: for people. bounds: (n,) positions and the length to (n,) starts and (n,) stops.
    """

    name: str
    bounds: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def full() -> Pattern:
    """Every row sees every key."""
    return Pattern("full", lambda i, length: (0 * i, 0 * i + length))


def causal() -> Pattern:
    """Row i sees the keys up to i."""
    return Pattern("causal", lambda i, length: (0 * i, i + 1))


def window(keys: int) -> Pattern:
    """Row i sees the last `keys` keys up to i, its own included."""
    return Pattern(f"window of {keys}", lambda i, length: (np.maximum(i + 1 - keys, 0), i + 1))


def documents(edges: np.ndarray, name: str = "documents") -> Pattern:
    """Causal inside documents.

    Args:
        edges: (n,) int64: where documents begin, ascending, the first at 0.
    """
    return Pattern(name, lambda i, length: (edges[np.searchsorted(edges, i, side="right") - 1], i + 1))


def drawn_documents(length: int, mean: int, seed: int = 0) -> np.ndarray:
    """(n,) int64 edges of documents whose lengths are drawn as exp(normal) of that mean, as those of web text roughly
    are: most short, some very long."""
    rng, spread = np.random.default_rng(seed), 1.0
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, 2 * length // mean + 64)
    ends = np.cumsum(np.maximum(drawn, 1).astype(np.int64))
    return np.concatenate([[0], ends[ends < length]])


def estimated_load(pattern: Pattern, layout: Layout, places: int = 128) -> Load:
    """A ring's load for self-attention, from a sample: which shards are needed is exact, pairs are estimated.

    Args:
        layout: contiguous or zigzag, each rank with some rows.
        places: ranks looked at: half of them the busiest, half evenly spaced, the first and last among them.
    """
    ranks, edges, owners = layout.ranks, np.array(layout.edges), _owners(layout)
    chosen = _chosen(pattern, layout, places)
    rows = max(64, _ROWS // ranks)  # of each run
    table = np.zeros((len(chosen), ranks))
    for n, rank in enumerate(chosen):
        for run in layout.runs(int(rank)):
            inside = run.start + ((np.arange(rows) + 0.5) / rows * run.count).astype(np.int64)
            starts, stops = pattern.bounds(inside, layout.length)
            counts = np.diff(capped_sums(stops, edges) - capped_sums(starts, edges)) * (run.count / rows)
            ends = pattern.bounds(np.array([run.start, run.start + run.count - 1]), layout.length)
            reached = (edges[:-1] < ends[1][1]) & (edges[1:] > ends[0][0])
            # A piece that only rows between the sampled ones see is needed all the same, if only for a pair.
            table[n] += np.bincount(owners, np.where(reached, np.maximum(counts, 1.0), 0.0), ranks)
    line = np.arange(len(chosen))
    hops = np.array([0, *(d for d in range(1, ranks) if table[line, (chosen - d) % ranks].any())])
    sources = (chosen - hops[:, None]) % ranks
    lengths = np.bincount(owners, np.diff(edges), ranks)
    wanted = _last_hop(pattern, layout)[sources[1:]] >= hops[1:, None]
    return Load(ranks, chosen, hops, table[line, sources], np.where(wanted, lengths[sources[1:]], 0.0),
                visible_pairs(pattern, layout.length))  # fmt: skip


def visible_pairs(pattern: Pattern, length: int) -> float:
    """Pairs of the whole mask, estimated."""
    inside = ((np.arange(_ROWS) + 0.5) / _ROWS * length).astype(np.int64)
    starts, stops = pattern.bounds(inside, length)
    return float((stops - starts).mean() * length)


def predict(pattern: Pattern, problem: AttentionProblem, kind: Kind, ranks: int, machine: Machine) -> Iterator[Cost]:
    """The costs that `cost.costs` would give for self-attention of `problem.q_len` tokens, estimated.

    Args:
        kind: "contiguous" or "zigzag".
    """
    sizes, whole = Sizes.of(problem), Layout(kind, problem.q_len, ranks)
    load = estimated_load(pattern, whole)
    yield ring_cost(sizes, load, whole, machine)
    yield gather_cost(sizes, load, whole, whole, machine)
    for inner in (n for n in range(2, ranks + 1) if ranks % n == 0):
        try:
            head_shares(sizes.heads, sizes.kv_heads, inner)
        except ValueError:
            continue
        yield spread_cost(sizes, estimated_load(pattern, whole.grouped(inner)), whole, whole, machine, inner)


def _chosen(pattern: Pattern, layout: Layout, places: int) -> np.ndarray:
    """(n,) ranks to look at; the busiest are found by 16 rows of each piece."""
    if layout.ranks <= places:
        return np.arange(layout.ranks)
    edges = np.array(layout.edges)
    inside = edges[:-1, None] + ((np.arange(16) + 0.5) / 16 * np.diff(edges)[:, None]).astype(np.int64)
    starts, stops = pattern.bounds(inside.ravel(), layout.length)
    work = np.bincount(_owners(layout), (stops - starts).reshape(inside.shape).mean(1) * np.diff(edges))
    spaced = np.linspace(0, layout.ranks - 1, places - places // 2).round().astype(int)
    return np.union1d(spaced, np.argsort(work, kind="stable")[-(places // 2) :])


def _owners(layout: Layout) -> np.ndarray:
    """(pieces,) the rank that holds each piece, in order of position."""
    pieces = np.arange(len(layout.edges) - 1)
    return np.minimum(pieces, pieces[::-1]) if layout.kind == "zigzag" else pieces


def _last_hop(pattern: Pattern, layout: Layout) -> np.ndarray:
    """(ranks,) the largest distance, round the ring, from a shard to a rank that reads it."""
    ranks, edges = layout.ranks, np.array(layout.edges)
    owners, last = _owners(layout), np.zeros(layout.ranks, np.int64)
    # The rows that see a piece are one interval, since both ends of the rows' intervals never decrease.
    first_row = _first(lambda i: pattern.bounds(i, layout.length)[1] > edges[:-1], len(owners), layout.length)
    past_row = _first(lambda i: pattern.bounds(i, layout.length)[0] >= edges[1:], len(owners), layout.length)
    first, final = np.searchsorted(edges, first_row, "right") - 1, np.searchsorted(edges, past_row - 1, "right") - 1
    # In pieces; those of the second half of a zigzag belong to the ranks in reverse.
    halves = [(np.minimum(first, ranks), np.minimum(final, ranks - 1))]
    if layout.kind == "zigzag":
        halves.append((2 * ranks - 1 - final, 2 * ranks - 1 - np.maximum(first, ranks)))
    for low, high in halves:
        before = (low < owners) & (high >= owners - 1)  # the rank before the owner is the farthest round the ring
        far = np.where(before, ranks - 1, (high - owners) % ranks)
        np.maximum.at(last, owners, np.where((low <= high) & (past_row > first_row), far, 0))
    return last


def _first(holds: Callable[[np.ndarray], np.ndarray], count: int, length: int) -> np.ndarray:
    """(count,) the first row at which each condition holds, `length` where none; conditions never cease to hold."""
    low, high = np.zeros(count, np.int64), np.full(count, length, np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        found = holds(np.minimum(middle, length - 1)) & (middle < length)
        low, high = np.where((low < high) & ~found, middle + 1, low), np.where((low < high) & found, middle, high)
    return low
