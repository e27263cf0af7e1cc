"""The door of torch tensors: straight into the kernel when nobody differentiates, else through `autograd.py`."""

from __future__ import annotations

import torch

from ..contract import Operands, Plan
from ..kernels import forward_of
from .autograd import attend
from .parts import Parts


# Tracing would unroll the loop over tiles into the caller's graph; the call stands between two graphs instead.
@torch.compiler.disable
def run(plan: Plan, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of the plan's kernel, with derivatives where they can be asked for."""
    if _may_be_differentiated(operands):
        return attend(plan, operands)
    return forward_of(plan.kernel).forward(plan, operands)


def _may_be_differentiated(operands: Operands) -> bool:
    """Whether a gradient is recorded, a forward-mode level is open, or a functorch transform is at work."""
    # The same private questions that torch asks in `Function.apply`; there are no public ones.
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    parts, tensors = Parts.of(operands)
    return any(tensor.requires_grad for tensor in tensors[: parts.count])
