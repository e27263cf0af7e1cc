"""Rows whose lse is far from 0, in jax: what the derivatives need of them, found again (see `row_terms.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...contract import Tiles
from ...problem import AttentionProblem
from ..state import FAR, State, far_from, is_far, may_be_far
from .jax_products import pair_products
from .jax_scan import (
    Facts,
    Smooth,
    accumulating,
    dropped,
    each_block,
    for_any,
    if_given,
    join,
    per_row,
    query_blocks,
    visible,
    zeros_of,
)
from .jax_tiles import Grid, Tile

Array = Any


class Levels(NamedTuple):
    """Of each row, (B, Hq, Sq) in the accumulator's dtype: its probabilities are share * exp(score - level).

    Attributes:
        level: lse, of far rows the largest score. share: 1, of far rows the reciprocal of the sum.
        far: booleans, which these are. pull: of far rows the sum of the probabilities times their gradients.
    """

    level: Array
    share: Array
    far: Array
    pull: Array


def levels(
    problem: AttentionProblem, tiles: Tiles, smooth: Smooth, facts: Facts, lse: Array, d_out: Array | None = None
) -> Levels | None:
    """The levels of all rows, None where no row can be far; keys are passed over only where a row is.

    Their derivatives are those of level lse and share 1, which they are but for rounding.

    Args:
        d_out: (B, Hq, Sq, Dv), the gradient of the output; None where no `pull` is wanted.
    """
    if not may_be_far(problem) or not problem.scores:
        return None
    held, lse_held, d_out = jax.lax.stop_gradient((accumulating(problem, smooth), lse, d_out))
    grid = Grid.of(problem, tiles)
    far = is_far(lse_held, FAR if d_out is None else far_from(problem.dropout, problem.dtype))
    sinks = if_given(partial(per_row, grid), held.sinks)

    def weigh(weights: Array, tile: Tile, at: Smooth, seen: Array | None, d_out: Array | None) -> Array:
        if d_out is None:
            return weights[..., :0]
        pull = dropped(weights, tile, facts) * pair_products(d_out, at.v, seen)
        return visible(pull, seen).sum(-1, keepdims=True)

    def end(state: State, _: Array | None) -> tuple[Array, ...]:
        peak, total, pull = state.peak, state.total, state.weighted
        if sinks is not None:
            peak = jnp.maximum(peak, sinks)
            fade = jnp.exp(state.peak - peak)
            total, pull = total * fade + jnp.exp(sinks - peak), pull * fade[..., None]
        return peak, total, pull

    def found() -> tuple[Array, ...]:
        rows = if_given(partial(query_blocks, grid), d_out)
        peak, total, pull = each_block(problem, grid, held, facts, (weigh, 0 if rows is None else 1), end, rows)
        peak, total = (join(grid, x[..., None])[..., 0] for x in (peak, total))
        pull = join(grid, pull)[..., 0] if rows is not None else 0
        return jnp.where(far, peak, lse_held), jnp.where(far, 1 / total, 1), jnp.where(far, pull / total, 0)

    def near() -> tuple[Array, ...]:
        zero = zeros_of((held, lse_held, *(() if d_out is None else (d_out,))))(lse.shape)
        return lse_held + zero, zero + 1, zero

    level, share, pull = jax.lax.cond(for_any(far.any()), found, near)
    return Levels(lse + jnp.where(far, level - lse_held, 0), share, far, pull)
