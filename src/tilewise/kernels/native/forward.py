"""The forward pass in compiled code, for NumPy arrays and torch CPU tensors.

Method: tiled attention with an online softmax (Milakov and Gimelshein, 2018; Rabe and Staats, 2021; Dao et al., 2022),
queries across the vector lanes; see `native/README.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..._arrays import Array
from ...contract import Operands, Plan
from ...masks.lower import TILE, LoweredMask
from ...problem import AttentionProblem
from .buffers import DTYPE_CODES, Memory, empty, memory, rows
from .facts import Alive, call_facts, tile_bits

# Bytes of tile bits made at once: a predicate is evaluated for so many query rows, which are computed before the next.
_BITS_BYTES = 1 << 24


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """Attention of one call.

    Args:
        plan: of a problem with float32 or float64 arrays on the CPU.
        operands: NumPy arrays or torch CPU tensors, in views (B, H, S, D) of whatever memory layout. Only arrays whose
            last axis is not contiguous are copied.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype, in memory (B, Sq, Hq, Dv) for layout "bshd"; lse (B, Hq, Sq) in the
        accumulator's dtype.

    Raises:
        ValueError, RuntimeError, MemoryError: from the core, beginning with the argument's name.
    """
    from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # absent in a pure Python install

    p = problem = plan.problem
    alive: Alive = []
    out, lse = _results(problem, operands.q)
    q, k, v, o = (rows(array) for array in (operands.q, operands.k, operands.v, out))
    sizes = (p.batch, p.q_heads, p.kv_heads, p.q_len, p.k_len, p.head_dim, p.value_dim)
    facts = call_facts(operands, problem.accumulator, alive)
    for (first, last), bits in _slabs(operands.mask, problem):
        _native.forward(
            dtype=DTYPE_CODES[problem.dtype],
            threads=sys.modules["torch"].get_num_threads() if problem.family == "torch" else 0,
            sizes=sizes,
            rows=(first, last),
            q=_tensor(q),
            k=_tensor(k),
            v=_tensor(v),
            out=_tensor(o),
            lse=memory(lse).address,
            scale=problem.scale,
            softcap=problem.softcap or 0.0,
            bits=bits,
            **facts,
        )
    return out, lse


def _results(problem: AttentionProblem, q: Array) -> tuple[Array, Array]:
    batch, heads, length = problem.batch, problem.q_heads, problem.q_len
    lse = empty(q, (batch, heads, length), problem.accumulator)
    if problem.layout == "bshd":
        return empty(q, (batch, length, heads, problem.value_dim), problem.dtype).swapaxes(1, 2), lse
    return empty(q, (batch, heads, length, problem.value_dim), problem.dtype), lse


def _tensor(found: Memory) -> tuple[int, ...]:
    return (found.address, *found.strides[:3])


def _slabs(mask: LoweredMask, problem: AttentionProblem) -> Iterator[tuple[tuple[int, int], tuple[int, ...] | None]]:
    """Query rows and their tile bits. A predicate's bits are made for a slab of rows at a time, in bounded memory."""
    if mask.lazy is None:
        yield (0, problem.q_len), None
        return
    tile_row = max(1, problem.batch * problem.q_heads * problem.k_len * TILE // 8)
    step = TILE * max(1, _BITS_BYTES // tile_row)
    for first in range(0, problem.q_len, step):
        last = min(first + step, problem.q_len)
        held: Alive = []  # lives until the caller has used the slab and asks for the next
        yield (first, last), tile_bits(mask.tile_bits(first, last), held)
