"""How large the tiles are, how many heads share one, and the bytes that takes."""

from __future__ import annotations

import math

from ...contract import Tiles
from ...problem import ITEM_BYTES, AttentionProblem

# Scores of one head's tile, over its group of query heads. Large enough that a tile's arithmetic outweighs the
# interpreter's overhead, small enough that its scores stay in a core's cache between the passes over them.
_HEAD_SCORES = 1 << 16
# Scores handled at once, over batch rows and heads.
_SLAB_SCORES = 1 << 20
# The same when rows or heads have different masks: a tile is skipped only if nobody in it sees it, so share less.
_VARIED_SCORES = 1 << 16
# Arrays of a tile's scores alive at once in the backward pass: scores, probabilities, their gradients, temporaries.
_LIVE = 6
# Bytes of each score beside those while dropout draws: a dozen arrays of 64-bit words in Philox's arithmetic.
_DRAWN = 12 * 8


def default_tiles(problem: AttentionProblem) -> Tiles:
    """About square tiles; where one side is short the other is longer."""
    scores = _HEAD_SCORES // max(1, problem.group)
    side = max(16, math.isqrt(scores) // 16 * 16)
    queries = max(1, min(problem.q_len, side))
    keys = max(1, min(problem.k_len, max(side, scores // queries)))
    return Tiles(max(1, min(problem.q_len, max(queries, scores // keys))), keys)


def slab(problem: AttentionProblem, tiles: Tiles) -> tuple[int, int]:
    """(batch rows, kv heads) that are handled at once."""
    limit = _VARIED_SCORES if problem.mask.batch or problem.mask.heads else _SLAB_SCORES
    together = max(1, limit // max(1, problem.group * tiles.queries * tiles.keys))
    heads = max(1, min(problem.kv_heads, together))
    return max(1, min(problem.batch, together // heads)), heads


def workspace(problem: AttentionProblem, tiles: Tiles) -> int:
    """Bytes beyond inputs and outputs, forward and backward alike: some tiles, and the gradients' accumulators."""
    batch, heads = slab(problem, tiles)
    queries, keys = min(tiles.queries, problem.q_len), min(tiles.keys, problem.k_len)
    width = problem.head_dim + problem.value_dim
    scores = batch * heads * problem.group * queries * keys
    edges = batch * heads * (problem.group * queries + keys) * width
    sums = problem.batch * (problem.q_heads * problem.q_len + problem.kv_heads * problem.k_len) * width
    drawn = _DRAWN * scores if problem.dropout else 0
    return drawn + ITEM_BYTES[problem.accumulator] * (_LIVE * scores + 3 * edges + (sums if problem.gradients else 0))
