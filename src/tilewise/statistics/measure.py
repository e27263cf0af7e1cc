"""The walk over the tiles of a question: sums are added up and the largest scores kept, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .._arrays import Array
from ..kernels.portable.axes import Axes, Block, Tile
from .leaders import Leaders
from .question import Question


def measure(question: Question, arrays: Sequence[Array]) -> tuple[list[Array], Leaders | None]:
    """The sums in the accumulator's dtype, and the leaders (B, Hkv, G, Sq, K) if any are wanted.

    Args:
        arrays: q (B, Hkv, G, Sq, D), k (B, Hkv, Sk, D), the biases, and lse (B, Hkv, G, Sq), which must be finite where
            it is not NaN.
    """
    call, verbs = question.call, question.call.verbs
    sums = [verbs.zeros(output.shape) for output in question.outputs]
    shape = (*call.q.shape[:4], question.top)
    scores, keys = verbs.empty(shape, verbs.dtype), verbs.empty(shape, verbs.xp.int64)
    with verbs.quiet():
        for block in blocks(question):
            rows = block.batch, block.heads, slice(None), block.rows
            leaders = Leaders.none(verbs, tuple(keys[rows].shape))
            for tile in call.walk.tiles_of(block):
                tile, (q, k, *biases, lse) = parts_of(question, tile, arrays)
                tile_scores, _ = call.local().scores(tile, q, k, tuple(biases))
                found = question.sums(tile, tile_scores, lse)
                for output, total, value in zip(question.outputs, sums, found, strict=True):
                    total[output.part(tile)] += value
                if question.top:
                    leaders = leaders.absorb(verbs, tile_scores, tile.keys.start)
            scores[rows], keys[rows] = leaders.scores, leaders.keys
    return sums, Leaders(scores, keys) if question.top else None


def blocks(question: Question) -> Iterator[Block]:
    """The blocks of the rows that are asked about."""
    for block in question.call.walk.blocks():
        first, last = max(block.rows.start, question.rows.start), min(block.rows.stop, question.rows.stop)
        if first < last:
            yield replace(block, rows=slice(first, last))


def layouts(question: Question) -> tuple[Axes, ...]:
    """The layouts of the arrays that `measure` takes."""
    return Axes.ROWS, Axes.KEYS, *(axes for axes, _ in question.call.biases), Axes.ROWS


def parts_of(question: Question, tile: Tile, arrays: Sequence[Array]) -> tuple[Tile, list[Array]]:
    """The tile, guarded against what it hides, and its part of each array in the accumulator's dtype."""
    walk, axes = question.call.walk, layouts(question)
    parts = [walk.verbs.cast(array[tile.part(axis, array.shape)]) for axis, array in zip(axes, arrays, strict=True)]
    return walk.guarded(tile, parts), parts
