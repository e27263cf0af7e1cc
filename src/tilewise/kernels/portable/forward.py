"""Forward pass of the portable kernel: an online softmax over tiles of keys for each block of query rows."""

from __future__ import annotations

from functools import partial

from ..._arrays import Array
from ...contract import Operands, Plan
from ..state import State
from .axes import Axes, Block, ungrouped
from .call import Call, make_call, tiles_of


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype, strided as the layout says; lse (B, Hq, Sq) in the accumulator's dtype."""
    if plan.problem.family == "jax":
        from . import jax_scan  # imports jax

        return jax_scan.forward(plan, operands)
    call = make_call(plan.problem, operands, tiles_of(plan))
    verbs, sinks = call.verbs, None
    out = _output(call)
    lse = verbs.empty(tuple(out.shape[:-1]), verbs.dtype)
    if operands.sinks is not None:
        sinks = verbs.cast(operands.sinks).reshape(*call.q.shape[1:3], 1)
    with verbs.quiet():
        for block in call.walk.blocks():
            rows = block.batch, block.heads, slice(None), block.rows
            block_sinks = sinks[block.heads] if sinks is not None else None
            block_out, lse[rows] = attend(call, block).finish(verbs.xp, block_sinks)
            out[rows] = verbs.to(block_out, out.dtype)
    return ungrouped(out), ungrouped(lse)


def attend(call: Call, block: Block) -> State:
    """The state of a block of rows after all keys that it sees."""
    verbs, walk, local = call.verbs, call.walk, call.local()
    q = verbs.cast(call.q[block.batch, block.heads, :, block.rows])
    state = State.empty(verbs.zeros, tuple(q.shape[:-1]), call.problem.value_dim)
    for tile in walk.tiles_of(block):
        k, v = (verbs.cast(array[tile.part(Axes.KEYS, array.shape)]) for array in (call.k, call.v))
        biases = tuple(verbs.cast(bias[tile.part(axes, bias.shape)]) for axes, bias in call.biases)
        tile = walk.guarded(tile, (q, k, v))
        scores, _ = local.scores(tile, q, k, biases)
        state = state.absorb(verbs.xp, scores, partial(local.weigh, tile, v=v))
    return state


def _output(call: Call) -> Array:
    """Memory for the output, seen as (B, Hkv, G, Sq, Dv), ordered as the caller's layout has its axes."""
    problem = call.problem
    heads = (problem.kv_heads, call.q.shape[2])
    dtype = call.verbs.dtype if problem.part else call.q.dtype
    if problem.layout == "bhsd":
        return call.verbs.empty((problem.batch, *heads, problem.q_len, problem.value_dim), dtype)
    out = call.verbs.empty((problem.batch, problem.q_len, *heads, problem.value_dim), dtype)
    return call.verbs.xp.moveaxis(out, 1, 3)
