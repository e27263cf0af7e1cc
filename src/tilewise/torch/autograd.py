"""Derivatives of the operators: the plan's kernels for first gradients and tangents, sums over tiles beyond.

Each operator's Autograd kernel is an `autograd.Function` of a single level. torch runs it once per level of
differentiation: for plain autograd, for each `torch.func` transform, and while a compiler traces either. So all of
these, and their compositions, meet the same few rules below, and every rule calls operators again.

The names of torch that begin with an underscore are those with which torch makes Functions of one level itself
(`torch/_functorch/autograd_function.py`); there are no public ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from . import operator
from .formulas import Rest, gradient_formula, tangent_formula
from .operator import LIBRARY
from .programs import Program
from .spelling import predicates_of
from .transforms import pull_back
from .watch import nobody_else, recording

Results = tuple[Tensor | None, ...]


class Attention(Function):
    """(rest, keyset, number of operands, *operands, *facts) -> (out, lse). Without a keyset there is no level below."""

    @staticmethod
    def forward(rest: Rest, keyset: Any, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        if keyset is None:
            return operator.compute(tensors[:count], *rest)
        return _below(operator.attention, keyset, list(tensors[:count]), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.rest, keyset, ctx.count, *tensors = inputs
        ctx.held = predicates_of(ctx.rest.options)
        # Whether a gradient of lse came decides which kernels can run backward: zeros would hide that it did not.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)
        if keyset is not None:
            ctx.save_for_forward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Results:
        out, lse, operands, rest = _saved(ctx)
        if d_lse is not None:
            rest = rest._replace(options=rest.options + ";lse=1")
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
        wanted = [n for n in range(ctx.count) if ctx.needs_input_grad[3 + n]]
        tensors = (*operands, d_out, d_lse)
        backward = (
            operator.compute_backward
            if nobody_else(tensors) and not recording(tensors)
            else operator.attention_backward
        )
        found = backward(operands, out, lse, d_out, d_lse, *rest, wanted)
        return (None, None, None, *_spread(found, wanted, len(ctx.needs_input_grad) - 3))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, operands, rest = _saved(ctx)
        with _set_fwd_grad_enabled(True):
            out, lse, *operands = _primals((out, lse, *operands))
            along = tangents[3 : 3 + ctx.count]
            if (
                not out.is_cpu
            ):  # no kernel there has tangents, and what the formula keeps saves a second derivative work
                return tangent_formula(rest, operands, out, lse, along)
            moving = {n: tangent for n, tangent in enumerate(along) if tangent is not None}
            return operator.attention_tangent(operands, out, lse, list(moving.values()), *rest, list(moving))


class AttentionBackward(Function):
    """(rest, wanted, keyset, number of operands, out, lse, d_out, d_lse, *operands, *facts) -> wanted gradients."""

    @staticmethod
    def forward(rest: Rest, wanted: Sequence[int], keyset: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, operands = tensors[:4], list(tensors[4 : 4 + count])
        return tuple(_below(operator.attention_backward, keyset, operands, *rows, *rest, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rest, ctx.wanted, _, ctx.count, *tensors = inputs
        ctx.held = predicates_of(ctx.rest.options)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Results:
        (*tensors,) = ctx.saved_tensors
        count, differentiable = ctx.count, 4 + ctx.count
        rest = ctx.rest._replace(facts=tuple(tensors[differentiable:]))
        active = [n for n in range(differentiable) if ctx.needs_input_grad[4 + n]]

        def formula(*given: Tensor) -> tuple[Tensor, ...]:
            return gradient_formula(rest, ctx.wanted, given[4 : 4 + count], *given[:4])

        found = pull_back(formula, tensors[:differentiable], active, cotangents)
        return (None, None, None, None, *_spread(found, active, len(tensors)))


class AttentionTangent(Function):
    """(rest, moving, keyset, number of operands, out, lse, *operands, *tangents, *facts) -> tangents of (out, lse)."""

    @staticmethod
    def forward(rest: Rest, moving: Sequence[int], keyset: Any, count: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, operands, along = AttentionTangent._named(moving, count, tensors)
        return _below(operator.attention_tangent, keyset, operands, out, lse, along, *rest, moving)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.rest, ctx.moving, _, ctx.count, *tensors = inputs
        ctx.held = predicates_of(ctx.rest.options)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Results:
        (*tensors,) = ctx.saved_tensors
        differentiable = 2 + ctx.count + len(ctx.moving)
        rest = ctx.rest._replace(facts=tuple(tensors[differentiable:]))
        active = [n for n in range(differentiable) if ctx.needs_input_grad[4 + n]]

        def formula(*given: Tensor) -> tuple[Tensor, Tensor]:
            out, lse, operands, along = AttentionTangent._named(ctx.moving, ctx.count, given)
            return tangent_formula(rest, operands, out, lse, _spread(along, ctx.moving, ctx.count))

        found = pull_back(formula, tensors[:differentiable], active, cotangents)
        return (None, None, None, None, *_spread(found, active, len(tensors)))

    @staticmethod
    def _named(
        moving: Sequence[int], count: int, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        out, lse, *rest = tensors
        return out, lse, rest[:count], rest[count : count + len(moving)]


class TiledSum(Function):
    """(rest, program, keyset, number of inputs, *inputs, *facts) -> outputs."""

    @staticmethod
    def forward(rest: Rest, program: Program, keyset: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_below(operator.tiled_sum, keyset, list(tensors[:count]), *rest, str(program)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rest, ctx.program, _, ctx.count, *tensors = inputs
        ctx.held = predicates_of(ctx.rest.options)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Results:
        inputs, rest = TiledSum._saved(ctx)
        active = [n for n in range(ctx.count) if ctx.needs_input_grad[4 + n]]
        found = operator.tiled_sum([*inputs, *cotangents], *rest, str(ctx.program.pulled_back(active)))
        return (None, None, None, None, *_spread(found, active, len(ctx.needs_input_grad) - 4))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        inputs, rest = TiledSum._saved(ctx)
        moving = {n: t for n, t in enumerate(tangents[4 : 4 + ctx.count]) if t is not None}
        program = ctx.program.pushed_forward(tuple(moving))
        with _set_fwd_grad_enabled(True):
            return tuple(operator.tiled_sum([*_primals(inputs), *moving.values()], *rest, str(program)))

    @staticmethod
    def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], Rest]:
        tensors = ctx.saved_tensors
        return tensors[: ctx.count], ctx.rest._replace(facts=tuple(tensors[ctx.count :]))


def _primals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without their tangents of this level.

    torch switches forward mode off around `jvp`, which keeps this level out of its formulas but would drop the tangents
    of the levels below as well. So forward mode is on there, and this level's tangents are taken off.
    """
    return [torch._VF._unpack_dual(tensor, level=0)[0] for tensor in tensors]


