"""cuDNN's attention: a call of `jax.nn.dot_product_attention`, which brings its own derivative in reverse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ...contract import Operands, Plan
from .spelling import keywords

Array = Any


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype; the card refuses who wants lse, in whose place stands NaN."""
    problem = plan.problem
    q, k, v = (x.swapaxes(1, 2) for x in (operands.q, operands.k, operands.v))
    mask = keywords(problem) or {}
    out = jax.nn.dot_product_attention(q, k, v, scale=problem.scale, implementation="cudnn", **mask).swapaxes(1, 2)
    return out, jnp.full(out.shape[:3], jnp.nan, problem.accumulator)
