"""The oracle's backward pass as a kernel: in and out in the caller's framework and dtype."""

from __future__ import annotations

from ..._arrays import Array
from ...contract import Gradients, Operands, Plan
from . import dense
from .arrays import like


def backward(plan: Plan, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array | None) -> Gradients:
    """All gradients, computed in float64 from the operands (out and lse are made again) and rounded once."""
    exact = dense.gradients(dense.attention(plan.problem, operands), d_out, d_lse)
    return Gradients(
        q=like(exact.q, operands.q),
        k=like(exact.k, operands.k),
        v=like(exact.v, operands.v),
        dense=tuple(like(gradient, bias) for gradient, bias in zip(exact.dense, operands.dense, strict=True)),
        table=like(exact.table, operands.table) if operands.table is not None else None,
        sinks=like(exact.sinks, operands.sinks) if operands.sinks is not None else None,
    )