def _saved(ctx: Any) -> tuple[Tensor, Tensor, list[Tensor], Rest]:
    out, lse, *tensors = ctx.saved_tensors
    return out, lse, tensors[: ctx.count], ctx.rest._replace(facts=tuple(tensors[ctx.count :]))


def _spread(values: Sequence[Tensor], places: Sequence[int], length: int) -> Results:
    """A tuple of `length` with the values at their places, None elsewhere."""
    results: list[Tensor | None] = [None] * length
    for n, value in zip(places, values, strict=True):
        results[n] = value
    return tuple(results)


def recorded(operands: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator where plain autograd records it and nothing else watches."""
    return _apply(Attention, Rest(*rest), None, len(operands), *operands, *rest[0])


def _attention(keyset: Any, operands: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    if not _differentiated(operands):
        return _below(operator.attention, keyset, operands, *rest)
    rest = Rest(*rest)
    return _apply(Attention, rest, keyset, len(operands), *operands, *rest.facts)


def _attention_backward(keyset: Any, operands: Sequence[Tensor], *args: Any) -> list[Tensor]:
    rows, rest, wanted = args[:4], Rest(*args[4:-1]), args[-1]
    tensors = (*rows, *operands)
    if _has_tangent(tensors):
        return list(gradient_formula(rest, wanted, operands, *rows))
    if not _differentiated(tensors):
        return _below(operator.attention_backward, keyset, operands, *args)
    return list(_apply(AttentionBackward, rest, wanted, keyset, len(operands), *tensors, *rest.facts))


def _attention_tangent(
    keyset: Any, operands: Sequence[Tensor], out: Tensor, lse: Tensor, along: Sequence[Tensor], *args: Any
) -> tuple[Tensor, Tensor]:
    rest, moving = Rest(*args[:-1]), args[-1]
    tensors = (out, lse, *operands, *along)
    if _has_tangent(tensors):
        return tangent_formula(rest, operands, out, lse, _spread(along, moving, len(operands)))
    if not _differentiated(tensors):
        return _below(operator.attention_tangent, keyset, operands, out, lse, along, *args)
    return _apply(AttentionTangent, rest, moving, keyset, len(operands), *tensors, *rest.facts)


def _tiled_sum(keyset: Any, inputs: Sequence[Tensor], *args: Any) -> list[Tensor]:
    if not _differentiated(inputs):
        return _below(operator.tiled_sum, keyset, inputs, *args)
    rest, program = Rest(*args[:-1]), Program.parse(args[-1])
    return list(_apply(TiledSum, rest, program, keyset, len(inputs), *inputs, *rest.facts))


def _differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether this level of differentiation looks at any of the tensors."""
    return recording(tensors) or _has_tangent(tensors)


def _has_tangent(tensors: Sequence[Tensor]) -> bool:
    # Asked of each tensor: compiled programs open levels of forward mode that Python is not told of.
    for tensor in tensors:  # noqa: SIM110 - half the time of any()
        if torch._VF._unpack_dual(tensor, level=0)[1] is not None:
            return True
    return False


def _apply(function: type[Function], *args: Any) -> Any:
    if not torch._C._are_functorch_transforms_active():
        return super(Function, function).apply(*args)
    with enable_single_level_autograd_function():
        return super(Function, function).apply(*args)


def _below(operator: Any, keyset: Any, *args: Any) -> Any:
    """The operator below this level."""
    below = torch._C._after_autograd_keyset
    if not torch._C._are_functorch_transforms_active():
        # Views that a kernel makes are its own affair: tangents of what counts as a view must have its strides.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keyset & below, *args)
    # A Function's forward switches recording off, which is meant for its own level and not for those below.
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & below, *args)


_KERNELS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("attention", _attention),
    ("attention_backward", _attention_backward),
    ("attention_tangent", _attention_tangent),
    ("tiled_sum", _tiled_sum),
)
for _name, _kernel in _KERNELS:
    LIBRARY.impl(_name, _kernel, "Autograd", with_keyset=True)
