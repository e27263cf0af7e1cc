"""`products.py` for torch, with derivatives of every order that see no more than the products themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .products import visible_pairs, visible_sum


class VisiblePairs(Function):
    """x (…, M, D), y (…, N, D), visible (…, M, N) -> x y^T where visible, else 0."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, visible: Tensor) -> Tensor:
        return visible_pairs(torch, x, y, visible)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, y, visible), (gradient,) = ctx.saved_tensors, gradients
        down = visible.mT
        return VisibleSum.apply(gradient, y, visible), VisibleSum.apply(gradient.mT, x, down), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, y, visible = ctx.saved_tensors
        dx, dy, _ = tangents
        return _sum(
            VisiblePairs.apply(dx, y, visible) if dx is not None else None,
            VisiblePairs.apply(x, dy, visible) if dy is not None else None,
        )


class VisibleSum(Function):
    """a (…, M, N), y (…, N, D), visible (…, M, N) -> the sum over visible n of a[m, n] y[n]."""

    @staticmethod
    def forward(a: Tensor, y: Tensor, visible: Tensor) -> Tensor:
        return visible_sum(torch, a, y, visible)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, y, visible), (gradient,) = ctx.saved_tensors, gradients
        return VisiblePairs.apply(gradient, y, visible), VisibleSum.apply(a.mT, gradient, visible.mT), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        a, y, visible = ctx.saved_tensors
        da, dy, _ = tangents
        return _sum(
            VisibleSum.apply(da, y, visible) if da is not None else None,
            VisibleSum.apply(a, dy, visible) if dy is not None else None,
        )


def _sum(*terms: Tensor | None) -> Tensor:
    first, *rest = (term for term in terms if term is not None)
    return sum(rest, first)
