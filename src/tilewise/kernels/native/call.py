"""What both passes hand to the core, and the cut of a call into query rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..._arrays import Array
from ...contract import Operands, Plan
from ...masks.lower import TILE, LoweredMask
from ...problem import AttentionProblem
from .buffers import DTYPE_CODES, empty, packed, rows
from .card import BITS_BYTES, sizes_of, threads_of
from .facts import Alive, call_facts, tile_bits

LARGEST = 1 << 20  # bytes of ranges that a remembered call may hold; where there are more, time goes elsewhere anyway


def call_of(problem: AttentionProblem, operands: Operands, out: Array, lse: Array, alive: Alive) -> dict[str, Any]:
    """Every keyword that forward, backward and tangent of `_native` share, but `rows` and `bits`.

    Args:
        out: (B, Hq, Sq, Dv) with a contiguous last axis, lse: (B, Hq, Sq) contiguous; written by forward, else read.
        alive: receives what must live until the last call.
    """
    logarithms = packed(lse, 3)
    alive.append(logarithms)
    return {
        **_settings(problem),
        "threads": threads_of(problem),
        "q": tensor(operands.q, alive),
        "k": tensor(operands.k, alive),
        "v": tensor(operands.v, alive),
        "out": tensor(out, alive),
        "lse": logarithms.address,
        **call_facts(operands, problem.accumulator, alive),
    }


def lasting(plan: Plan, operands: Operands) -> tuple[dict[str, Any], Alive] | None:
    """What `_native.forward` is given in each call of the same shapes, strides and options, and what that points into.

    A dense mask, which is read in place, is not among it. None where there is more that may change.
    """
    mask, problem = operands.mask, plan.problem
    if plan.kernel != "native" or mask.lazy is not None or problem.dropout or problem.sinks:
        return None
    if operands.dense or operands.table is not None:
        return None
    if mask.ranges is not None and mask.ranges.starts.nbytes > LARGEST:
        return None
    alive: Alive = []
    facts = call_facts(replace(operands, mask=replace(mask, dense=None)), problem.accumulator, alive)
    if mask.dense is not None:
        del facts["mask"]
    return {**_settings(problem), **facts, "rows": (0, problem.q_len), "bits": None}, alive


def _settings(problem: AttentionProblem) -> dict[str, Any]:
    return {
        "dtype": DTYPE_CODES[problem.dtype],
        "sizes": sizes_of(problem),
        "scale": problem.scale,
        "softcap": problem.softcap or 0.0,
        "part": problem.part,
        "row_invariant": problem.invariance == "row",
    }


def tensor(array: Array, alive: Alive) -> tuple[int, ...]:
    """Address and three strides of (B, H, S, D)."""
    found = rows(array)
    alive.append(found)
    return (found.address, *found.strides[:3])


def empty_like_layout(problem: AttentionProblem, like: Array, heads: int, length: int, width: int, dtype: str) -> Array:
    """Uninitialised (B, heads, length, width) in the memory order of the problem's layout."""
    if problem.layout == "bshd":
        return empty(like, (problem.batch, length, heads, width), dtype).swapaxes(1, 2)
    return empty(like, (problem.batch, heads, length, width), dtype)


def slabs(mask: LoweredMask, problem: AttentionProblem) -> Iterator[tuple[tuple[int, int], tuple[int, ...] | None]]:
    """Query rows and their tile bits. A predicate's bits are made for a slab of rows at a time, in bounded memory."""
    if mask.lazy is None:
        yield (0, problem.q_len), None
        return
    tile_row = max(1, problem.batch * problem.q_heads * problem.k_len * TILE // 8)
    step = TILE * max(1, BITS_BYTES // tile_row)
    for first in range(0, problem.q_len, step):
        last = min(first + step, problem.q_len)
        held: Alive = []  # lives until the caller has used the slab and asks for the next
        yield (first, last), tile_bits(mask.tile_bits(first, last), held)
