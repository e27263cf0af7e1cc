"""A sum over tiles of a local function: each operand is cut to the tile, each result added where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..._arrays import Array
from .axes import Axes, Tile
from .walk import Walk

Local = Callable[..., tuple[Array, ...]]


def tiled_sum(
    walk: Walk,
    local: Local,
    inputs: Sequence[tuple[Axes, Array]],
    outputs: Sequence[tuple[Axes, tuple[int, ...]]],
) -> list[Array]:
    """Sum `local(tile, *parts of the inputs)` over the tiles that some row sees, in a fixed order.

    Args:
        inputs: layout and array of each operand of `local`; parts are cast to the accumulator's dtype.
        outputs: layout and shape of each result.

    Returns:
        The results in the accumulator's dtype; 0 where no tile contributed.
    """
    sums = [walk.verbs.zeros(shape) for _, shape in outputs]
    for block in walk.blocks():
        for tile in walk.tiles_of(block):
            add_tile(walk, local, tile, inputs, outputs, sums)
    return sums


def add_tile(
    walk: Walk,
    local: Local,
    tile: Tile,
    inputs: Sequence[tuple[Axes, Array]],
    outputs: Sequence[tuple[Axes, tuple[int, ...]]],
    sums: Sequence[Array],
) -> None:
    """Add one tile's results to `sums`."""
    parts = [walk.verbs.cast(array[tile.part(axes, array.shape)]) for axes, array in inputs]
    tile = walk.guarded(tile, parts)
    for (axes, shape), total, value in zip(outputs, sums, local(tile, *parts), strict=True):
        total[tile.part(axes, shape)] += value
