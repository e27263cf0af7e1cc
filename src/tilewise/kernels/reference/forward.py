"""The oracle's forward pass as a kernel: in and out in the caller's framework and dtype."""

from __future__ import annotations

from ..._arrays import Array
from ...contract import Operands, Plan
from .arrays import like
from .dense import attention


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype, lse (B, Hq, Sq) in the accumulator's; computed in float64 and rounded once."""
    dense = attention(plan.problem, operands)
    dtype = plan.problem.accumulator if plan.problem.part else None
    return like(dense.out, operands.q, dtype), like(dense.lse, operands.q, plan.problem.accumulator)
