"""The operators in torch's dispatcher: their schemas, what they compute, and the shapes they promise.

    attention           operands -> (out, lse)
    attention_backward  operands, out, lse and gradients of both -> the wanted gradients
    attention_tangent   operands, out, lse and tangents of the operands -> tangents of out and lse
    tiled_sum           a sum over tiles (see `programs.py`): every further derivative is one

All four end in `facts, integers, scale, options`: the tensors and integers of the mask and of dropout's seed, and the
line of text that says what is what (`options.py`). They are opaque to tracing, so a compiled graph holds one node for
any length; what they compute is looked up only when real tensors arrive. Derivatives are in `autograd.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from .._remembered import Remembered
from ..contract import Plan
from ..kernels import backward_of, forward_of, tangent_of
from ..kernels.native.call import LARGEST
from ..masks.lower import LoweredMask
from ..plan.choose import choose
from ..problem import ACCUMULATOR
from . import quick
from .options import Options, parse
from .programs import Program
from .spelling import has_predicate

_REST = "Tensor[] facts, SymInt[] integers, float? scale, str options"

LIBRARY = Library("tilewise", "DEF")
LIBRARY.define(f"attention(Tensor[] operands, {_REST}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"attention_backward(Tensor[] operands, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse, {_REST}, "
    "int[] wanted) -> Tensor[]"
)
LIBRARY.define(
    f"attention_tangent(Tensor[] operands, Tensor out, Tensor lse, Tensor[] tangents, {_REST}, int[] moving) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(f"tiled_sum(Tensor[] inputs, {_REST}, str program) -> Tensor[]")

attention = torch.ops.tilewise.attention.default
attention_backward = torch.ops.tilewise.attention_backward.default
attention_tangent = torch.ops.tilewise.attention_tangent.default
tiled_sum = torch.ops.tilewise.tiled_sum.default

Tensors = Sequence[Tensor]


def compute(
    operands: Tensors, facts: Tensors, integers: Sequence[int], scale: float | None, options: str
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq); operands as `Options.names` says, in views (B, H, S, D)."""
    key = quick.key_of(operands, facts, integers, scale, options)
    prepared = quick.find(key)
    if prepared is not None:
        return prepared(operands, facts)
    told = parse(options)
    mask = told.lowered(told.site(operands), operands[0], facts, integers)
    call = told.operands(operands, mask, told.dropout(facts, integers))
    plan = choose(told.problem(call, scale), told.kernel, told.allow_quadratic)
    out, lse = forward_of(plan.kernel).forward(plan, call)
    quick.remember(key, plan, call, out, lse)
    return out, lse


