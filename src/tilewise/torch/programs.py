"""Sums over tiles that are closed under differentiation, in linear memory.

A program cuts operands to tiles, applies a local function, and adds the results up. Its pull-back is the sum over the
same tiles of the local function's pull-back, because cutting and adding are each other's transposes; its push-forward
likewise. So one operator that runs programs gives every order of differentiation and every composition of the two.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..contract import Dropout
from ..kernels.portable.axes import Axes, Tile
from ..kernels.portable.call import Call
from ..kernels.portable.local import Local
from ..kernels.portable.row_terms import far_rows
from ..kernels.portable.tiled_sum import tiled_sum
from ..kernels.portable.tiles import default_tiles
from ..kernels.portable.verbs import Verbs, verbs_for
from ..kernels.portable.walk import Walk
from ..masks.lower import LoweredMask
from ..problem import AttentionProblem
from .options import Options
from .transforms import pull_back, push_forward

Shape = tuple[int, ...]
LocalFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Program:
    """A function of tiles of q, k, v, the biases and a few rows, and how often it was differentiated.

    Attributes:
        name: the method of `Local` it begins with, "sums" or "gradients"; or "levels", which is no such sum, has no
            derivative and looks again at rows that are far (`far_rows`): of the operands, lse, which rows these are
            (1 or 0), the rows' sinks and d_out it makes the level, the reciprocal of the sum and the weighed gradient
            of each row.
        wanted: which gradients of q, k, v and the biases "gradients" makes.
        bands: for each bias, whether it is a table over j - i; else it is dense.
        steps: ("pull" or "push", numbers of the inputs with respect to which), in order.
    """

    name: str
    wanted: tuple[bool, ...]
    bands: tuple[bool, ...]
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Program:
        """The program that `str` wrote."""
        return Program(*ast.literal_eval(text))

    def __str__(self) -> str:
        return repr((self.name, self.wanted, self.bands, self.steps))

    def pulled_back(self, active: Sequence[int]) -> Program:
        """The program of cotangents: takes the inputs and the outputs' cotangents, gives those of the active inputs."""
        return replace(self, steps=(*self.steps, ("pull", tuple(active))))

    def pushed_forward(self, active: Sequence[int]) -> Program:
        """The program of tangents: takes the inputs and tangents of the active ones, gives those of the outputs."""
        return replace(self, steps=(*self.steps, ("push", tuple(active))))

    @property
    def biases(self) -> tuple[Axes, ...]:
        """Layouts of the biases."""
        return tuple(Axes.BAND if band else Axes.PAIRS for band in self.bands)

    def layouts(self) -> tuple[tuple[Axes, ...], tuple[Axes, ...]]:
        """Layouts of the inputs and of the outputs."""
        primals = (Axes.ROWS, Axes.KEYS, Axes.KEYS, *self.biases)
        inputs: tuple[Axes, ...]
        outputs: tuple[Axes, ...]
        if self.name == "sums":
            inputs, outputs = (*primals, Axes.ROWS), (Axes.ROWS, Axes.ROWS)
        elif self.name == "levels":
            inputs, outputs = (*primals, *(Axes.ROWS,) * 4), (Axes.ROWS,) * 3
        else:
            inputs = (*primals, Axes.ROWS, Axes.ROWS, Axes.ROWS)
            outputs = tuple(axes for axes, want in zip(primals, self.wanted, strict=True) if want)
        for kind, active in self.steps:
            chosen = tuple(inputs[n] for n in active)
            inputs, outputs = (inputs + outputs, chosen) if kind == "pull" else (inputs + chosen, outputs)
        return inputs, outputs

    def shapes(self, inputs: Sequence[Shape]) -> list[Shape]:
        """Shapes of the outputs, given those of the inputs: every output is shaped as some input is, or as `out`."""
        q, _, v = inputs[:3]
        if self.name == "sums":
            outputs = [(*q[:-1], v[-1]), tuple(q[:-1])]
        elif self.name == "levels":
            outputs = [tuple(q[:-1])] * 3
        else:
            outputs = [shape for shape, want in zip(inputs, self.wanted, strict=False) if want]
        for kind, active in self.steps:
            outputs = [inputs[n] for n in active] if kind == "pull" else outputs
        return outputs

    def problem(self, told: Options, inputs: Sequence[Tensor], scale: float | None) -> AttentionProblem:
        """The problem of grouped inputs: q (B, Hkv, G, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv)."""
        q, k, v = inputs[:3]
        batch, kv_heads, group, q_len, head_dim = q.shape
        return AttentionProblem(
            family="torch",
            device=q.device.type,
            dtype=str(q.dtype).removeprefix("torch."),
            batch=batch,
            q_heads=kv_heads * group,
            kv_heads=kv_heads,
            q_len=q_len,
            k_len=k.shape[2],
            head_dim=head_dim,
            value_dim=v.shape[3],
            scale=head_dim**-0.5 if scale is None else scale,
            softcap=told.softcap,
            dropout=told.p,
        )

    def run(
        self, problem: AttentionProblem, mask: LoweredMask, dropout: Dropout | None, inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Walk over the tiles."""
        verbs = verbs_for(inputs[0], problem.accumulator)
        layouts, outputs = self.layouts()
        shapes = self.shapes([tuple(x.shape) for x in inputs])
        with verbs.quiet(), _differentiable():
            # Only the tiles are differentiated here; whoever differentiates the whole does so outside.
            arrays = [x.detach() for x in inputs]
            biases = tuple(zip(self.biases, arrays[3:], strict=False))
            walk = Walk(problem, mask, dropout, verbs, default_tiles(problem), biases)
            if self.name == "levels":
                return _levels(Call(problem, verbs, arrays[0], arrays[1], arrays[2], biases, walk), *arrays[-4:])
            given = tuple(zip(layouts, arrays, strict=True))
            return tiled_sum(walk, self._local(verbs, problem), given, tuple(zip(outputs, shapes, strict=True)))

    def _local(self, verbs: Verbs, problem: AttentionProblem) -> LocalFunction:
        """The function of one tile after all steps."""
        local = getattr(Local(verbs, problem.scale, problem.softcap, self.biases, self.wanted), self.name)
        count = len(replace(self, steps=()).layouts()[0])
        for n, (kind, active) in enumerate(self.steps):
            local = partial(_derived, local, pull_back if kind == "pull" else push_forward, active, count)
            count = len(replace(self, steps=self.steps[: n + 1]).layouts()[0])
        return local


def _levels(call: Call, level: Tensor, far: Tensor, sinks: Tensor, d_out: Tensor) -> list[Tensor]:
    found = far_rows(call, level, far > 0, sinks, d_out)
    if found is None:
        return [level.clone(), torch.ones_like(level), torch.zeros_like(level)]
    return [found.level, 1 / found.total, torch.where(found.far, found.weighed / found.total, 0.0)]


def _differentiable() -> AbstractContextManager[Any]:
    """Lets derivatives of the tiles be taken inside an operator, where torch's dispatcher has left autograd behind."""
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _autocast_keys())


@lru_cache(maxsize=1)
def _autocast_keys() -> Any:
    """The dispatch keys of autocast, which are on wherever they are not excluded, whether or not a region was entered.

    Products of the tiles would be rounded to bfloat16 or float16 by them.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in dir(torch._C.DispatchKey):
        if name.startswith("Autocast"):
            keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


def _derived(
    local: LocalFunction,
    derive: Callable[..., tuple[Tensor, ...]],
    active: tuple[int, ...],
    count: int,
    tile: Tile,
    *args: Tensor,
) -> tuple[Tensor, ...]:
    """A tile, the inputs of `local` (`count` of them) and their (co)tangents, to the derived (co)tangents."""
    return derive(partial(local, tile), args[:count], active, args[count:])
