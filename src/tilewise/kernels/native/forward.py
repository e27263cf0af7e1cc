"""The forward pass in compiled code, for NumPy arrays and torch CPU tensors.

Method: tiled attention with an online softmax (Milakov and Gimelshein, 2018; Rabe and Staats, 2021; Dao et al., 2022),
queries across the vector lanes; see `native/README.md`.
"""

from __future__ import annotations

from ..._arrays import Array
from ...contract import Operands, Plan
from .buffers import empty
from .call import call_of, empty_like_layout, slabs
from .facts import Alive


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """Attention of one call.

    Args:
        plan: of a problem on the CPU.
        operands: NumPy arrays or torch CPU tensors, in views (B, H, S, D) of whatever memory layout. Only arrays whose
            last axis is not contiguous are copied.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype, in memory (B, Sq, Hq, Dv) for layout "bshd"; lse (B, Hq, Sq) in the
        accumulator's dtype.

    Raises:
        ValueError, RuntimeError, MemoryError: from the core, beginning with the argument's name.
    """
    from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # absent in a pure Python install

    problem = plan.problem
    out = empty_like_layout(problem, operands.q, problem.q_heads, problem.q_len, problem.value_dim, problem.result)
    lse = empty(operands.q, (problem.batch, problem.q_heads, problem.q_len), problem.accumulator)
    alive: Alive = []
    call = call_of(problem, operands, out, lse, alive)
    for part, bits in slabs(operands.mask, problem):
        _native.forward(rows=part, bits=bits, **call)
    return out, lse
