"""Tangents of out and lse in compiled code, for NumPy arrays and torch CPU tensors.

Method: with p = exp(s - lse), d_lse = sum p ds and d_out = sum p (ds v + d_v) - d_lse out, summed tile by tile in one
pass over the visible keys; see `native/kernel/tangent.inl.h`.
"""

from __future__ import annotations

from ..._arrays import Array
from ...contract import Operands, Plan, Tangents
from .buffers import cast, empty, memory
from .call import call_of, empty_like_layout, slabs, tensor
from .facts import Alive, dense_biases, sinks_place, table_place

_STILL = (0, 0, 0, 0)


def tangent(plan: Plan, operands: Operands, out: Array, lse: Array, moving: Tangents) -> tuple[Array, Array]:
    """How out and lse move with the operands.

    Args:
        plan: of a problem on the CPU.
        operands: those of the forward pass.
        out (B, Hq, Sq, Dv), lse (B, Hq, Sq): its results.
        moving: tangents of the operands.

    Returns:
        d_out in the shape, dtype and memory order of out; d_lse (B, Hq, Sq) in the accumulator's dtype. Rows that see
        nothing have zeros.

    Raises:
        ValueError, RuntimeError, MemoryError: from the core, beginning with the argument's name.
    """
    from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # absent in a pure Python install

    p = plan.problem
    alive: Alive = []
    d_out = empty_like_layout(p, operands.q, p.q_heads, p.q_len, p.value_dim, p.result)
    d_lse = empty(operands.q, (p.batch, p.q_heads, p.q_len), p.accumulator)

    def place(moved: Array | None) -> tuple[int, ...]:
        return _STILL if moved is None else tensor(cast(moved, p.dtype), alive)

    call = {
        **call_of(p, operands, cast(out, p.result), lse, alive),
        "d_q": place(moving.q),
        "d_k": place(moving.k),
        "d_v": place(moving.v),
        "d_biases": dense_biases([moved for moved in moving.dense if moved is not None], alive),
        "d_table": table_place(moving.table, p.accumulator, alive),
        "d_sinks": sinks_place(moving.sinks, p.accumulator, alive),
        "d_out": tensor(d_out, alive),
        "d_lse": memory(d_lse).address,
    }
    for part, bits in slabs(operands.mask, p):
        _native.tangent(rows=part, bits=bits, **call)
    return d_out, d_lse
