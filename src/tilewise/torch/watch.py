"""Who looks at a call of an operator: autograd alone, nobody at all, or the dispatcher's other customers too.

Where nobody does, the dispatcher would lead straight to the implementation; for small calls the way there through
Python is most of the time. The private questions are those that torch itself asks in `Function.apply` and
`torch.overrides`; there are no public ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

_OLDER_VMAP = torch._C._dispatch_key_parse("VmapMode")


def nobody_else(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but plain autograd may look: no subclass, transform, forward mode, mode, trace or profile."""
    for tensor in tensors:
        if (type(tensor) is not Tensor and type(tensor) is not Parameter) or not tensor.is_cpu:
            return False
        if tensor.is_neg() or tensor._is_zerotensor():  # the dispatcher makes their numbers
            return False
    return not _watched()


def nobody_else_anywhere(tensors: Sequence[Tensor]) -> bool:
    """As `nobody_else`, of tensors on any device."""
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors) and not _watched()


def _watched() -> bool:
    return bool(
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_OLDER_VMAP)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


def recording(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records what is done with the tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False
