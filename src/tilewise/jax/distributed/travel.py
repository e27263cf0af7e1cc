"""Attention of one device's rows to keys that are spread over devices: the keys come by, and their gradients go home.

Ring attention (Liu et al., 2023): partial results are joined by the online softmax's own monoid, in the accumulator's
dtype. The backward pass is a course of its own, in which the gradients of keys and values travel with them, in the
accumulator's dtype too; it keeps what one device holds, and nothing of the others. What travels is sent before it is
computed with, so that the two may overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...kernels.portable.jax_scan import Facts, Smooth
from ...kernels.state import merge
from ...masks.part import Run, table_places
from ..case import Case
from ..derivative import attention
from ..maps import BACKWARD
from .blocks import Work, put
from .course import Course, Piece, Visit
from .exchange import gathered, scattered, sent

Array = Any
Held = tuple[Array, Array]  # keys and values, or their gradients
SEQUENCE = 2


@dataclass(frozen=True)
class Moving:
    """Which dense biases, and whether the table, have a gradient that is asked for; structure, not an array."""

    dense: tuple[bool, ...]
    table: bool


jax.tree_util.register_static(Moving)


class Sums(NamedTuple):
    """Gradients that a block adds to; None where none is asked for."""

    q: Array
    k: Array
    v: Array
    dense: tuple[Array | None, ...]
    table: Array | None


def attend(work: Work, course: Course, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq local, Dv) and lse (B, Hq, Sq local) in the accumulator's dtype; differentiable in reverse.

    Args:
        smooth: this device's q, k and v; dense biases of its rows and all keys; the whole call's table; no sinks.
        facts: of the whole call, in jax arrays, but bits in place that are of this device's rows and all keys.
    """

    @jax.custom_vjp
    def both(smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
        return _forward(_Device.of(work, course, smooth, facts), smooth)

    def forward(smooth: Any, facts: Any) -> tuple[tuple[Array, Array], Any]:
        moving = Moving(tuple(x.perturbed for x in smooth.dense), smooth.table is not None and smooth.table.perturbed)
        smooth, facts = jax.tree.map(lambda x: x.value, (smooth, facts))
        out, lse = both(smooth, facts)
        return (out, lse), (moving, smooth, facts, out, lse)

    def backward(kept: Any, given: Any) -> tuple[Smooth, None]:
        moving, smooth, facts, *results = kept
        zero = jax.custom_derivatives.SymbolicZero
        given = [jnp.zeros_like(x) if isinstance(d, zero) else d for x, d in zip(results, given, strict=True)]
        return _backward(_Device.of(work, course, smooth, facts), smooth, moving, (*results, *given)), None

    both.defvjp(forward, backward, symbolic_zeros=True)
    return both(smooth, facts)


@dataclass(frozen=True, slots=True, eq=False)
class _Device:
    """One device's part of a call.

    Attributes:
        place: its number along the course's axes.
        rows: for each piece of its rows what belongs to them: q, dense biases and bits; and the whole call's rest.
    """

    work: Work
    course: Course
    place: Array
    rows: tuple[tuple[Smooth, Facts], ...]

    @classmethod
    def of(cls, work: Work, course: Course, smooth: Smooth, facts: Facts) -> _Device:
        rows = []
        for i in range(len(course.rows)):
            piece = partial(_piece, i, course.rows)
            dense = facts.mask.dense
            known = replace(facts.mask, dense=None if dense is None else piece(dense))
            at = smooth._replace(q=piece(smooth.q), dense=tuple(map(piece, smooth.dense)))
            rows.append((at, facts._replace(mask=known)))
        place = jax.lax.axis_index(course.names) if course.names else jnp.int32(0)
        return cls(work, course, place, tuple(rows))

    def runs(self, i: int, visit: Visit, j: int) -> tuple[Run, Run]:
        return self.course.rows[i].at(self.place), visit.keys[j].at(self.place)

    def block(self, i: int, visit: Visit, j: int, held: Held) -> tuple[Case, list[Array]]:
        smooth, facts = self.rows[i]
        k, v = (_piece(j, visit.keys, x) for x in held)
        return self.work.block(smooth._replace(k=k, v=v), facts, *self.runs(i, visit, j))

    def where_needed(self, i: int, visit: Visit, j: int, compute: Callable, state: Any) -> Any:
        """`compute(state)` on the devices that need the block, and `state` on the others, which do nothing."""
        needed = visit.needed[i][j]
        if not any(needed):
            return state
        if all(needed):
            return compute(state)
        return jax.lax.cond(jnp.asarray(needed)[self.place], compute, lambda state: state, state)


def _forward(device: _Device, smooth: Smooth) -> tuple[Array, Array]:
    course, held = device.course, gathered(device.course, (smooth.k, smooth.v))
    states = [_nothing(device.work, at.q) for at, _ in device.rows]
    for visit in course.visits:
        here, held = held, sent(course, held, visit.sends)
        for i in range(len(states)):
            for j in range(len(visit.keys)):
                absorb = partial(_absorb, device, i, visit, j, here)
                states[i] = device.where_needed(i, visit, j, absorb, states[i])
    outs, lses = zip(*states, strict=True)
    return jnp.concatenate(outs, SEQUENCE), jnp.concatenate(lses, SEQUENCE)


def _absorb(device: _Device, i: int, visit: Visit, j: int, held: Held, state: tuple[Array, Array]) -> Any:
    case, leaves = device.block(i, visit, j, held)
    return merge(*state, *attention(case, *case.parts(leaves), local=device.work.local))


def _nothing(work: Work, q: Array) -> tuple[Array, Array]:
    """The state of rows that have seen nothing yet."""
    zeros = jnp.zeros_like(q, shape=(*q.shape[:3], work.problem.value_dim), dtype=work.problem.accumulator)
    return zeros, zeros[..., 0] - jnp.inf


def _backward(device: _Device, smooth: Smooth, moving: Moving, rows: tuple[Array, ...]) -> Smooth:
    """The gradients, in the shapes and dtypes of `smooth`; `rows` are out, lse and their gradients."""
    course, dtype = device.course, device.work.problem.accumulator

    def zeros(x: Array) -> Array:
        return jnp.zeros_like(x, dtype=dtype)

    results = [[_piece(i, course.rows, x) for x in rows] for i in range(len(device.rows))]
    d_q = [zeros(at.q) for at, _ in device.rows]
    d_dense = [
        tuple(zeros(x) if wanted else None for x, wanted in zip(at.dense, moving.dense, strict=True))
        for at, _ in device.rows
    ]
    d_table = zeros(smooth.table) if moving.table else None
    held = gathered(course, (smooth.k, smooth.v))
    d_held, d_own = tuple(map(zeros, held)), (zeros(smooth.k), zeros(smooth.v))
    for visit in course.visits:
        here, held = held, sent(course, held, visit.sends)
        d_k, d_v = ([_piece(j, visit.keys, x) for j in range(len(visit.keys))] for x in d_held)
        for i in range(len(d_q)):
            for j in range(len(d_k)):
                add = partial(_add, device, i, visit, j, here, moving, results[i])
                sums = Sums(d_q[i], d_k[j], d_v[j], d_dense[i], d_table)
                d_q[i], d_k[j], d_v[j], d_dense[i], d_table = device.where_needed(i, visit, j, add, sums)
        d_held = jnp.concatenate(d_k, SEQUENCE), jnp.concatenate(d_v, SEQUENCE)
        if not course.gathers:
            d_own = tuple(map(jnp.add, d_own, _come_home(device, visit, d_held)))
            d_held = sent(course, d_held, visit.sends)
    d_k, d_v = scattered(course, d_held) if course.gathers else d_own
    return Smooth(
        jnp.concatenate(d_q, SEQUENCE).astype(smooth.q.dtype),
        d_k.astype(smooth.k.dtype),
        d_v.astype(smooth.v.dtype),
        tuple(_joined(x, [parts[n] for parts in d_dense]) for n, x in enumerate(smooth.dense)),
        jnp.zeros_like(smooth.table) if smooth.table is not None and d_table is None else d_table,
    )


def _add(
    device: _Device, i: int, visit: Visit, j: int, held: Held, moving: Moving, rows: list[Array], sums: Sums
) -> Sums:
    """The sums with one block's gradients."""
    case, leaves = device.block(i, visit, j, held)
    out, lse, d_out, d_lse = rows
    table = (moving.table,) if sums.table is not None or case.problem.bias.table else ()
    chosen = (True, True, True, *moving.dense, *table)
    found = iter(BACKWARD.bind(d_out, d_lse, *leaves, out, lse, case=case, chosen=chosen, local=device.work.local))
    d_q, d_k, d_v = next(found), next(found), next(found)
    row_run, key_run = device.runs(i, visit, j)
    dense = tuple(x if x is None else put(key_run, x, next(found).astype(x.dtype), 3) for x in sums.dense)
    d_table = sums.table
    if d_table is not None:
        run = table_places(row_run, key_run, device.work.problem.q_len)
        d_table = put(run, d_table, next(found), d_table.ndim - 1)
    return Sums(sums.q + d_q, sums.k + d_k, sums.v + d_v, dense, d_table)


def _come_home(device: _Device, visit: Visit, d_held: Held) -> Held:
    """Gradients that go no further at this visit, where their keys belong; zeros elsewhere."""
    arrived = sent(device.course, d_held, visit.home)
    if not any(visit.stays):
        return arrived
    stays = jnp.asarray(visit.stays)[device.place]
    return tuple(jnp.where(stays, x, y) for x, y in zip(d_held, arrived, strict=True))


def _joined(bias: Array, parts: list[Array | None]) -> Array:
    """The gradient of a bias, (B', H', local rows or 1, Sk or 1), from those of its pieces of rows."""
    given = [x for x in parts if x is not None]
    if not given:
        return jnp.zeros_like(bias)
    whole = jnp.concatenate(given, SEQUENCE) if bias.shape[SEQUENCE] > 1 else sum(given[1:], given[0])
    return whole.astype(bias.dtype)


def _piece(n: int, pieces: tuple[Piece, ...], x: Array) -> Array:
    """The n-th piece of a device's own rows or keys, axis 2; an axis of size 1 stands for all."""
    if x.shape[SEQUENCE] == 1 or len(pieces) == 1:
        return x
    begin = sum(piece.count for piece in pieces[:n])
    return jax.lax.slice_in_dim(x, begin, begin + pieces[n].count, axis=SEQUENCE)
