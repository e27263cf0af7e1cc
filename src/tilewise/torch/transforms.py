"""Derivatives of the function of one tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
