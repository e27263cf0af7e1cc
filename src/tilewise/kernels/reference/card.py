"""Limits of the reference kernel."""

from __future__ import annotations

from ...contract import KernelCard, Tiles
from ...problem import AttentionProblem

_ARRAYS_OF_SCORES = 6  # scores, visibility, weights, probabilities and their temporaries, all float64


def _workspace(problem: AttentionProblem, tiles: Tiles) -> int:
    return 8 * _ARRAYS_OF_SCORES * problem.scores


CARD = KernelCard(
    name="reference",
    summary="the definition in NumPy float64, dense; the oracle of the tests",
    families=frozenset({"numpy", "torch", "jax"}),
    devices=frozenset({"*"}),
    dtypes=frozenset({"float64", "float32", "float16", "bfloat16"}),
    traced=False,
    gradients=frozenset({"q", "k", "v", "bias", "table", "sinks"}),
    linear_memory=False,
    automatic=frozenset(),
    rate=1e8,
    workspace=_workspace,
)
