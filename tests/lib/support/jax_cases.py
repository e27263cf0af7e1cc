"""The portable kernel's cases as jax calls: functions of what has a derivative, and the plain formula beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support.portable_cases import ALL_CASES, arrays, planned

from tilewise.contract import Operands, Plan
from tilewise.jax.call import run
from tilewise.kernels.portable.jax_scan import Smooth
from tilewise.masks.materialize import picture
from tilewise.philox import keep_mask

Function = Callable[[Smooth], tuple[Any, Any]]


def case(name: str, dtype: Any = jnp.float64, **options: Any) -> tuple[Function, Smooth, Plan, Operands]:
    """A case as a function Smooth -> (out, lse), what to call it with, its plan and its operands."""
    qkv = {key: jnp.asarray(array, dtype) for key, array in arrays().items()}

    def convert(array: np.ndarray) -> Any:
        return jnp.asarray(array, dtype if array.dtype == np.float64 else None)

    plan, operands = planned(**qkv, **ALL_CASES[name](convert), **options)
    smooth = Smooth(operands.q, operands.k, operands.v, operands.dense, operands.table, operands.sinks)

    def function(smooth: Smooth) -> tuple[Any, Any]:
        return run(plan, replace(operands, **smooth._asdict()))

    return function, smooth, plan, operands


def plain(plan: Plan, operands: Operands) -> Function:
    """The definition over whole arrays of scores in plain jax, for values and derivatives of any order."""
    problem = plan.problem
    mask = jnp.asarray(picture(operands.mask))
    b, h, i, j = np.ix_(*(np.arange(n) for n in (problem.batch, problem.q_heads, problem.q_len, problem.k_len)))
    kept = 1.0
    if operands.dropout is not None:
        sizes = (problem.q_heads, problem.q_len, problem.k_len)
        kept = keep_mask(operands.dropout, b, h, i, j, *sizes, np) * operands.dropout.inverse_keep

    def function(smooth: Smooth) -> tuple[Any, Any]:
        q, k, v = (x.astype(problem.accumulator) for x in (smooth.q, smooth.k, smooth.v))
        k, v = (jnp.repeat(x, problem.group, 1) for x in (k, v))
        scores, seen = problem.scale * q @ k.mT, mask
        if problem.softcap is not None:
            scores = problem.softcap * jnp.tanh(scores / problem.softcap)
        biases = [
            *smooth.dense,
            *([] if smooth.table is None else [smooth.table[:, :, j - i + problem.q_len - 1][:, :, 0, 0]]),
        ]
        for bias in biases:
            scores, seen = scores + jnp.where(bias == -jnp.inf, 0, bias), seen & (bias != -jnp.inf)
        some = seen.any(-1)
        sink = -jnp.inf if smooth.sinks is None else smooth.sinks[:, None]
        peak = jnp.maximum(jnp.where(seen, scores, -jnp.inf).max(-1), sink)
        peak = jax.lax.stop_gradient(jnp.where(some, peak, 0))
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - peak[..., None], 0)), 0)
        total = jnp.where(some, weights.sum(-1) + jnp.exp(sink - peak), 1)
        out = (weights / total[..., None] * kept) @ v
        return out.astype(problem.dtype), jnp.where(some, peak + jnp.log(total), -jnp.inf)

    return function


def finite(lse: Any) -> Any:
    """lse with 0 for rows that see nothing, so that a loss may add it up."""
    return jnp.where(lse == -jnp.inf, 0, lse)
