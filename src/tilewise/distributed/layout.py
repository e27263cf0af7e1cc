"""How a sequence lies over ranks: which global positions are a rank's local rows, in which order. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from ..masks.part import Run

Kind = Literal["contiguous", "zigzag", "stripe"]


@dataclass(frozen=True)
class Layout:
    """A sequence of `length` positions cut into shards, one for each of `ranks` ranks.

    - "contiguous": rank r holds the r-th piece. Right for windows and documents, whose keys are near.
    - "zigzag": of 2 * ranks pieces, rank r holds pieces r and 2 * ranks - 1 - r. Balances causal masks (Llama 3, Dubey
      et al., 2024, and the head-tail split of torch's context parallel), and neighbours stay neighbours.
    - "stripe": rank r holds the positions r, r + ranks, … (striped attention, Brandon et al., 2023). Balances causal
      masks at every step, but every window reaches every rank.

    Pieces are as equal as can be: the first `length % pieces` of them are longer by one, the rule of `np.array_split`.
    Where ranks outnumber positions, some shards are empty.

    Attributes:
        lengths: unequal pieces instead, in order of position: `ranks` of them for "contiguous", 2 * ranks for "zigzag".

    Raises:
        ValueError: an unknown kind, a negative length, no ranks, or lengths that do not add up; beginning with the
            argument's name.
    """

    kind: Kind
    length: int
    ranks: int
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if self.length < 0:
            raise ValueError(f"length: got {self.length}, expected 0 or more positions")
        if self.ranks < 1:
            raise ValueError(f"ranks: got {self.ranks}, expected 1 or more")
        if self.lengths is None:
            return
        object.__setattr__(self, "lengths", tuple(map(int, self.lengths)))
        pieces = {"contiguous": self.ranks, "zigzag": 2 * self.ranks, "stripe": None}[self.kind]
        if pieces is None:
            raise ValueError("lengths: got some for a stripe layout, whose shards follow from length and ranks")
        if len(self.lengths) != pieces or min(self.lengths) < 0 or sum(self.lengths) != self.length:
            raise ValueError(
                f"lengths: got {len(self.lengths)} numbers that add up to {sum(self.lengths)}, expected {pieces} of 0"
                f" or more that add up to {self.length}"
            )

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Where the pieces begin, and the length; a stripe has one piece."""
        if self.lengths is not None:
            return (0, *map(int, np.cumsum(self.lengths)))
        pieces = {"contiguous": self.ranks, "zigzag": 2 * self.ranks, "stripe": 1}[self.kind]
        least, longer = divmod(self.length, pieces)
        return tuple(n * least + min(n, longer) for n in range(pieces + 1))

    @cached_property
    def run_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the runs of rank 0, rank 1, … begin, and where they end (one past the last), twice (runs,) int64."""
        runs = [run for rank in range(self.ranks) for run in self.runs(rank)]
        edges = np.array([(run.start, run.start + run.step * (run.count - 1) + 1) for run in runs], np.int64)
        begins, ends = edges.reshape(-1, 2).T
        return begins, ends

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The rank's local rows: these runs of global positions, one after another; none is empty.

        Pieces that touch are one run, as those of the last rank of a zigzag do.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank: got {rank}, expected one of 0 … {self.ranks - 1}")
        if self.kind == "stripe":
            runs = [Run(rank, max(0, -(-(self.length - rank) // self.ranks)), self.ranks)]
        else:
            pieces = (rank,) if self.kind == "contiguous" else (rank, 2 * self.ranks - 1 - rank)
            runs = [Run(self.edges[piece], self.edges[piece + 1] - self.edges[piece]) for piece in pieces]
        runs = [run for run in runs if run.count]
        if len(runs) == 2 and runs[0].start + runs[0].count == runs[1].start:
            runs = [Run(runs[0].start, runs[0].count + runs[1].count)]
        return tuple(runs)

    def local_length(self, rank: int) -> int:
        """Number of the rank's local rows."""
        return sum(run.count for run in self.runs(rank))

    def positions(self, rank: int) -> np.ndarray:
        """(local length,) int64: the global position of each local row."""
        places = [run.start + run.step * np.arange(run.count, dtype=np.int64) for run in self.runs(rank)]
        return np.concatenate([np.zeros(0, np.int64), *places])

    def order(self) -> np.ndarray:
        """(length,) int64: global positions of rank 0's rows, then rank 1's, …

        `x[order]` puts a whole sequence in the order of the ranks; `gathered[np.argsort(order)]` puts shards that were
        concatenated in order of rank back.
        """
        return np.concatenate([self.positions(rank) for rank in range(self.ranks)])

    def grouped(self, inner: int) -> Layout:
        """How the sequence lies over groups of `inner` neighbouring ranks, when each group puts its rows together.

        Raises:
            ValueError: `inner` does not divide the ranks, or a stripe is cut into several groups: the rows of a group
                would not be evenly spaced.
        """
        if inner < 1 or self.ranks % inner:
            raise ValueError(f"inner: got {inner}, expected a divisor of {self.ranks} ranks")
        if inner == 1:
            return self
        if self.kind == "stripe":
            if inner != self.ranks:
                raise ValueError(f"inner: got {inner} of {self.ranks} ranks of a stripe layout, expected all or 1")
            return Layout("contiguous", self.length, 1)
        edges = self.edges[::inner]
        return Layout(self.kind, self.length, self.ranks // inner, tuple(b - a for a, b in pairwise(edges)))

    def group_order(self, inner: int, group: int) -> np.ndarray:
        """(group length,) int64: `rows[group_order]` puts rows that a group's ranks concatenated in the grouped order.

        Args:
            inner, group: the size of the groups, as for `grouped`, and which of them.
        """
        members = range(group * inner, (group + 1) * inner)
        return np.argsort(np.concatenate([self.positions(rank) for rank in members]), kind="stable")
