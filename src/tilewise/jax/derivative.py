"""Attention as one jax function with a derivative: forward by any kernel, tangents by the portable one.

A `custom_jvp` and no `custom_vjp`, so that forward and reverse mode, their compositions, `vmap` and `checkpoint` all
follow from one rule. The rule is written in terms of the function's own results, so it differentiates again by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..contract import Tiles
from ..kernels.portable import jax_scan
from ..kernels.portable.jax_scan import Facts, Smooth
from ..problem import AttentionProblem
from . import ffi

Array = Any


@dataclass(frozen=True, slots=True)
class Case:
    """All that is known before the arrays: the key under which jax keeps a compiled attention."""

    problem: AttentionProblem
    tiles: Tiles
    native: bool


@partial(jax.jit, static_argnums=0)
def attention(case: Case, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype, lse (B, Hq, Sq) in the accumulator's; compiled once for each case."""
    out, lse = _attention(case, smooth, facts)
    return out.astype(case.problem.dtype), lse


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(case: Case, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """The same, with out in the dtype that its kernel computes in."""
    if case.native:
        return ffi.forward(case.problem, smooth, facts)
    return jax_scan.attend(case.problem, case.tiles, smooth, facts)


@partial(_attention.defjvp, symbolic_zeros=True)
def _attention_jvp(case: Case, primals: tuple[Smooth, Facts], tangents: tuple[Smooth, Any]) -> tuple[Any, Any]:
    smooth, facts = primals
    moving = jax.tree.map(_unless_zero, tangents[0], is_leaf=lambda x: isinstance(x, SymbolicZero))
    out, lse = _attention(case, smooth, facts)
    tiles = case.tiles
    d_out, d_lse = jax_scan.tangent(case.problem, tiles, smooth, facts, out, lse, moving)
    return (out, lse), (d_out.astype(out.dtype), d_lse)


def _unless_zero(tangent: Any) -> Array | None:
    return None if isinstance(tangent, SymbolicZero) else jnp.asarray(tangent)
