"""What torch's older `vmap` makes of the operators: one call per element.

`torch.autograd.grad(is_grads_batched=True)`, `torch.autograd.functional.jacobian(vectorize=True)` and `gradcheck` with
batched gradients use it still (`torch/_vmap_internals.py`). It knows no rules of `register_vmap`, and its own fallback
takes no lists of tensors. Its tensors are unwrapped and wrapped with the functions that it uses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import operator
from .operator import LIBRARY


def _rule(apply: Callable[..., Any]) -> Callable[..., Any]:
    def each(*args: Any) -> Any:
        level = _innermost()
        peeled = [_map(lambda x: torch._remove_batch_dim(x, level, 1, 0), arg) for arg in args]
        sizes = [x.shape[0] for arg in peeled for x in _tensors(arg)]
        calls = [apply(*(_map(partial(_element, n), arg) for arg in peeled)) for n in range(max(sizes))]
        wrapped = [torch._add_batch_dim(torch.stack(values), 0, level) for values in zip(*calls, strict=True)]
        return tuple(wrapped) if isinstance(calls[0], tuple) else wrapped

    return each


def _element(n: int, x: Tensor) -> Tensor:
    """Element n along the first axis; what is not mapped has got an axis of 1."""
    return x[n if x.shape[0] > 1 else 0]


def _innermost() -> int:
    """The level of the innermost older `vmap`."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _map(function: Callable[[Tensor], Any], arg: Any) -> Any:
    """The function of a tensor or of each in a list of them; all else as it is."""
    if isinstance(arg, Tensor):
        return function(arg)
    tensors = _tensors(arg)
    return [function(x) for x in tensors] if tensors else arg


def _tensors(arg: Any) -> list[Tensor]:
    """The tensor, or those of a list of tensors; none for all else."""
    if isinstance(arg, Tensor):
        return [arg]
    return list(arg) if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor) else []


for _name in ("attention", "attention_backward", "attention_tangent", "tiled_sum"):
    LIBRARY.impl(_name, _rule(getattr(operator, _name)), "Batched")
