"""How many pairs of a mask are visible between some rows and some keys, counted without looking at pairs."""

from __future__ import annotations

from collections.abc import Sequence

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


def overlaps(starts: np.ndarray, stops: np.ndarray, keys: Layout) -> np.ndarray:
    """(key runs,) int64: how many keys of each run lie in the intervals, summed over the intervals.

    Args:
        starts, stops: (n,) integers with 0 <= starts <= stops <= keys.length, and maybe equal.
    """
    below = _below_stripes if keys.kind == "stripe" else _below_pieces
    return below(stops, keys) - below(starts, keys)


def _below_pieces(bounds: np.ndarray, keys: Layout) -> np.ndarray:
    """(runs,): the keys of each run below each bound, summed over the bounds.

    A run [a, b) has min(x, b) - min(x, a) keys below x; and sorted, the bounds below an edge e add their own sum and
    the others e each.
    """
    runs = [run for rank in range(keys.ranks) for run in keys.runs(rank)]
    bounds = np.sort(bounds).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(bounds)])

    def capped(edges: list[int]) -> np.ndarray:
        place = np.searchsorted(bounds, edges)
        return sums[place] + (bounds.size - place) * np.asarray(edges, np.int64)

    return capped([run.start + run.count for run in runs]) - capped([run.start for run in runs])


def _below_stripes(bounds: np.ndarray, keys: Layout) -> np.ndarray:
    """The same for stripes: below x are x // ranks keys of each run, and one more of the runs before x % ranks."""
    bounds = bounds.astype(np.int64)
    rest = np.bincount(bounds % keys.ranks, minlength=keys.ranks)
    beyond = rest[::-1].cumsum()[::-1] - rest
    filled = sum(1 for rank in range(keys.ranks) if keys.local_length(rank))
    return ((bounds // keys.ranks).sum() + beyond)[:filled]


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
