"""The simulator's estimates against exact schedules where these fit, and its reach where they do not."""

from __future__ import annotations

import time

import numpy as np
import pytest

import tilewise as tw
from tilewise.distributed import MACHINES, Layout
from tilewise.distributed import simulate as sim
from tilewise.distributed.cost import costs
from tilewise.distributed.timing import load_of
from tilewise.masks.lower import LoweredMask, lower
from tilewise.masks.site import Site
from tilewise.problem import AttentionProblem

_N = 1 << 14
_EDGES = sim.drawn_documents(_N, 900, seed=2)
_IDS = np.searchsorted(_EDGES, np.arange(_N), side="right")
PATTERNS = {
    "full": (sim.full(), None),
    "causal": (sim.causal(), tw.causal()),
    "window": (sim.window(600), tw.causal() & tw.window(599, 0)),
    "documents": (sim.documents(_EDGES), tw.causal() & tw.documents(_IDS)),
}


def lowered(name: str) -> LoweredMask:
    return lower(PATTERNS[name][1], Site(1, 1, _N, _N))


def problem_of(n: int) -> AttentionProblem:
    return AttentionProblem("torch", "cuda", "bfloat16", 1, 32, 8, n, n, 128, 128, gradients=frozenset({"q", "k", "v"}))


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_pattern_is_its_mask(name: str) -> None:
    starts, stops = PATTERNS[name][0].bounds(np.arange(_N), _N)
    ranges = lowered(name).ranges
    expected = (np.zeros(_N), np.full(_N, _N)) if ranges is None else (ranges.starts, ranges.stops)
    for found, side in zip((starts, stops), expected, strict=True):
        np.testing.assert_array_equal(found, np.ravel(side))
        assert np.all(np.diff(found) >= 0)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 4, 32, 100])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_the_estimate_of_all_places_knows_every_exchange(name: str, ranks: int, kind: str) -> None:
    layout = Layout(kind, _N, ranks)
    exact, found = load_of(lowered(name), layout, layout), sim.estimated_load(PATTERNS[name][0], layout)
    assert found.whole
    np.testing.assert_array_equal(found.hops, exact.hops)
    np.testing.assert_array_equal(found.received, exact.received)
    np.testing.assert_array_equal(found.pairs > 0, exact.pairs > 0)
    assert np.abs(found.pairs.sum(0) - exact.pairs.sum(0)).max() <= 0.03 * exact.pairs.sum(0).max()
    assert found.total == pytest.approx(exact.total, rel=0.01)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_sample_predicts_nearly_what_the_schedule_does(name: str, kind: str) -> None:
    """256 ranks, of which half are looked at."""
    layout, machine = Layout(kind, _N, 256), MACHINES["h100"]
    exact = {c.name: c for c in costs(problem_of(_N), lowered(name), layout, layout, machine) if not c.refused}
    found = {c.name: c for c in sim.predict(PATTERNS[name][0], problem_of(_N), kind, 256, machine)}
    assert exact.keys() == found.keys()
    # Keeping pace with one's neighbours is a bound where documents make some wait and others not.
    slack = 1.3 if name == "documents" else 1.05
    for key, cost in exact.items():
        for step in ("forward", "backward"):
            ratio = getattr(found[key], step) / getattr(cost, step)
            assert 0.95 < ratio < slack, f"{key}, {step}: {ratio}"


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_a_hundred_million_tokens_on_sixteen_thousand_ranks(kind: str) -> None:
    n, ranks, began = 100_000_000, 16_384, time.thread_time()
    layout = Layout(kind, n, ranks)
    load = sim.estimated_load(sim.causal(), layout)
    assert load.pairs.sum(0).max() * ranks / load.total == pytest.approx(2 if kind == "contiguous" else 1, rel=0.01)
    assert len(load.hops) == ranks
    reach = sim.estimated_load(sim.window(4096), layout)
    assert len(reach.hops) == (2 if kind == "contiguous" else 5) and reach.received.sum(0).max() < 5 * n / ranks
    assert time.thread_time() - began < 20


def test_documents_are_drawn_with_their_mean_and_again_alike() -> None:
    edges = sim.drawn_documents(10_000_000, 5000)
    assert edges[0] == 0 and np.all(np.diff(edges) > 0) and edges[-1] < 10_000_000
    assert np.diff(edges).mean() == pytest.approx(5000, rel=0.1)
    np.testing.assert_array_equal(edges, sim.drawn_documents(10_000_000, 5000))
