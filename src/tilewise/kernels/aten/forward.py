"""The forward pass by one of torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Operands, Plan
from .. import forward_of
from .calls import FORWARD, Inputs
from .finite import all_finite, can_leak, capturing


def forward(plan: Plan, operands: Operands) -> tuple[Tensor, Tensor]:
    """Attention of one call.

    Args:
        plan: with the operator in `way`, and in `careful` the kernel for results that cannot be kept (`finite.py`).
        operands: torch tensors q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, D) on one device.

    Returns:
        out (B, Hq, Sq, D) in q's dtype, lse (B, Hq, Sq) in the accumulator's.
    """
    problem = plan.problem
    looked_at = plan.way == "cpu" or can_leak(problem)
    if looked_at and capturing(operands.q):
        return _again(plan, operands)
    with torch.no_grad():
        out, lse = FORWARD[plan.way](Inputs.of(problem, operands.q, operands.k, operands.v, operands.dense))
    if looked_at and not _kept(plan.way, out, lse):
        return _again(plan, operands)
    if plan.way == "flash":
        lse = lse.masked_fill(lse == torch.inf, torch.nan)  # every row sees a key, so its sum was NaN
    return laid_out(problem.layout, out), lse.contiguous()


def _kept(way: str, out: Tensor, lse: Tensor) -> bool:
    # A row that sees nothing cannot be told from one whose exponentials happen to sum to 1.
    return all_finite(out, lse) and not (way == "cpu" and bool((lse == 0).any()))


def _again(plan: Plan, operands: Operands) -> tuple[Tensor, Tensor]:
    assert plan.careful is not None
    return forward_of(plan.careful).forward(plan, operands)


def laid_out(layout: str, x: Tensor) -> Tensor:
    """(B, H, S, D) in the memory order of the layout; a copy only where it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bshd" else x.contiguous()
