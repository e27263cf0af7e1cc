"""The portable kernel's body for jax: tiles of scores under two nested scans, over blocks of queries and of keys.

`attend` is the online softmax. Its derivative is linear in the tangents and itself made of sums over tiles, which are
those of `sums_along`:

    p = exp(s - lse)          d_lse = sum_j p ds          d_out = sum_j p (ds v + dv) - out d_lse

jax's transpose of it is the backward pass of flash attention (Dao et al., 2022), and since it is written in terms of
`out` and `lse`, whose own derivatives it gives again, every order of differentiation follows (`jax/derivative.py` ties
that knot). The bodies of its scans are rematerialised: a backward pass keeps their inputs alone, linear in Sq + Sk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...contract import Dropout, Operands, Plan, Tiles
from ...masks.lower import LoweredMask
from ...problem import AttentionProblem
from ..state import State
from .jax_products import pair_products, weighted_rows
from .jax_tiles import Grid, Tile

Array = Any


class Smooth(NamedTuple):
    """What has a derivative: whole operands shaped as in `contract.Operands`, or their blocks, or tangents of either.

    None stands for an operand that is not given, and for a tangent that is zero.
    """

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    dense: tuple[Array | None, ...] = ()
    table: Array | None = None
    sinks: Array | None = None


class Facts(NamedTuple):
    """The operands without a derivative.

    Attributes:
        bits: the packed tiles of a lazy mask, for kernels that want them.
        corner: numbers of the first batch row and the first head, where the operands are a part of a larger problem.
    """

    mask: LoweredMask
    dropout: Dropout | None = None
    bits: tuple[Array, Array] | None = None
    corner: tuple[Array, Array] | None = None


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq) in the accumulator's dtype; not compiled, no derivative."""
    smooth = Smooth(operands.q, operands.k, operands.v, operands.dense, operands.table, operands.sinks)
    out, lse = attend(plan.problem, plan.tiles, smooth, Facts(operands.mask, operands.dropout))
    return out.astype(operands.q.dtype), lse


def attend(problem: AttentionProblem, tiles: Tiles, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), both in the accumulator's dtype."""
    if not problem.scores:
        return _nothing(problem)
    grid = Grid.of(problem, tiles)
    sinks = if_given(partial(per_row, grid), smooth.sinks)

    def weigh(weights: Array, tile: Tile, at: Smooth, seen: Array | None, _: None) -> Array:
        return weighted_rows(dropped(weights, tile, facts), at.v, seen)

    def end(state: State, _: None) -> tuple[Array, Array]:
        return state.finish(jnp, sinks)

    out, lse = each_block(problem, grid, smooth, facts, (weigh, problem.value_dim), end, None)
    return join(grid, out), join(grid, lse[..., None])[..., 0]


def each_block(
    problem: AttentionProblem,
    grid: Grid,
    smooth: Smooth,
    facts: Facts,
    weighing: tuple[Callable, int],
    end: Callable,
    rows: Array | None,
) -> Any:
    """`end(state, own rows)` of each block of queries after all keys that it sees.

    Args:
        weighing: (weights, tile, operands, seen, own rows) -> what the state is to sum up, and its last axis' size.
        rows: blocks of what else there is of the rows.
    """
    smooth = accumulating(problem, smooth)
    zeros, keys = zeros_of((smooth, rows)), _key_blocks(grid, smooth)
    weigh, width = weighing

    def block(i: Array, q: Array, own: Array | None) -> Any:
        def absorb(carry: tuple, tile: Tile, at: Smooth, seen: Array | None, _: None) -> tuple:
            scores = visible(_scores(grid, at, seen), seen, -jnp.inf)
            state = State(*carry).absorb(jnp, scores, lambda weights: weigh(weights, tile, at, seen, own))
            return state.peak, state.total, state.weighted

        empty = State.empty(zeros, (problem.batch, problem.kv_heads, grid.rows), width)
        carry = (empty.peak, empty.total, empty.weighted)
        carry = _scan(_step(grid, facts, smooth, i, q, absorb), carry, (keys, None))[0]
        return end(State(*carry), own)

    xs = jnp.asarray(grid.queries.starts), query_blocks(grid, smooth.q), rows
    return _scan(lambda _, xs: (None, block(*xs)), None, xs)[1]


