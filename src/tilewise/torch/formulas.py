"""Derivatives of attention as sums over tiles: what `attention_backward` computes, and the tangents of attention.

Log-sum-exp and output enter as differentiable inputs, so that the chain rule closes over them. Written in operations
that torch can differentiate, `tiled_sum` among them; so every further derivative follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arrays import dtype_name
from ..contract import Operands
from ..kernels.portable.axes import Axes, ungrouped
from ..kernels.portable.backward import gradient_sums
from ..kernels.portable.call import Call, make_call
from ..kernels.portable.row_terms import lse_is_empty, row_terms
from ..kernels.portable.tiles import default_tiles
from ..kernels.state import FAR, far_from, is_far, may_be_far
from ..masks.lower import LoweredMask
from ..masks.site import Site
from ..problem import ACCUMULATOR
from .options import Options, parse
from .programs import Program


class Rest(NamedTuple):
    """The last arguments of every operator: tensors and integers of the mask and the seed, the scale, the options."""

    facts: tuple[Tensor, ...]
    integers: tuple[int, ...]
    scale: float | None
    options: str

    @property
    def told(self) -> Options:
        """The options, read."""
        return parse(self.options)


def gradient_formula(
    rest: Rest,
    wanted: Sequence[int],
    operands: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the operands numbered in `wanted`."""
    names = rest.told.names
    call, given = _call(rest, operands)

    def total(call: Call, flags: tuple[bool, ...], inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Tensor]:
        return _sum(Program("gradients", flags, _bands(call)), rest, [array for _, array in inputs])

    chosen = frozenset(names[n] for n in wanted)
    terms = row_terms(call, out, lse, d_out, d_lse)
    levels = _levels(call, given, rest, lse, terms.d_out, far_from(rest.told.p, dtype_name(out)))
    if levels is not None:
        # The derivative stays that of the formula, from which what was found again differs in rounding alone.
        more = torch.where(levels.far, call.rows(d_lse) - levels.pull - terms.pull, 0.0).detach()
        d_out = terms.d_out.to(call.verbs.dtype) * levels.share[..., None]
        terms = terms._replace(level=levels.level, d_out=d_out, pull=(terms.pull + more) * levels.share)
    sums = gradient_sums(call, given, chosen, terms, total)
    found, taken = [], dict.fromkeys(chosen, 0)
    for n, name in enumerate(names):
        if name in sums:
            if n in wanted:
                found.append(sums[name][taken[name]].reshape(operands[n].shape).to(operands[n].dtype))
            taken[name] += 1
    return tuple(found)


def tangent_formula(
    rest: Rest, operands: Sequence[Tensor], out: Tensor, lse: Tensor, tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse); see `kernels/portable/local.py` for the formulas."""
    call, given = _call(rest, operands)
    dtype = call.verbs.dtype
    empty = lse_is_empty(call, lse)
    held = torch.where(empty, 0.0, call.rows(lse))
    levels = _levels(call, given, rest, lse, call.rows(out))
    if levels is not None:
        held = levels.level
    count = len(call.primals)
    moving = {
        n: tangent.to(dtype) if call.primals[n][0] is Axes.KEYS else call.rows(tangent.to(dtype))
        for n, tangent in enumerate(tangents[:count])
        if tangent is not None
    }
    values, weights = torch.zeros_like(call.rows(out), dtype=dtype), torch.zeros_like(held)
    if moving:
        program = Program("sums", (), _bands(call)).pushed_forward(tuple(moving))
        arrays = [array for _, array in call.primals]
        values, weights = _sum(program, rest, [*arrays, held, *moving.values()])
    moved = tangents[len(operands) - 1]
    if given.sinks is not None and moved is not None:
        sinks, moved = (x.to(dtype).reshape(*call.q.shape[1:3], 1) for x in (given.sinks, moved))
        weights = weights + torch.where(empty, 0.0, torch.exp(sinks - held)) * moved
    if levels is not None:
        values, weights = values * levels.share[..., None], weights * levels.share
    d_out = values - call.rows(out).to(dtype) * weights[..., None]
    return ungrouped(d_out).to(out.dtype), ungrouped(weights)


class _Levels(NamedTuple):
    """Of each row, grouped: its probabilities are share * exp(score - level).

    Attributes:
        level: lse, 0 of rows that see nothing, and of far rows the largest score. share: 1, of far rows what makes
            their probabilities' sum 1. far: booleans, which these are (see `row_terms.py`).
        pull: of far rows the sum of the probabilities times their gradients.
    """

    level: Tensor
    share: Tensor
    far: Tensor
    pull: Tensor


def _levels(
    call: Call, operands: Operands, rest: Rest, lse: Tensor, d_out: Tensor, least: float = FAR
) -> _Levels | None:
    """The levels of all rows, None where no row can be far; `least`: how far from 0 the lse of such a row is.

    Their derivatives are those of level lse and share 1, which they are but for rounding. Whether there are such rows
    is asked inside the operator: a choice by data is none that a compiler could take.
    """
    if least == FAR and not may_be_far(call.problem):
        return None
    level = torch.where(lse_is_empty(call, lse), 0.0, call.rows(lse))
    held = level.detach()
    sinks = torch.full_like(held, float("-inf"))
    if operands.sinks is not None:
        sinks = operands.sinks.detach().to(held.dtype).reshape(*call.q.shape[1:3], 1).expand(held.shape)
    inputs = [array.detach() for _, array in call.primals]
    far = is_far(call.rows(lse).detach(), least)
    program = Program("levels", (), _bands(call))
    found, share, pull = _sum(program, rest, [*inputs, held, far, sinks, d_out.detach()])
    return _Levels(level + torch.where(far, found - held, 0.0), share, far, pull)


def _sum(program: Program, rest: Rest, inputs: Sequence[Tensor]) -> list[Tensor]:
    dtype = inputs[0].dtype
    return torch.ops.tilewise.tiled_sum([x.to(dtype) for x in inputs], *rest, str(program))


def _bands(call: Call) -> tuple[bool, ...]:
    return tuple(axes is Axes.BAND for axes, _ in call.biases)


def _call(rest: Rest, operands: Sequence[Tensor]) -> tuple[Call, Operands]:
    """The grouped views of the operands in the accumulator's dtype. The mask is left to `tiled_sum`."""
    told = rest.told
    dtype = getattr(torch, ACCUMULATOR[str(operands[0].dtype).removeprefix("torch.")])
    wide = [tensor.to(dtype) for tensor in operands]
    given = told.operands(wide, LoweredMask(Site(*told.site(operands), family="torch")))
    problem = told.problem(given, rest.scale)
    return make_call(problem, given, default_tiles(problem)), given
