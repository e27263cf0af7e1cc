"""A schedule as one program for all devices: what each visit of keys computes, and which devices send to which.

A program that is compiled once for all devices has the same steps on each; what differs is looked up by the device's
place. So runs of positions are tables of starts, and blocks that only some devices compute are conditions on the place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ...distributed import Layout, Schedule
from ...masks.part import Run

Array = Any
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of `count` positions on every device, from another start on each."""

    starts: tuple[int, ...]
    count: int
    step: int = 1

    def at(self, place: Array) -> Run:
        """The run of the device at a place, which may be traced."""
        if len(set(self.starts)) == 1:
            return Run(self.starts[0], self.count, self.step)
        return Run(jnp.asarray(self.starts, jnp.int32)[place], self.count, self.step)


@dataclass(frozen=True, slots=True)
class Visit:
    """Keys that are attended to together.

    Attributes:
        keys: the pieces of the keys held.
        needed: needed[i][j][n]: whether device n attends with its i-th piece of rows to the j-th piece of keys.
        sends: (from, to): who passes the keys on, to be used in the next visit.
        home: (from, to): who holds keys that go no further, and whose they are; their gradients go there.
        stays: stays[n]: whether device n's keys are its own and go no further.
    """

    keys: tuple[Piece, ...]
    needed: tuple[tuple[tuple[bool, ...], ...], ...]
    sends: Pairs = ()
    home: Pairs = ()
    stays: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Course:
    """All visits of a call, for devices along the mesh axes `names`.

    Attributes:
        rows: the pieces of the queries.
        natural: where keys are gathered, their order by devices when they are put in the sequence's own; None: they
            stay in the order of the devices.
        gathers: whether the one visit is of all keys, gathered.
    """

    names: tuple[str, ...]
    rows: tuple[Piece, ...]
    visits: tuple[Visit, ...]
    gathers: bool = False
    natural: Layout | None = None


def pieces(layout: Layout) -> tuple[Piece, ...]:
    """The local rows of all devices; shards are of one size."""
    ranks, size = layout.ranks, layout.length // layout.ranks
    if layout.kind == "stripe":
        return (Piece(tuple(range(ranks)), size, ranks),)
    if layout.kind == "contiguous":
        return (Piece(tuple(size * n for n in range(ranks)), size),)
    half = size // 2
    firsts, lasts = (tuple(half * n for n in range(ranks)), tuple(half * (2 * ranks - 1 - n) for n in range(ranks)))
    return Piece(firsts, half), Piece(lasts, half)


def ring_course(schedule: Schedule, names: tuple[str, ...]) -> Course:
    """Keys travel as the schedule says."""
    places, rows = range(len(schedule.steps)), pieces(schedule.rows)
    shards, visits, holds = pieces(schedule.keys), [], [True for _ in places]
    for t in range(len(schedule.steps[0])):
        steps = [schedule.steps[n][t] for n in places]
        needed = tuple(
            tuple(tuple(_meets(step.blocks, rows[i], i, shards[j], j) for step in steps) for j in range(len(shards)))
            for i in range(len(rows))
        )
        sends = tuple((n, step.send_to) for n, step in enumerate(steps) if step.send_to is not None)
        ends = [n for n in places if holds[n] and steps[n].send_to is None]
        visits.append(
            Visit(
                tuple(Piece(tuple(shard.starts[s.source] for s in steps), shard.count, shard.step) for shard in shards),
                needed,
                sends,
                tuple((n, steps[n].source) for n in ends if steps[n].source != n),
                tuple(n in ends and steps[n].source == n for n in places),
            )
        )
        holds = [n in {to for _, to in sends} for n in places]
    return Course(names, rows, tuple(visits))


def gather_course(schedule: Schedule, names: tuple[str, ...]) -> Course:
    """All keys at once; those of a stripe shard by shard, since a bias over the distance wants rows' and keys' step."""
    rows, layout, ranks = pieces(schedule.q), schedule.k, schedule.k.ranks
    if layout.kind == "stripe":
        keys = tuple(Piece((n,) * ranks, layout.length // ranks, ranks) for n in range(ranks))
    else:
        keys = (Piece((0,) * ranks, layout.length),)
    everyone = (True,) * ranks
    needed = tuple(tuple(everyone for _ in keys) for _ in rows)
    natural = layout if layout.kind == "zigzag" else None
    return Course(names, rows, (Visit(keys, needed),), gathers=True, natural=natural)


def _meets(blocks: Any, rows: Piece, i: int, keys: Piece, j: int) -> bool:
    """Whether some block has rows of the i-th piece and keys of the j-th; blocks may span pieces that touch."""

    def overlap(begin: int, count: int, piece: Piece, n: int) -> bool:
        return begin < (n + 1) * piece.count and n * piece.count < begin + count

    return any(
        overlap(block.q_begin, block.rows.count, rows, i) and overlap(block.k_begin, block.keys.count, keys, j)
        for block in blocks
    )