def sums_along(
    problem: AttentionProblem, tiles: Tiles, smooth: Smooth, facts: Facts, lse: Array, moving: Smooth
) -> tuple[Array, Array]:
    """The two sums of the module's text along `moving`: the second is the tangent of lse, the first less the second
    times out that of out; in their shapes and the accumulator's dtype."""
    if not problem.scores:
        return _nothing(problem)[0], jnp.zeros_like(lse)
    grid, smooth, moving = Grid.of(problem, tiles), accumulating(problem, smooth), accumulating(problem, moving)
    zeros = zeros_of((smooth, moving))

    # Tangents of dense biases enter as blocks, for there the transpose writes each block once. Slicing them like the
    # biases themselves would have the transpose add a whole (Sq, Sk) gradient for every tile.
    full = [d is not None and 1 not in d.shape[2:] for d in moving.dense]
    bias_rows = tuple(grid.queries.split(d, 2) if whole else None for d, whole in zip(moving.dense, full, strict=True))
    key_blocks = (_key_blocks(grid, smooth), *(if_given(grid.keys.split, x, 2) for x in (moving.k, moving.v)))

    def block(i: Array, q: Array, lse: Array, d_q: Array | None, bias_rows: tuple) -> tuple[Array, Array]:
        unseen = lse == -jnp.inf
        base = jnp.where(unseen, 0.0, lse)

        def absorb(carry: tuple, tile: Tile, at: Smooth, seen: Array | None, blocks: tuple) -> tuple:
            (d_weighted, d_lse), (d_k, d_v, bias_tiles) = carry, blocks
            d_dense = tuple(
                b if b is not None else if_given(tile.cut, d) for b, d in zip(bias_tiles, moving.dense, strict=True)
            )
            along = Smooth(d_q, d_k, dense=d_dense, table=if_given(tile.band, moving.table))
            scores, d_scores = _scores_along(grid, at, along, seen)
            p = visible(jnp.exp(visible(scores, seen, -jnp.inf) - base[..., None]), seen)
            if d_scores is not None:
                pull = visible(p * d_scores, seen)
                d_lse = d_lse + pull.sum(-1)
                d_weighted = d_weighted + weighted_rows(dropped(pull, tile, facts), at.v, seen)
            if d_v is not None:
                d_weighted = d_weighted + weighted_rows(dropped(p, tile, facts), d_v, seen)
            return d_weighted, d_lse

        columns = tuple(if_given(grid.keys.split, rows, 3) for rows in bias_rows)
        step = jax.checkpoint(_step(grid, facts, smooth, i, q, absorb), prevent_cse=False)
        shape = (problem.batch, problem.kv_heads, grid.rows)
        carry = (zeros((*shape, problem.value_dim)), zeros(shape))
        (keys, d_k, d_v) = key_blocks
        (d_weighted, d_lse), _ = _scan(step, carry, (keys, (d_k, d_v, columns)))
        if moving.sinks is not None:
            sink, d_sink = per_row(grid, smooth.sinks), per_row(grid, moving.sinks)
            d_lse = d_lse + jnp.where(unseen, 0.0, jnp.exp(sink - base) * d_sink)
        return d_weighted, d_lse

    body = jax.checkpoint(lambda xs: block(*xs), prevent_cse=False)
    rows = query_blocks(grid, smooth.q), query_blocks(grid, lse[..., None])[..., 0]
    xs = (jnp.asarray(grid.queries.starts), *rows, if_given(partial(query_blocks, grid), moving.q), bias_rows)
    _, (d_weighted, d_lse) = _scan(lambda _, xs: (None, body(xs)), None, xs)
    return join(grid, d_weighted), join(grid, d_lse[..., None])[..., 0]


