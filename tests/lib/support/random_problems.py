"""Random problems, every kernel against the float64 definition, for as long as one likes: `make fuzz MINUTES=30`.

Hypothesis chooses structure and sizes, and makes what fails small; the values come from a seed, so that lengths may
cross the kernels' tiles.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import accuracy
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.conformance import FAMILIES, check

import tilewise as tw
from tilewise.masks.algebra import Mask
from tilewise.plan.preset import Example

MINUTES = float(os.environ.get("TILEWISE_FUZZ_MINUTES", "1"))

_SEARCH = {"deadline": None, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}

_length = st.one_of(st.integers(0, 9), st.integers(0, 80), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 260]))
_width = st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 64, 65, 80, 96, 128, 129, 160, 256]))
_placed = st.sampled_from(["start", "end"])


@st.composite
def _masks(draw: st.DrawFn, sizes: tuple[int, int, int, int], rng: np.random.Generator) -> Mask | None:
    """None, or up to three primitives joined."""
    batch, heads, rows, keys = sizes

    def primitive() -> Mask:
        match draw(
            st.sampled_from(
                ["causal", "window", "prefix", "lengths", "documents", "intervals", "dense", "blocks", "rule"]
            )
        ):
            case "causal":
                return tw.causal(draw(_placed))
            case "window":
                return tw.window(draw(st.integers(0, 70)), draw(st.sampled_from([0, 3, None])), draw(_placed))
            case "prefix":
                return tw.prefix(draw(st.integers(0, keys + 1)))
            case "lengths":
                return tw.lengths(q=rng.integers(0, rows + 2, batch), k=rng.integers(0, keys + 2, batch))
            case "documents":
                count = draw(st.integers(1, 4))
                ids = rng.integers(0, count, (batch, rows)), rng.integers(0, count, (batch, keys))
                return tw.documents(*(np.sort(side) if draw(st.booleans()) else side for side in ids))
            case "intervals":
                starts = rng.integers(-2, keys + 2, (batch, heads, rows, 2))
                return tw.intervals(starts, starts + rng.integers(0, keys // 2 + 2, starts.shape))
            case "dense":
                shape = tuple(size if draw(st.booleans()) else 1 for size in sizes)
                return tw.dense(rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.7, 1.0])))
            case "blocks":
                side = draw(st.sampled_from([16, 48, 64]))
                return tw.blocks(rng.random((-(-rows // side), -(-keys // side))) < 0.5, side)
        period = draw(st.integers(1, 5))
        return tw.predicate(lambda b, h, i, j: (b + h + 3 * i + j) % (period + 1) != 0)

    mask = None
    for _ in range(draw(st.integers(0, 3))):
        part = primitive()
        part = ~part if draw(st.integers(0, 3)) == 0 else part
        mask = part if mask is None else mask & part if draw(st.booleans()) else mask | part
    return mask


@st.composite
def _examples(draw: st.DrawFn) -> Example:
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3, 8]))
    rows, keys, dim, value = draw(_length), draw(_length), draw(_width), draw(_width)
    heads = kv_heads * group
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = (batch, heads, rows, keys)
    options: dict[str, Any] = {"mask": draw(_masks(sizes, rng))}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, -1.0, 0.3, 2.0])) * dim**-0.5
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.integers(0, 3)) == 0:
        options["sinks"] = rng.standard_normal(heads)
    if draw(st.integers(0, 3)) == 0:
        options["dropout"] = tw.Dropout(draw(st.sampled_from([0.1, 0.5, 0.9])), draw(st.integers(0, 2**64 - 1)))
    biases: list[Any] = []
    if draw(st.integers(0, 2)) == 0:
        shape = tuple(size if draw(st.booleans()) else 1 for size in sizes)
        bias = rng.standard_normal(shape)
        biases.append(np.where(rng.random(shape) < 0.1, -np.inf, bias) if draw(st.booleans()) else bias)
    if draw(st.integers(0, 2)) == 0:
        biases.append(tw.alibi(rng.random(heads), draw(_placed)))
    if biases:
        options["bias"] = biases[0] if len(biases) == 1 else biases[1] + biases[0]
    q = rng.standard_normal((batch, heads, rows, dim))
    k, v = (rng.standard_normal((batch, kv_heads, keys, width)) for width in (dim, value))
    return Example(q, k, v, options)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the suite's tolerance: of many thousand problems some lie in the tail of what rounding does."""
    for name in ("FORWARD", "GRADIENT"):
        factor, floors = getattr(accuracy, name)
        monkeypatch.setattr(accuracy, name, (3 * factor, {dtype: 3 * floor for dtype, floor in floors.items()}))
    monkeypatch.setattr(accuracy, "LSE", {dtype: 3 * floor for dtype, floor in accuracy.LSE.items()})


@pytest.mark.fuzz
@pytest.mark.parametrize("kernel", ["native", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels(kernel: str, family: str, loud_memory: None, roomy: None) -> None:
    """Until the time is over, each time with another seed."""
    end = time.monotonic() + 60 * MINUTES / 6
    check_some = _check_some(kernel, family)
    check_some()
    while time.monotonic() < end:
        check_some()


def _check_some(kernel: str, family: str) -> Callable[[], None]:
    @settings(max_examples=50 if family != "jax" else 10, **_SEARCH)
    @given(_examples(), st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"]), st.booleans())
    def once(example: Example, dtype: str, gradients: bool) -> None:
        check(example, kernel, family, dtype, gradients=gradients)

    return lambda: seed(time.time_ns())(once)()
