"""Attention as one jax function with a derivative: forward by any kernel, tangents by the portable one.

A `custom_jvp` and no `custom_vjp`, so that forward and reverse mode, their compositions, `vmap` and `checkpoint` all
follow from one rule. The rule is written in terms of the function's own results, so it differentiates again by itself.
"""

from __future__ import annotations

from collections.abc import Callable
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

# The first jax whose scans can be transposed in whatever is linear.
_SCANS_TRANSPOSE = (0, 10)


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
    d_out, d_lse = _linear(partial(jax_scan.tangent, case.problem, case.tiles, smooth, facts, out, lse), moving)
    return (out, lse), (d_out.astype(out.dtype), d_lse)


def _linear(function: Callable[[Smooth], tuple[Array, Array]], moving: Smooth) -> tuple[Array, Array]:
    """`function(moving)`, linear in `moving`, so that jax can transpose it."""
    if jax.__version_info__ >= _SCANS_TRANSPOSE:
        return function(moving)
    # Older ones transpose only scans that their own differentiation has marked as linear; the derivative of a linear
    # function is that function, and its value at zero is never used, so the compiler drops it.
    return jax.jvp(function, (jax.tree.map(jnp.zeros_like, moving),), (moving,))[1]


def _unless_zero(tangent: Any) -> Array | None:
    return None if isinstance(tangent, SymbolicZero) else jnp.asarray(tangent)
