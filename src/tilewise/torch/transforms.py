"""Derivatives of the function of one tile, and the rule that maps any of our functions over a batch of calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


def at(function: Function, inputs: Sequence[Tensor], active: Sequence[int]) -> Function:
    """The function of the inputs numbered in `active` alone, the others held."""

    def restricted(*chosen: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for n, value in zip(active, chosen, strict=True):
            full[n] = value
        return function(*full)

    return restricted


def pull_back(
    function: Function, inputs: Sequence[Tensor], active: Sequence[int], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Cotangents of the active inputs."""
    return torch.func.vjp(at(function, inputs, active), *(inputs[n] for n in active))[1](tuple(cotangents))


def push_forward(
    function: Function, inputs: Sequence[Tensor], active: Sequence[int], tangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Tangents of the outputs, given tangents of the active inputs.

    The pull-back is linear in the cotangents, and its own pull-back is the push-forward. This way needs reverse mode
    alone, so it works inside torch's forward mode, whose levels do not nest.
    """
    restricted, chosen = at(function, inputs, active), tuple(inputs[n] for n in active)

    def transposed(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(restricted, *chosen)[1](cotangents)

    zeros = tuple(torch.zeros_like(value) for value in restricted(*chosen))
    return torch.func.vjp(transposed, *zeros)[1](tuple(tangents))


def one_by_one(
    apply: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """The vmap rule of all our functions: each call of the batch on its own, the results stacked on a new first axis.

    Right for whatever is mapped, biases, masks and seeds among them.
    """
    calls = []
    for n in range(info.batch_size):
        taken = (arg if dim is None else arg.select(dim, n) for arg, dim in zip(args, in_dims, strict=True))
        calls.append(apply(*taken))
    outputs = tuple(torch.stack(values) for values in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)