def _scan(step: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, and no loop where there is one step: XLA's partitioner may never end on a loop of one step."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _step(grid: Grid, facts: Facts, smooth: Smooth, i: Array, q: Array, absorb: Callable) -> Callable:
    """Body of a scan over blocks of keys: `absorb(carry, tile, operands, seen, extra)` where anything is visible."""
    mask = facts.mask

    def step(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        (j, fresh, k, v), extra = xs
        tile = Tile(grid, i, j, fresh, facts.corner)

        def visit(carry: tuple) -> tuple:
            at = Smooth(q, k, v, tuple(map(tile.cut, smooth.dense)), if_given(tile.band, smooth.table))
            seen = tile.seen(mask, at.dense, at.table)
            if seen is None or (mask.dense is None and mask.lazy is None):
                return absorb(carry, tile, at, seen, extra)
            return _where(seen.any(), lambda carry: absorb(carry, tile, at, seen, extra), carry)

        worth = tile.worth(mask)
        return visit(carry) if worth is None else _where(worth, visit, carry), None

    return step


def _where(worth: Array, visit: Callable[[tuple], tuple], carry: tuple) -> tuple:
    """`visit(carry)`, or `carry` where that is known to be the same."""
    return jax.lax.cond(for_any(worth), visit, lambda carry: carry, carry)


@jax.custom_batching.custom_vmap
def for_any(worth: Array) -> Array:
    """A condition that stays one under `vmap`: all mapped examples take the branch that one of them needs.

    Left to jax, the condition would be mapped, both branches computed, and the linear ones no longer transposed.
    """
    return worth


@for_any.def_vmap
def _(size: int, mapped: list[bool], worth: Array) -> tuple[Array, bool]:
    return worth.any(0) if mapped[0] else worth, False


def _scores(grid: Grid, at: Smooth, seen: Array | None) -> Array:
    """Scores of a tile (B, Hkv, R, C); anything at masked pairs."""
    problem = grid.problem
    scores = problem.scale * pair_products(at.q, at.k, seen)
    if problem.softcap is not None:
        scores = problem.softcap * jnp.tanh(scores / problem.softcap)
    for bias in (*at.dense, at.table):
        if bias is not None:
            scores = scores + grid.merge_heads(bias).astype(scores.dtype)
    return scores


def _scores_along(grid: Grid, at: Smooth, along: Smooth, seen: Array | None) -> tuple[Array, Array | None]:
    """Scores of a tile and their tangent, None where no operand of the scores moves."""
    values, tree = jax.tree.flatten(at._replace(v=None), is_leaf=_is_none)
    tangents = jax.tree.leaves(along, is_leaf=_is_none)
    movers = [n for n, tangent in enumerate(tangents) if tangent is not None]
    if not movers:
        return _scores(grid, at, seen), None

    def scores(*moved: Array) -> Array:
        replaced = dict(zip(movers, moved, strict=True))
        return _scores(grid, jax.tree.unflatten(tree, [replaced.get(n, value) for n, value in enumerate(values)]), seen)

    return jax.jvp(scores, [values[n] for n in movers], [tangents[n] for n in movers])


def dropped(weights: Array, tile: Tile, facts: Facts) -> Array:
    """Weights after dropout, kept ones divided by 1 - p."""
    if facts.dropout is None:
        return weights
    return jnp.where(tile.kept(facts.dropout, facts.mask.site.heads), weights * facts.dropout.inverse_keep, 0)


def visible(x: Array, seen: Array | None, otherwise: float = 0.0) -> Array:
    return x if seen is None else jnp.where(seen, x, otherwise)


def if_given(function: Callable, x: Array | None, *more: Any) -> Any:
    return None if x is None else function(x, *more)


def query_blocks(grid: Grid, x: Array) -> Array:
    """(B, Hq, Sq, D) as blocks (count, B, Hkv, R, D)."""
    blocks = grid.queries.split(x, 2)
    return blocks.reshape(blocks.shape[0], x.shape[0], grid.problem.kv_heads, grid.rows, x.shape[3])


def join(grid: Grid, blocks: Array) -> Array:
    """Blocks of rows (count, B, Hkv, R, D) as (B, Hq, Sq, D)."""
    count, batch, _, _, dim = blocks.shape
    return grid.queries.join(blocks.reshape(count, batch, grid.problem.q_heads, grid.queries.size, dim), 2)


def _key_blocks(grid: Grid, smooth: Smooth) -> tuple[Array, ...]:
    """First position, first new position, keys and values of each block of keys."""
    fresh = jnp.arange(grid.keys.count, dtype=jnp.int32) * grid.keys.size
    return jnp.asarray(grid.keys.starts), fresh, grid.keys.split(smooth.k, 2), grid.keys.split(smooth.v, 2)


def per_row(grid: Grid, sinks: Array) -> Array:
    """(Hq,) as (1, Hkv, R), in the accumulator's dtype."""
    problem = grid.problem
    heads = sinks.astype(problem.accumulator).reshape(1, problem.kv_heads, problem.group, 1)
    return jnp.broadcast_to(heads, (*heads.shape[:3], grid.queries.size)).reshape(1, problem.kv_heads, grid.rows)


def accumulating(problem: AttentionProblem, x: Smooth) -> Smooth:
    """In the accumulator's dtype, all that many tiles share: gradients are summed in that dtype and rounded once."""

    def wide(array: Array | None) -> Any:
        return if_given(lambda array: array.astype(problem.accumulator), array)

    # A full dense bias belongs to one tile in each of its elements, and is too large to be converted whole.
    dense = tuple(wide(d) if d is not None and 1 in d.shape[2:] else d for d in x.dense)
    return Smooth(wide(x.q), wide(x.k), wide(x.v), dense, wide(x.table), wide(x.sinks))


def zeros_of(arrays: Any) -> Callable[[tuple[int, ...]], Array]:
    """A maker of zeros that vary over the same mesh axes as `arrays`, as `shard_map` wants of a scan's carry."""
    leaves = jax.tree.leaves(arrays)
    zero = sum(jnp.zeros_like(x, shape=(), dtype=leaves[0].dtype) for x in leaves)
    return lambda shape: jnp.zeros_like(zero, shape=shape)


def _nothing(problem: AttentionProblem) -> tuple[Array, Array]:
    """The results where there are no queries or no keys: rows that see nothing."""
    rows = (problem.batch, problem.q_heads, problem.q_len)
    lse = jnp.full(rows, -jnp.inf, problem.accumulator)
    return jnp.zeros((*rows, problem.value_dim), problem.accumulator), lse


def _is_none(x: object) -> bool:
    return x is None
