"""Predicates that look at traced arrays: what they look at becomes an operand.

A function may close over arrays that an outer `jit`, `grad` or `vmap` is tracing. Inside our own jitted call and in
the rule of its derivative, such tracers would belong to another trace. So they are taken out, here at the door.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from ..contract import Tiles
from ..kernels.portable.jax_tiles import Grid, Tile
from ..masks.algebra import And, Mask, Not, Or
from ..masks.lower import LoweredMask
from ..masks.primitives import Predicate
from ..problem import AttentionProblem

Array = Any


@dataclass(frozen=True, eq=False)
class Captured(Mask):
    """A predicate as a program over the positions of one tile and the arrays that it looked at."""

    program: Any
    looked_at: tuple[Array, ...]
    arrays: ClassVar[tuple[str, ...]] = ("looked_at",)

    def __post_init__(self) -> None:
        """The arrays are a tuple already, of any shapes."""

    def visible(self, site: Any, b: Array, h: Array, i: Array, j: Array) -> Array:
        return jaxpr_as_fun(ClosedJaxpr(self.program, self.looked_at))(b, h, i, j)[0]


def capture(mask: LoweredMask, problem: AttentionProblem, tiles: Tiles) -> LoweredMask:
    """`mask` with every predicate that looks at tracers replaced by what it does on tiles of this size."""
    if mask.lazy is None or not any(isinstance(leaf, Predicate) for leaf in mask.lazy.primitives()):
        return mask
    if not problem.scores:
        return replace(mask, lazy=None)
    zero = jnp.int32(0)
    positions = jax.eval_shape(lambda: Tile(Grid.of(problem, tiles), zero, zero, zero).positions())
    site = replace(mask.site, family="jax", concrete=False)

    def walk(part: Mask) -> Mask:
        match part:
            case And(parts) | Or(parts):
                return type(part)(tuple(walk(inner) for inner in parts))
            case Not(inner):
                return Not(walk(inner))
            case Predicate():
                traced = jax.make_jaxpr(lambda b, h, i, j: part.visible(site, b, h, i, j))(*positions)
                if any(isinstance(const, Tracer) for const in traced.consts):
                    return Captured(traced.jaxpr, tuple(traced.consts))
        return part

    lazy = walk(mask.lazy)
    looks = any(isinstance(leaf, Captured) for leaf in lazy.primitives())
    return replace(mask, lazy=lazy, site=site) if looks else mask
