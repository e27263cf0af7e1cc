"""What `vmap` makes of the operators: one call with the mapped axis inside the batch, or one call per element.

The first is right where nothing tells batch rows apart but the tensors that have an axis for them; the second is right
for whatever is mapped, biases, masks and seeds among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_vmap

from . import operator
from .operator import LIBRARY
from .options import parse
from .programs import Program

Dims = Any  # as torch gives them: for each argument None, an axis, or a list of these


def _attention(info: Any, in_dims: Dims, operands: Sequence[Tensor], *rest: Any) -> tuple[Any, Any]:
    dims, fixed = in_dims[0], in_dims[1]
    facts, _, _, options = rest
    if not _foldable(dims, fixed, facts, options, operands):
        return _one_by_one(operator.attention, info, in_dims, operands, *rest)
    folded = [_fold(x, dim, info.batch_size, n < 3) for n, (x, dim) in enumerate(zip(operands, dims, strict=True))]
    out, lse = operator.attention(folded, *rest)
    batch = _batch(operands, dims)
    return (_unfold(out, info.batch_size, batch), _unfold(lse, info.batch_size, batch)), (0, 0)


def _attention_backward(info: Any, in_dims: Dims, operands: Sequence[Tensor], *args: Any) -> tuple[Any, Any]:
    dims, rows, fixed = in_dims[0], in_dims[1:5], in_dims[5]
    facts, _, _, options, wanted = args[4:]
    if max(wanted, default=0) > 2 or not _foldable(dims, fixed, facts, options, operands):
        return _one_by_one(operator.attention_backward, info, in_dims, operands, *args)
    folded = [_fold(x, dim, info.batch_size, n < 3) for n, (x, dim) in enumerate(zip(operands, dims, strict=True))]
    rest = [_fold(x, dim, info.batch_size, True) for x, dim in zip(args[:4], rows, strict=True)]
    found = operator.attention_backward(folded, *rest, *args[4:])
    return [_unfold(x, info.batch_size, _batch(operands, dims)) for x in found], [0] * len(found)


def _attention_tangent(
    info: Any,
    in_dims: Dims,
    operands: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    tangents: Sequence[Tensor],
    *args: Any,
) -> tuple[Any, Any]:
    dims, along, fixed = in_dims[0], in_dims[3], in_dims[4]
    facts, _, _, options, moving = args
    if max(moving) > 2 or not _foldable(dims, fixed, facts, options, operands):
        return _one_by_one(operator.attention_tangent, info, in_dims, operands, out, lse, tangents, *args)
    folded = [_fold(x, dim, info.batch_size, n < 3) for n, (x, dim) in enumerate(zip(operands, dims, strict=True))]
    rows = [_fold(x, dim, info.batch_size, True) for x, dim in zip((out, lse), in_dims[1:3], strict=True)]
    given = [_fold(x, dim, info.batch_size, True) for x, dim in zip(tangents, along, strict=True)]
    d_out, d_lse = operator.attention_tangent(folded, *rows, given, *args)
    batch = _batch(operands, dims)
    return (_unfold(d_out, info.batch_size, batch), _unfold(d_lse, info.batch_size, batch)), (0, 0)


def _tiled_sum(info: Any, in_dims: Dims, inputs: Sequence[Tensor], *args: Any) -> tuple[Any, Any]:
    dims, fixed = in_dims[0], in_dims[1]
    facts, _, _, options, text = args
    program = Program.parse(text)
    # A bias stands for every batch row, so its cotangents would run together.
    if program.bands or facts or (fixed and any(dim is not None for dim in fixed)) or not parse(options).foldable:
        return _one_by_one(operator.tiled_sum, info, in_dims, inputs, *args)
    folded = [_fold(x, dim, info.batch_size, True) for x, dim in zip(inputs, dims, strict=True)]
    found = operator.tiled_sum(folded, *args)
    return [_unfold(x, info.batch_size, _batch(inputs, dims)) for x in found], [0] * len(found)


def _foldable(dims: Dims, fixed: Dims, facts: Sequence[Tensor], options: str, operands: Sequence[Tensor]) -> bool:
    """Whether nothing but q, k and v is mapped, and nothing else differs between batch rows."""
    told = parse(options)
    if not told.foldable or facts or any(dim is not None for dim in (*dims[3:], *(fixed or ()))):
        return False
    return all(name == "sinks" or x.shape[0] == 1 for name, x in zip(told.names[3:], operands[3:], strict=True))


def _fold(x: Tensor, dim: int | None, size: int, has_batch: bool) -> Tensor:
    """(N, B, …) as (N B, …); what is not mapped is repeated, unless it stands for all rows anyway."""
    if not has_batch:
        return x
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _unfold(x: Tensor, size: int, batch: int) -> Tensor:
    """(N B, …) as (N, B, …)."""
    return x.reshape(size, batch, *x.shape[1:])


def _batch(operands: Sequence[Tensor], dims: Dims) -> int:
    """B of queries that may have a mapped axis as well."""
    return operands[0].shape[1 if dims[0] == 0 else 0]


def _one_by_one(apply: Any, info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """Each call of the batch on its own, the results stacked on a new first axis."""

    def take(value: Any, dims: Any, n: int) -> Any:
        if isinstance(value, list | tuple):
            return [take(part, dim, n) for part, dim in zip(value, dims or [None] * len(value), strict=True)]
        if dims is None:
            return value
        return value.select(dims, n) if n < value.shape[dims] else value.new_zeros(_without(value.shape, dims))

    # Where there is no element, a call on zeros tells the shapes.
    calls = [
        apply(*(take(arg, dim, n) for arg, dim in zip(args, in_dims, strict=True)))
        for n in range(max(info.batch_size, 1))
    ]
    stacked = [torch.stack(values)[: info.batch_size] for values in zip(*calls, strict=True)]
    if isinstance(calls[0], tuple):
        return tuple(stacked), (0,) * len(stacked)
    return stacked, [0] * len(stacked)


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [*shape[:dim], *shape[dim + 1 :]]


for _name, _rule in (
    ("attention", _attention),
    ("attention_backward", _attention_backward),
    ("attention_tangent", _attention_tangent),
    ("tiled_sum", _tiled_sum),
):
    register_vmap(f"tilewise::{_name}", _rule, lib=LIBRARY)
