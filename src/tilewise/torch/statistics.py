"""Attention statistics as a torch function: first derivatives by a second walk over the same tiles.

Each tile's contribution is made again and differentiated by torch itself, so there is one statement of every statistic.
A second derivative, forward mode and functorch transforms are refused by torch with an error: none of them is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import statistics
from ..kernels.portable.axes import Axes, Tile
from ..statistics import AttentionStatistics
from ..statistics.leaders import Leaders
from ..statistics.measure import blocks, layouts, measure, parts_of
from ..statistics.question import Question

__all__ = ["AttentionStatistics", "attention_statistics", "attention_weights"]

# Under torch.compile a call stands between two graphs: tracing would unroll the loop over tiles into the caller's.
attention_statistics = torch.compiler.disable(statistics.attention_statistics)
attention_weights = torch.compiler.disable(statistics.attention_weights)


def run(question: Question, arrays: Sequence[Tensor]) -> tuple[list[Tensor], Leaders | None]:
    """`measure`, differentiable once: by q, k, biases and lse."""
    *sums, scores, keys = Measured.apply(question, *arrays)
    return sums, Leaders(scores, keys) if question.top else None


class Measured(Function):
    """apply(question, q, k, *biases, lse) -> (*sums, largest scores, their keys)."""

    @staticmethod
    def forward(ctx: Any, question: Question, *arrays: Tensor) -> tuple[Tensor, ...]:
        sums, leaders = measure(question, arrays)
        nothing = arrays[0].new_empty((*arrays[0].shape[:4], 0))
        scores, keys = (leaders.scores, leaders.keys) if leaders else (nothing, nothing.long())
        ctx.question = question
        ctx.save_for_backward(*arrays, keys)
        ctx.mark_non_differentiable(keys)
        return (*sums, scores, keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        question, (*arrays, keys) = ctx.question, ctx.saved_tensors
        active = [n for n in range(len(arrays)) if ctx.needs_input_grad[1 + n]]
        with torch.no_grad():
            found = _gradients(question, arrays, active, keys, gradients)
        if torch.is_grad_enabled():
            found = FirstOnly.apply(len(found), *found, *arrays, *gradients)
        results: list[Tensor | None] = [None] * (1 + len(arrays))
        for n, value in zip(active, found, strict=True):
            results[1 + n] = value
        return tuple(results)


class FirstOnly(Function):
    """apply(count, *tensors) -> the first `count` tensors, whose derivative by any of the tensors is an error.

    torch's own `once_differentiable` lets the derivative by what was saved pass as zero.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("attention statistics can be differentiated once; this asks for their second derivative")


def _gradients(
    question: Question, arrays: Sequence[Tensor], active: Sequence[int], keys: Tensor, gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the active arrays, in their dtypes."""
    axes, shapes = layouts(question), [tuple(array.shape) for array in arrays]
    totals = [question.call.verbs.zeros(shapes[n]) for n in active]
    with question.call.verbs.quiet():
        for block in blocks(question):
            for tile in question.call.walk.tiles_of(block):
                tile, parts = parts_of(question, tile, arrays)
                pulled = _pull(question, tile, parts, active, keys, gradients)
                for n, total, value in zip(active, totals, pulled, strict=True):
                    total[tile.part(axes[n], shapes[n])] += value
    return [total.to(arrays[n].dtype) for n, total in zip(active, totals, strict=True)]


def _pull(
    question: Question,
    tile: Tile,
    parts: Sequence[Tensor],
    active: Sequence[int],
    keys: Tensor,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients of the active parts, from those of the outputs and of the largest scores."""
    local = question.call.local()
    leaders = keys[tile.part(Axes.ROWS, tuple(keys.shape))]

    def contribution(*chosen: Tensor) -> tuple[Tensor, ...]:
        held = dict(enumerate(parts)) | dict(zip(active, chosen, strict=True))
        q, k, *biases, lse = held.values()
        scores, _ = local.scores(tile, q, k, tuple(biases))
        return (*question.sums(tile, scores, lse), question.chosen(tile, scores, leaders))

    *sums, scores, _ = gradients
    given = [value[output.part(tile)] for output, value in zip(question.outputs, sums, strict=True)]
    given.append(scores[tile.part(Axes.ROWS, tuple(scores.shape))])
    return torch.func.vjp(contribution, *(parts[n] for n in active))[1](tuple(given))
