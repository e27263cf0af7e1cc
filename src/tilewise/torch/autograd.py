"""Attention as a torch function: any kernel forward, the plan's kernel backward, the portable formulas beyond.

First-order gradients come from the plan's backward kernel. Every further derivative, and forward mode, is a sum over
tiles (`tiled_sum.py`), which needs linear memory at every order. Log-sum-exp and output enter the backward pass as
differentiable inputs, so that the chain rule closes over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..contract import Operands, Plan
from ..kernels import backward_of, forward_of
from ..kernels.portable.axes import Axes, ungrouped
from ..kernels.portable.backward import gradient_sums, lse_is_empty
from ..kernels.portable.call import Call, make_call, tiles_of
from .parts import Parts
from .tiled_sum import program
from .transforms import one_by_one, pull_back, push_forward


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """What is not a tensor: the plan, how the tensors lie in the list, and for the backward pass which are wanted."""

    plan: Plan
    parts: Parts
    wanted: tuple[int, ...] = ()

    @property
    def names(self) -> frozenset:
        """What the wanted operands are called."""
        return frozenset(self.parts.names[n] for n in self.wanted)


def attend(plan: Plan, operands: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) of the plan's kernel, differentiable to any order in both modes."""
    parts, tensors = Parts.of(operands)
    return Attention.apply(Spec(plan, parts), *tensors)


class Attention(Function):
    """apply(spec, *tensors of the operands) -> (out, lse)."""

    @staticmethod
    def forward(spec: Spec, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return forward_of(spec.plan.kernel).forward(spec.plan, spec.parts.operands(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.spec.parts
        wanted = tuple(n for n in range(parts.count) if ctx.needs_input_grad[1 + n])
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        found = AttentionBackward.apply(replace(ctx.spec, wanted=wanted), *ctx.saved_tensors, *gradients)
        for n, value in zip(wanted, found, strict=True):
            results[1 + n] = value
        return tuple(results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        return tangent_formula(ctx.spec, ctx.saved_tensors, tangents[1 : 1 + ctx.spec.parts.count])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(Attention.apply, info, in_dims, args)


class AttentionBackward(Function):
    """apply(spec, *tensors of the operands, out, lse, d_out, d_lse) -> the wanted gradients, in order."""

    @staticmethod
    def forward(spec: Spec, *tensors: Tensor) -> tuple[Tensor, ...]:
        plan, operands, rest = spec.plan, spec.parts.operands(tensors), tensors[-4:]
        # Under functorch it shows only now what is wanted; a kernel planned for less may not be able to do it.
        kernel = plan.backward if plan.backward and spec.names <= plan.problem.gradients else "portable"
        plan = replace(plan, problem=replace(plan.problem, gradients=spec.names))
        found = backward_of(kernel).backward(plan, operands, *rest)
        flat = [found.q, found.k, found.v, *found.dense]
        flat += [
            value
            for value, given in ((found.table, operands.table), (found.sinks, operands.sinks))
            if given is not None
        ]
        return tuple(flat[n] for n in spec.wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        active = [n for n in range(len(inputs)) if ctx.needs_input_grad[1 + n]]
        results: list[Tensor | None] = [None] * (1 + len(inputs))
        found = pull_back(lambda *tensors: gradient_formula(ctx.spec, tensors), inputs, active, cotangents)
        for n, value in zip(active, found, strict=True):
            results[1 + n] = value
        return tuple(results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        moving = {n: tangent for n, tangent in enumerate(tangents[1:]) if tangent is not None}
        formula = lambda *tensors: gradient_formula(ctx.spec, tensors)  # noqa: E731 - the same function as in `backward`
        return push_forward(formula, ctx.saved_tensors, list(moving), list(moving.values()))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(AttentionBackward.apply, info, in_dims, args)


def gradient_formula(spec: Spec, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `AttentionBackward` computes, out of differentiable operations."""
    operands, (out, lse, d_out, d_lse) = spec.parts.operands(tensors), tensors[-4:]
    call = make_call(spec.plan.problem, _accumulated(spec, operands), tiles_of(spec.plan))

    def total(call: Call, wanted: tuple[bool, ...], inputs: Sequence, outputs: Sequence) -> tuple[Tensor, ...]:
        axes, arrays = zip(*inputs, strict=True)
        cast = [array.to(call.verbs.dtype) for array in arrays]
        biases = tuple(axes for axes, _ in call.biases)
        tiles = call.walk.tiles
        return program(
            "gradients", spec.plan.problem, tiles, spec.parts.facts_of(tensors), biases, axes, outputs, wanted
        ).apply(cast)

    sums = gradient_sums(call, operands, spec.names, out, lse, d_out, d_lse, total)
    found, taken = [], dict.fromkeys(spec.names, 0)
    for n, name in enumerate(spec.parts.names):
        if name in sums:
            if n in spec.wanted:
                found.append(sums[name][taken[name]].reshape(tensors[n].shape).to(tensors[n].dtype))
            taken[name] += 1
    return tuple(found)


def tangent_formula(spec: Spec, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse); see `kernels/portable/local.py` for the formulas."""
    operands, (out, lse) = spec.parts.operands(tensors), tensors[-2:]
    call = make_call(spec.plan.problem, _accumulated(spec, operands), tiles_of(spec.plan))
    _verbs, dtype = call.verbs, call.verbs.dtype
    empty = lse_is_empty(call, lse)
    held = torch.where(empty, 0.0, call.rows(lse))
    inputs = (*call.primals, (Axes.ROWS, held))
    moving = {
        n: call.rows(tangent.to(dtype)) if call.primals[n][0] is not Axes.KEYS else tangent.to(dtype)
        for n, tangent in enumerate(tangents[: len(call.primals)])
        if tangent is not None
    }
    values, weights = torch.zeros_like(call.rows(out), dtype=dtype), torch.zeros_like(held)
    if moving:
        axes, arrays = zip(*inputs, strict=True)
        outputs = [(Axes.ROWS, tuple(call.rows(out).shape)), (Axes.ROWS, tuple(held.shape))]
        biases = tuple(axes for axes, _ in call.biases)
        base = program("sums", spec.plan.problem, call.walk.tiles, spec.parts.facts_of(tensors), biases, axes, outputs)
        values, weights = base.pushed_forward(list(moving)).apply([*arrays, *moving.values()])
    if operands.sinks is not None and tangents[spec.parts.count - 1] is not None:
        sinks, moved = (
            x.to(dtype).reshape(*call.q.shape[1:3], 1) for x in (operands.sinks, tangents[spec.parts.count - 1])
        )
        weights = weights + torch.where(empty, 0.0, torch.exp(sinks - held)) * moved
    d_out = values - call.rows(out).to(dtype) * weights[..., None]
    return ungrouped(d_out).to(out.dtype), ungrouped(weights)


def _accumulated(spec: Spec, operands: Operands) -> Operands:
    """The operands in the accumulator's dtype, as the sums over tiles and their derivatives have them."""
    dtype = getattr(torch, spec.plan.problem.accumulator)
    q, k, v, *dense = (array.to(dtype) for array in (operands.q, operands.k, operands.v, *operands.dense))
    table = operands.table.to(dtype) if operands.table is not None else None
    return replace(operands, q=q, k=k, v=v, dense=tuple(dense), table=table)
