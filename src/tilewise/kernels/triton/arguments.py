"""A plan and its operands as the arguments of the kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from ...contract import Dropout as DropoutRule
from ...contract import Operands, Plan
from ...problem import ITEM_BYTES, AttentionProblem
from .device.records import Call, Dropout, Mask, rows, shape_of, view

NO_MASK = Mask(None, None, None, None, None, tl.constexpr(0))

# Bytes of keys and values that programs which run side by side may share in the second-level cache.
_CACHE_BYTES = 32 << 20


def call_of(plan: Plan, operands: Operands) -> Call:
    """All that decides a score, with no mask yet: each slab brings its own."""
    problem = plan.problem
    table = operands.table
    return Call(
        shape=shape_of(operands.q, operands.k, operands.v),
        mask=NO_MASK,
        dense=tuple(view(array) for array in operands.dense),
        table=rows(table) if table is not None else None,
        dropout=dropout_of(operands.dropout, (problem.q_heads, problem.q_len, problem.k_len), operands.q.device),
        pages=None,
        scale=float(problem.scale),
        rising=tl.constexpr(problem.scale > 0),
        softcap=problem.softcap,
    )


def can_leak(plan: Plan) -> bool:
    """Whether a tile that is read can hold pairs that are not seen, other than padding."""
    mask, bias = plan.problem.mask, plan.problem.bias
    return bool(mask.ranges or mask.labels or mask.bits or bias.dense or bias.table)


def unsound_of(plan: Plan, grid: tuple[int], device: torch.device) -> torch.Tensor | None:
    """A zero for each program, to be set where its result is not finite; None where nothing can leak."""
    return torch.zeros(grid, dtype=torch.int8, device=device) if can_leak(plan) else None


def heads_together(problem: AttentionProblem, heads: int, masked: bool) -> int:
    """How many of the B * heads heads run side by side.

    Without a mask all programs are equally long and neighbours share a head; with one, as many heads run side by side
    as the cache holds, so that the longest rows of all of them come first.
    """
    bytes_of_head = problem.k_len * (problem.head_dim + problem.value_dim) * ITEM_BYTES[problem.dtype]
    return max(1, min(problem.batch * heads, _CACHE_BYTES // bytes_of_head)) if masked else 1


def dropout_of(
    rule: DropoutRule | None, sizes: tuple[int, int, int], device: torch.device, streams: int = 0
) -> Dropout | None:
    """A rule as an argument, in a call of Hq heads, Sq queries and Sk keys; `streams` is added to its stream."""
    if rule is None:
        return None
    stream = (rule.stream + streams) % 2**64
    (low, high), strides = rule.numbering(*sizes)
    first = _word(low) | (_word(high) << 32)
    numbers = (*rule.seed, stream & 0xFFFFFFFF, stream >> 32, first, *strides)
    # A tensor among them stays on the device, where each run of a captured graph finds what it holds then.
    words = torch.stack([_on_device(_word(word), device) for word in numbers])
    return Dropout(words, rule.threshold, rule.inverse_keep)


def _word(word: Any) -> Any:
    # 64 bits as a signed integer, which is what an int64 tensor takes.
    return word.to(torch.int64) if isinstance(word, torch.Tensor) else (int(word) + 2**63) % 2**64 - 2**63


def _on_device(word: Any, device: torch.device) -> torch.Tensor:
    # Filled there: a copy from the host would have no place in a captured graph.
    return word.to(device).reshape(()) if isinstance(word, torch.Tensor) else torch.full((), word, device=device)
