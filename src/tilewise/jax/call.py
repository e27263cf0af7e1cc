"""The jax family's door behind `tilewise.attention`: a plan and operands become one jitted, differentiable call."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..contract import Dropout, Operands, Plan, Tiles
from ..errors import KernelRefused
from ..kernels import forward_of
from ..kernels.portable.jax_scan import Facts, Smooth
from ..kernels.portable.tiles import default_tiles
from ..problem import AttentionProblem
from . import pytrees  # noqa: F401  (operands cross into jit as pytrees)
from .case import Case
from .derivative import attention
from .ffi import words_of
from .meshes import spread
from .predicates import capture

Array = Any


def run(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq) in the accumulator's, by the plan's kernel.

    Under jit, grad, jvp, vmap, scan and their compositions, on one device or spread over a mesh. Gradients and tangents
    are that kernel's too; derivatives of higher order are the portable kernel's, in linear memory.
    """
    if plan.kernel not in ("native", "portable"):
        # The reference is not for programs, and cuDNN's call brings its own compilation and derivative.
        return forward_of(plan.kernel).forward(plan, operands)
    # Second derivatives are the portable kernel's, so its tiles are needed whichever kernel runs forward.
    tiles = plan.tiles if plan.kernel == "portable" else default_tiles(plan.problem)
    mask, native, bits = capture(operands.mask, plan.problem, tiles), plan.kernel == "native", None
    if native and mask.lazy is not None:
        if mask.site.concrete:
            with jax.ensure_compile_time_eval():  # a predicate's answers are wanted now, also while something is traced
                bits = words_of(mask.tile_bits(0, plan.problem.q_len))
        # The planner has refused traced masks; only here does it show that a predicate closes over a traced array.
        elif plan.forced or plan.problem.invariance == "row":
            raise KernelRefused("native", ["it evaluates the mask before it runs, and the mask is traced"])
        else:
            native = False
    smooth = Smooth(operands.q, operands.k, operands.v, operands.dense, operands.table, operands.sinks)
    return spread(partial(_run, plan.problem, tiles, native), smooth, Facts(mask, seeded(operands.dropout), bits))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(problem: AttentionProblem, tiles: Tiles, native: bool, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out in q's dtype, and lse; compiled once for each problem and structure of its operands."""
    # The portable kernel gives out in the accumulator's dtype: its derivatives are computed from that.
    out_dtype = problem.result if native else problem.accumulator
    precision = jax.config.jax_default_matmul_precision
    case = Case(problem, tiles, native, out_dtype, jax.tree.structure((smooth, facts)), precision)
    out, lse = attention(case, smooth, facts)
    return out.astype(problem.result), lse


def seeded(dropout: Dropout | None) -> Dropout | None:
    """The seed as an array of two words, so that a new seed is a new value and not a new program."""
    if dropout is None:
        return None
    named = ("seed", "first") if dropout.strides else ("seed",)
    words = {name: [jnp.asarray(word, jnp.uint32) for word in getattr(dropout, name)] for name in named}
    return replace(dropout, **{name: jnp.stack(pair) for name, pair in words.items()})
