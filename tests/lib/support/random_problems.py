"""Random attention calls for `make fuzz`, and how long it looks for one that fails.

Hypothesis chooses structure and sizes, and makes what fails small; the values come from a seed, so that lengths may
cross the kernels' tiles.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

import tilewise as tw
from tilewise.masks.algebra import Mask
from tilewise.plan.preset import Example

MINUTES = float(os.environ.get("TILEWISE_FUZZ_MINUTES", "1"))
# Tests that search, and so divide the time: each kernel from each framework, tangents, three of bits, sequences, pages.
SEARCHES = 12

_SEARCH: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
    "print_blob": True,
}

lengths = st.one_of(st.integers(0, 9), st.integers(0, 80), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 260]))
# Beyond a segment of the backward pass (512 keys) and a split of decode (1024).
_many = st.sampled_from([500, 511, 512, 513, 545, 577, 700, 1023, 1025, 1100])
key_lengths = st.integers(0, 7).flatmap(lambda n: _many if n == 0 else lengths)
widths = st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 64, 65, 80, 96, 128, 129, 160, 256]))
groups = st.sampled_from([1, 1, 2, 3, 8])
# bfloat16 has kernels of its own on several pages.
dtypes = st.sampled_from(["float32", "bfloat16", "bfloat16", "float64", "float16"])
_placed = st.sampled_from(["start", "end"])
_words = st.integers(0, 2**64 - 1)
# So far from 0 that scores beside them vanish in float64 as well; a power of two, for any dtype rounds it alike.
_far = st.sampled_from([-(2.0**100), -(2.0**80), 2.0**80])
_strides = st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**63 - 1))


def search(once: Callable[..., None], *drawn: st.SearchStrategy[Any], examples: int = 50) -> None:
    """Call `once` with what is drawn until this test's share of the time is over, `examples` for each random seed."""
    end = time.monotonic() + 60 * MINUTES / SEARCHES
    while True:
        checked = settings(max_examples=examples, **_SEARCH)(given(*drawn)(once))
        with warnings.catch_warnings():
            # Where a call fails, that its arrays are long to print is no error to show in place of its own.
            warnings.simplefilter("ignore", HypothesisWarning)
            seed(time.time_ns())(checked)()
        if time.monotonic() >= end:
            return


def pages() -> st.SearchStrategy[str]:
    """The pages of the compiled module that this machine runs, the best of them most often; "" where there is none."""
    if find_spec("tilewise._native") is None:
        return st.just("")
    from tilewise import _native

    supported = _native.build_info()["supported_pages"]
    return st.sampled_from([*supported[:1] * len(supported), *supported])


@contextmanager
def on_page(page: str) -> Iterator[None]:
    """The compiled module runs this page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWISE_ISA", page)
        yield


@st.composite
def masks(draw: st.DrawFn, sizes: tuple[int, int, int, int], rng: np.random.Generator) -> Mask | None:
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
def dropouts(draw: st.DrawFn, sizes: tuple[int, int, int, int]) -> tw.Dropout:
    """Dropout of a call of its own, of a part of a larger one, or numbered in any way."""
    p, key, stream = draw(st.sampled_from([0.1, 0.5, 0.9])), draw(_words), draw(st.sampled_from([0, 3, 2**64 - 1]))
    batch, heads, rows, keys = (size + draw(st.integers(0, 300)) for size in sizes)
    match draw(st.sampled_from(["own", "part", "any"])):
        case "own":
            return tw.Dropout(p, key, stream)
        case "part":
            strides = (heads * rows * keys, rows * keys, keys, 1)
            return tw.Dropout(p, key, stream, draw(st.integers(0, batch * strides[0])), strides)
    strides = draw(st.tuples(*[_strides] * 4).filter(any))
    return tw.Dropout(p, key, stream, draw(_words), strides)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """q, k, v in float64, and any options."""
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(groups)
    rows, keys, dim, value = draw(lengths), draw(key_lengths), draw(widths), draw(widths)
    if keys > 300:  # the definition has numbers for every pair
        batch, group = min(batch, 1), min(group, 2)
    heads = kv_heads * group
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = (batch, heads, rows, keys)
    options: dict[str, Any] = {"mask": draw(masks(sizes, rng))}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, -1.0, 0.3, 2.0])) * dim**-0.5
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.integers(0, 3)) == 0:
        options["sinks"] = rng.standard_normal(heads)
        if draw(st.integers(0, 3)) == 0:
            options["sinks"][rng.random(heads) < 0.5] = draw(_far)
    if draw(st.integers(0, 3)) == 0:
        options["dropout"] = draw(dropouts(sizes))
    biases: list[Any] = []
    if draw(st.integers(0, 2)) == 0:
        biases.append(tw.alibi(rng.random(heads), draw(_placed)))
    if rows + keys and draw(st.integers(0, 2)) == 0:
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), rows + keys - 1)
        table = rng.standard_normal(shape)
        biases.append(tw.relative(np.where(rng.random(shape) < 0.1, -np.inf, table) if draw(st.booleans()) else table))
    if draw(st.integers(0, 2)) == 0:
        shape = tuple(size if draw(st.booleans()) else 1 for size in sizes)
        bias = rng.standard_normal(shape)
        match draw(st.sampled_from(["numbers", "holes", "far"])):
            case "holes":
                bias[rng.random(shape) < 0.1] = -np.inf
            case "far":
                bias[rng.random(shape) < 0.1] = draw(_far)
                bias[rng.random(shape[:-1]) < 0.2] = draw(_far)
        biases.append(bias)
    if biases:
        options["bias"] = sum(biases[1:], start=biases[0])
    q = rng.standard_normal((batch, heads, rows, dim))
    k, v = (rng.standard_normal((batch, kv_heads, keys, width)) for width in (dim, value))
    return Example(q, k, v, options)
