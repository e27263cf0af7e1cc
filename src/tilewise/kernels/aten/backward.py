"""The backward pass by one of torch's operators, from the results of whatever kernel ran forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Gradients, Operands, Plan
from .. import backward_of
from ..state import FAR
from .calls import BACKWARD, Inputs, Saved
from .finite import all_finite, can_leak, capturing


def backward(
    plan: Plan, operands: Operands, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> Gradients:
    """Gradients to q, k, v and, by the memory-efficient operator, to a bias.

    Args:
        plan: with the operator in `backward_way`, and in `careful` the kernel for results that cannot be kept and for
            rows that biases carry far from 0.
        out (B, Hq, Sq, D), lse (B, Hq, Sq): what the forward pass gave; d_out: the gradient to out.
        d_lse: zeros or None; a problem in which it is not is one with `return_lse`, which the card refuses.
    """
    problem = plan.problem
    looked_at = plan.backward_way == "cpu" or can_leak(problem)
    if looked_at and capturing(operands.q):
        return _again(plan, operands, out, lse, d_out, d_lse)
    if problem.bias.dense and bool((lse.abs() > FAR).any()):
        return _again(plan, operands, out, lse, d_out, d_lse)  # the operators take what lse has lost for 1
    inputs = Inputs.of(problem, operands.q, operands.k, operands.v, operands.dense)
    with torch.no_grad():
        saved = Saved(out.contiguous(), lse.contiguous(), d_out.contiguous())
        d_q, d_k, d_v, d_bias = BACKWARD[plan.backward_way](inputs, saved, "bias" in problem.gradients)
    # A forward pass that was computed again has results that are not finite, from which these would be made.
    if looked_at and not all_finite(lse, d_q, d_k, d_v, d_bias):
        return _again(plan, operands, out, lse, d_out, d_lse)
    wanted = problem.gradients
    return Gradients(
        q=d_q if "q" in wanted else None,
        k=d_k if "k" in wanted else None,
        v=d_v if "v" in wanted else None,
        dense=(d_bias if "bias" in wanted else None,) * len(operands.dense),
    )


def _again(plan: Plan, operands: Operands, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    assert plan.careful is not None
    return backward_of(plan.careful).backward(plan, operands, out, lse, d_out, d_lse)
