"""How long a ring's steps take when each overlaps its products with the exchange for the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..masks.lower import LoweredMask
from .layout import Layout
from .pairs import fold, journey
from .schedule import needs


@dataclass(frozen=True, eq=False)
class Load:
    """What the places of a ring do, step by step.

    Attributes:
        ranks: places of the ring; places: (P,) those that the arrays speak of, all or a sample.
        hops: (T,) distance of the shard read at each step.
        pairs: (T, P) float64: visible pairs of one head and batch row.
        received: (T - 1, P) keys that arrive after each step but the last; 0: nothing comes.
        total: visible pairs of all places.
    """

    ranks: int
    places: np.ndarray
    hops: np.ndarray
    pairs: np.ndarray
    received: np.ndarray
    total: float

    @property
    def whole(self) -> bool:
        """Whether every place is here."""
        return len(self.places) == self.ranks


def load_of(mask: LoweredMask | None, q: Layout, k: Layout) -> Load:
    """The load of the ring's schedule, without its objects: O(Sq log Sq + ranks ** 2)."""
    table = needs(mask, q, k)
    way = journey(table > 0)
    everyone, hops = np.arange(q.ranks), np.array(way.hops)
    sources = (everyone - hops[:, None]) % q.ranks
    lengths = np.array([k.local_length(rank) for rank in range(k.ranks)])
    arriving = np.take_along_axis(way.wanted, sources, 1)[1:]
    pairs = table[everyone, sources] / fold(mask)
    return Load(q.ranks, everyone, hops, pairs, np.where(arriving, lengths[sources[1:]], 0), float(pairs.sum()))


def ring_seconds(load: Load, compute: np.ndarray, transfer: np.ndarray) -> float:
    """Seconds until the last place is done.

    A step starts when the one before is computed and its exchange is over; an exchange runs from the moment that both
    sides have started the step. In a sample of places each is taken to keep pace with its neighbours, so that the
    answer is the largest sum of a place's steps, each the longer of products and exchange.

    Args:
        compute: (T, P) seconds of each step's products; transfer: (T - 1, P) seconds of what a place receives.
    """
    start = np.zeros(len(load.places))
    for t in range(len(compute) - 1):
        if not load.whole:
            start = start + np.maximum(compute[t], transfer[t])
            continue
        far = int(load.hops[t + 1] - load.hops[t])
        moves = transfer[t] > 0
        arrived = np.where(moves, np.maximum(start, np.roll(start, far)) + transfer[t], 0.0)
        # The sender's buffer is free when its receiver has all of it.
        start = np.maximum(start + compute[t], np.maximum(arrived, np.roll(arrived, -far)))
    return float((start + compute[-1]).max(initial=0.0))
