"""How many pairs of a mask are visible between some rows and some keys, counted without looking at pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..masks.lower import LoweredMask
from ..masks.part import Run
from .layout import Layout

# Entries of a table "run holds label"; where it would be larger, labels are not used to leave out blocks.
_MOST_LABELS = 1 << 26


def pairs_between(mask: LoweredMask | None, rows: Sequence[Run], keys: Layout) -> np.ndarray:
    """(rows, key runs) int64: visible pairs of each run of rows with each run of keys, ranks' runs in order of rank.

    Exact where the mask is ranges alone; an upper bound where it has labels or bits (0 where no label is common); all
    pairs where its values are not known. Summed over the batch rows and heads that the ranges tell apart (`fold`).
    Costs O(Sq log Sq) and the size of the answer.
    """
    runs = [run for rank in range(keys.ranks) for run in keys.runs(rank)]
    answer = np.outer([run.count for run in rows], [run.count for run in runs]).astype(np.int64)
    if mask is None or not mask.site.concrete or not answer.size:
        return answer
    if mask.ranges is not None:
        for n, run in enumerate(rows):
            starts, stops = (run.of(side, 2, np).ravel() for side in (mask.ranges.starts, mask.ranges.stops))
            answer[n] = overlaps(starts, stops, keys)
    if mask.q_labels is not None and mask.k_labels is not None:
        answer[~_common(mask.q_labels, mask.k_labels, rows, runs)] = 0
    return answer


def fold(mask: LoweredMask | None) -> int:
    """How many batch rows x heads `pairs_between` sums over: those that the mask's ranges tell apart."""
    if mask is None or not mask.site.concrete or mask.ranges is None:
        return 1
    return max(1, mask.ranges.starts.shape[0] * mask.ranges.starts.shape[1])


def by_rank(counts: np.ndarray, q: Layout, k: Layout) -> np.ndarray:
    """(ranks, ranks): the answer of `pairs_between` for all runs of q, summed over the runs of each rank."""
    rows, keys = ([rank for rank in range(side.ranks) for _ in side.runs(rank)] for side in (q, k))
    table = np.zeros((q.ranks, k.ranks), np.int64)
    np.add.at(table, np.ix_(rows, keys), counts)
    return table


@dataclass(frozen=True, eq=False)
class Journey:
    """How shards travel round a ring: at step t, rank r holds shard r - hops[t] (modulo the ranks).

    Attributes:
        hops: distances at which some rank reads a shard, ascending; the first is 0.
        wanted: (steps, ranks) booleans: whether shard s is read at step t or later.
    """

    hops: tuple[int, ...]
    wanted: np.ndarray


def journey(needed: np.ndarray) -> Journey:
    """The journey that serves all readers.

    Args:
        needed: (ranks, ranks) booleans: rank r reads shard s.
    """
    ranks = len(needed)
    everyone = np.arange(ranks)
    hops = (0, *(d for d in range(1, ranks) if needed[everyone, everyone - d].any()))
    reads = np.stack([needed[(everyone + d) % ranks, everyone] for d in hops])
    return Journey(hops, np.logical_or.accumulate(reads[::-1], axis=0)[::-1])


def overlaps(starts: np.ndarray, stops: np.ndarray, keys: Layout) -> np.ndarray:
    """(key runs,) int64: how many keys of each run lie in the intervals, summed over the intervals.

    Args:
        starts, stops: (n,) integers with 0 <= starts <= stops <= keys.length, and maybe equal.
    """
    below = _below_stripes if keys.kind == "stripe" else _below_pieces
    return below(stops, keys) - below(starts, keys)


def _below_pieces(bounds: np.ndarray, keys: Layout) -> np.ndarray:
    """(runs,): the keys of each run below each bound, summed over the bounds.

    A run [a, b) has min(x, b) - min(x, a) keys below x.
    """
    begins, ends = keys.run_edges
    return capped_sums(bounds, ends) - capped_sums(bounds, begins)


def capped_sums(bounds: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(edges,) int64: for each edge e the sum of min(bound, e): sorted, the bounds below e add their own sum, the
    others e each."""
    bounds = np.sort(bounds).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(bounds)])
    place = np.searchsorted(bounds, edges)
    return sums[place] + (bounds.size - place) * edges


def _below_stripes(bounds: np.ndarray, keys: Layout) -> np.ndarray:
    """The same for stripes: below x are x // ranks keys of each run, and one more of the runs before x % ranks."""
    bounds = bounds.astype(np.int64)
    rest = np.bincount(bounds % keys.ranks, minlength=keys.ranks)
    beyond = rest[::-1].cumsum()[::-1] - rest
    return ((bounds // keys.ranks).sum() + beyond)[: keys.length]  # ranks beyond the last position hold no run


def _common(q_labels: np.ndarray, k_labels: np.ndarray, rows: Sequence[Run], keys: Sequence[Run]) -> np.ndarray:
    """(rows, keys) booleans: whether some label stands in both runs, in some batch row and head."""
    count = 1 + max(int(labels.max(initial=0)) for labels in (q_labels, k_labels))
    if count * (len(rows) + len(keys)) > _MOST_LABELS:
        return np.ones((len(rows), len(keys)), bool)
    found = np.zeros((len(rows), len(keys)), bool)
    leading = np.broadcast_shapes(q_labels.shape[:2], k_labels.shape[:2])
    for place in np.ndindex(*leading):
        holds = []
        for labels, runs in ((q_labels, rows), (k_labels, keys)):
            line = labels[tuple(min(n, size - 1) for n, size in zip(place, labels.shape[:2], strict=True))]
            table = np.zeros((len(runs), count), np.float32)
            for n, run in enumerate(runs):
                table[n, run.of(line, 0, np)] = 1
            holds.append(table)
        found |= holds[0] @ holds[1].T > 0
    return found