def compute_backward(
    operands: Tensors, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor,
    facts: Tensors, integers: Sequence[int], scale: float | None, options: str, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of the operands numbered in `wanted`, in their shapes and dtypes."""
    told = parse(options)
    mask, plan = _planned(told, operands, facts, integers, scale, options, tuple(wanted))
    call = told.operands(operands, mask, told.dropout(facts, integers))
    assert plan.backward is not None
    found = backward_of(plan.backward).backward(plan, call, out, lse, d_out, d_lse)
    flat = [found.q, found.k, found.v, *found.dense]
    flat += [value for value, given in ((found.table, call.table), (found.sinks, call.sinks)) if given is not None]
    return [ordered(flat[n], told, n) for n in wanted]


def compute_tangent(
    operands: Tensors, out: Tensor, lse: Tensor, tangents: Tensors,
    facts: Tensors, integers: Sequence[int], scale: float | None, options: str, moving: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tangents of (out, lse), in their shapes and dtypes, along tangents of the operands numbered in `moving`."""
    told = parse(options)
    mask, plan = _planned(told, operands, facts, integers, scale, options, ())
    along: list[Tensor | None] = [None] * len(operands)
    for n, tangent in zip(moving, tangents, strict=True):
        along[n] = tangent
    if plan.tangent == "portable":
        from .formulas import Rest, tangent_formula  # it calls operators of this module

        rest = Rest(tuple(facts), tuple(integers), scale, options)
        d_out, d_lse = tangent_formula(rest, operands, out, lse, along)
    else:
        call = told.operands(operands, mask, told.dropout(facts, integers))
        d_out, d_lse = tangent_of(plan.tangent).tangent(plan, call, out, lse, told.tangents(along))
    return ordered(d_out, told, 0), d_lse


# Of calls without arrays in their masks, as in `quick.py`.
_plans: Remembered[Hashable, tuple[LoweredMask, Plan]] = Remembered()


def _planned(
    told: Options, operands: Tensors, facts: Tensors, integers: Sequence[int], scale: float | None, options: str,
    wanted: tuple[int, ...],
) -> tuple[LoweredMask, Plan]:  # fmt: skip
    """The lowered mask, and the plan of the gradients numbered in `wanted`, or without any."""
    q, k, v = operands[:3]
    key = (options, scale, wanted, *integers, q.dtype, q.device, q.shape, k.shape, v.shape)
    symbolic = len(operands) == 3 and not facts and not told.p and not has_predicate(told.mask)
    known = _plans.get(key) if symbolic else None
    if known is not None:
        return known
    mask = told.lowered(told.site(operands), q, facts, integers)
    call = told.operands(operands, mask, told.dropout(facts, integers))
    problem = told.problem(call, scale, frozenset(told.names[n] for n in wanted))
    plan = choose(problem, told.kernel, told.allow_quadratic)
    if symbolic and (mask.ranges is None or mask.ranges.starts.nbytes <= LARGEST):
        _plans.keep(key, (mask, plan))
    return mask, plan


def _tiled_sum(
    inputs: Tensors, facts: Tensors, integers: Sequence[int], scale: float | None, options: str, program: str
) -> list[Tensor]:
    """The sums of a program; inputs in the accumulator's dtype with heads grouped."""
    told, done = parse(options), Program.parse(program)
    problem = done.problem(told, inputs, scale)
    sizes = (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
    mask = told.lowered(sizes, inputs[0], facts, integers)
    return done.run(replace(problem, mask=mask.facts), mask, told.dropout(facts, integers), inputs)


def ordered(gradient: Tensor, told: Options, n: int) -> Tensor:
    """The gradient in the memory order that `empty_in_order` promises."""
    if told.layout == "bshd" and n < 3:
        return gradient.transpose(1, 2).contiguous().transpose(1, 2)
    return gradient.contiguous()


for _name, _function in (
    ("attention", compute),
    ("attention_backward", compute_backward),
    ("attention_tangent", compute_tangent),
    ("tiled_sum", _tiled_sum),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@register_fake("tilewise::attention", lib=LIBRARY)
def _attention_shapes(operands: Tensors, *rest: Any) -> tuple[Tensor, Tensor]:
    told = parse(rest[-1])
    q, v = operands[0], operands[2]
    accumulator = getattr(torch, ACCUMULATOR[str(q.dtype).removeprefix("torch.")])
    out = empty_in_order(q, told, (*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulator)


@register_fake("tilewise::attention_backward", lib=LIBRARY)
def _attention_backward_shapes(operands: Tensors, *rest: Any) -> list[Tensor]:
    *_, options, wanted = rest
    told = parse(options)
    return [
        empty_in_order(operands[n], told, operands[n].shape) if n < 3 else operands[n].new_empty(operands[n].shape)
        for n in wanted
    ]


@register_fake("tilewise::attention_tangent", lib=LIBRARY)
def _attention_tangent_shapes(operands: Tensors, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    told = parse(rest[-2])
    return empty_in_order(out, told, out.shape), lse.new_empty(lse.shape)


@register_fake("tilewise::tiled_sum", lib=LIBRARY)
def _tiled_sum_shapes(inputs: Tensors, *rest: Any) -> list[Tensor]:
    shapes = Program.parse(rest[-1]).shapes([tuple(x.shape) for x in inputs])
    return [inputs[0].new_empty(shape) for shape in shapes]


def empty_in_order(like: Tensor, told: Options, shape: Sequence[int]) -> Tensor:
    """Memory for (B, H, S, D) in the order of the layout."""
    if told.layout == "bshd":
        batch, heads, length, width = shape
        return like.new_empty((batch, length, heads, width)).transpose(1, 2)
    return like.new_empty(shape)
