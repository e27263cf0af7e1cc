"""Sums over tiles as torch functions that can be differentiated to any order, in linear memory.

A `TiledSum` cuts operands to tiles, applies a local function, and adds the results up. Its pull-back is the sum over
the same tiles of the local function's pull-back, because cutting and adding are each other's transposes; its
push-forward likewise. So one Function, closed under both, gives every order and every composition of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..contract import Tiles
from ..kernels.portable.axes import Axes, Tile
from ..kernels.portable.local import Local
from ..kernels.portable.tiled_sum import tiled_sum
from ..kernels.portable.verbs import Verbs, verbs_for
from ..kernels.portable.walk import Walk
from ..problem import AttentionProblem
from .parts import Facts
from .transforms import one_by_one, pull_back, push_forward

Shaped = tuple[Axes, tuple[int, ...]]
LocalFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A sum over tiles, without its arrays.

    Attributes:
        problem, tiles, facts: of the call.
        biases: layout of each bias; the inputs begin with q, k, v and these.
        inputs: layout of each operand; outputs: layout and shape of each result.
        local: from the verbs, the function of one tile.
    """

    problem: AttentionProblem
    tiles: Tiles
    facts: Facts
    biases: tuple[Axes, ...]
    inputs: tuple[Axes, ...]
    outputs: tuple[Shaped, ...]
    local: Callable[[Verbs], LocalFunction]

    def pulled_back(self, inputs: Sequence[Tensor], active: Sequence[int]) -> Program:
        """The program of cotangents: takes the inputs and the outputs' cotangents, gives those of the active inputs."""
        given = self.inputs + tuple(axes for axes, _ in self.outputs)
        results = tuple((self.inputs[n], tuple(inputs[n].shape)) for n in active)
        return replace(self, inputs=given, outputs=results, local=partial(_derived, self, pull_back, tuple(active)))

    def pushed_forward(self, active: Sequence[int]) -> Program:
        """The program of tangents: takes the inputs and tangents of the active ones, gives those of the outputs."""
        given = self.inputs + tuple(self.inputs[n] for n in active)
        return replace(self, inputs=given, local=partial(_derived, self, push_forward, tuple(active)))

    def run(self, facts: Facts, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Walk over the tiles."""
        verbs = verbs_for(inputs[0], self.problem.accumulator)
        biases = tuple(zip(self.biases, inputs[3:], strict=False))
        walk = Walk(self.problem, facts.mask, facts.dropout, verbs, self.tiles, biases)
        given = tuple(zip(self.inputs, inputs, strict=True))
        with verbs.quiet():
            return tuple(tiled_sum(walk, self.local(verbs), given, self.outputs))

    def apply(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The differentiable sum."""
        return TiledSum.apply(self, *self.facts.tensors(), *inputs)


def program(
    name: str,
    problem: AttentionProblem,
    tiles: Tiles,
    facts: Facts,
    biases: tuple[Axes, ...],
    inputs: Sequence[Axes],
    outputs: Sequence[Shaped],
    wanted: tuple[bool, ...] = (),
) -> Program:
    """The program whose local function is the method `name` of `Local`."""
    local = partial(_method, name, problem.scale, problem.softcap, biases, wanted)
    return Program(problem, tiles, facts, biases, tuple(inputs), tuple(outputs), local)


def _method(
    name: str, scale: float, softcap: float | None, biases: tuple[Axes, ...], wanted: tuple[bool, ...], verbs: Verbs
) -> LocalFunction:
    return getattr(Local(verbs, scale, softcap, biases, wanted), name)


def _derived(parent: Program, derive: Callable[..., Any], active: tuple[int, ...], verbs: Verbs) -> LocalFunction:
    """The local function that maps a tile, the parent's inputs and (co)tangents to the derived ones."""
    local, count = parent.local(verbs), len(parent.inputs)

    def derived(tile: Tile, *args: Tensor) -> tuple[Tensor, ...]:
        return derive(partial(local, tile), args[:count], active, args[count:])

    return derived


class TiledSum(Function):
    """`Program.run`, differentiable: apply(program, *tensors of the facts, *inputs) -> outputs."""

    @staticmethod
    def forward(program: Program, *tensors: Tensor) -> tuple[Tensor, ...]:
        cut = len(tensors) - len(program.inputs)
        return program.run(program.facts.rebuild(tensors[:cut]), tensors[cut:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.program = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        facts, inputs = _split(ctx)
        offset = 1 + len(facts)
        active = [n for n in range(len(inputs)) if ctx.needs_input_grad[offset + n]]
        results: list[Tensor | None] = [None] * (offset + len(inputs))
        if active:
            derived = ctx.program.pulled_back(inputs, active)
            for n, value in zip(active, TiledSum.apply(derived, *facts, *inputs, *cotangents), strict=True):
                results[offset + n] = value
        return tuple(results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        facts, inputs = _split(ctx)
        moving = {n: t for n, t in enumerate(tangents[1 + len(facts) :]) if t is not None}
        derived = ctx.program.pushed_forward(list(moving))
        return TiledSum.apply(derived, *facts, *inputs, *moving.values())

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(TiledSum.apply, info, in_dims, args)


def _split(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    saved = ctx.saved_tensors
    cut = len(saved) - len(ctx.program.inputs)
    return saved[:cut], saved[cut:]
