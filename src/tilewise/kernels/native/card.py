"""Limits of the compiled CPU kernel."""

from __future__ import annotations

from importlib.util import find_spec

from ...contract import KernelCard, Tiles, Unavailable
from ...problem import ITEM_BYTES, AttentionProblem


def _available() -> Unavailable | None:
    if find_spec("tilewise._native") is None:
        return Unavailable(
            "the compiled module is not installed", "install a C++17 compiler such as g++, then reinstall tilewise"
        )
    return None


def _tiles(problem: AttentionProblem) -> Tiles:
    return Tiles(queries=64, keys=256, split=1024)


def _workspace(problem: AttentionProblem, tiles: Tiles) -> int:
    """A tile of probabilities, queries and output for each thread, and the partial results of split keys."""
    item = ITEM_BYTES[problem.accumulator]
    return item * tiles.queries * (tiles.keys + problem.head_dim + problem.value_dim + 4)


CARD = KernelCard(
    name="native",
    summary="compiled C++ for the CPU's own vector instructions",
    families=frozenset({"numpy", "torch", "jax"}),
    devices=frozenset({"cpu"}),
    dtypes=frozenset({"float32", "float64"}),
    max_dense_biases=4,
    rate=2e11,
    overhead=1e-5,
    available=_available,
    tiles=_tiles,
    workspace=_workspace,
)
