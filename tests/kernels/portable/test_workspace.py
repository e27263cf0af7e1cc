"""The bytes that `explain` promises bound what a call takes beyond its inputs and outputs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import tilewise as tw

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": tw.causal()},
    "predicate": {"mask": tw.predicate(lambda b, h, i, j: (i - j) % 7 == 0)},
    "softcap": {"softcap": 3.0},
    "dropout": {"dropout": tw.Dropout(0.1, seed=1)},
    "dropout, causal": {"mask": tw.causal(), "dropout": tw.Dropout(0.1, seed=1)},
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 2, 1024, 64), (2, 8, 300, 16)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_more_than_promised(name, shape, dtype):
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape)).astype(dtype)
    options = {**OPTIONS[name], "kernel": "portable", "return_lse": True}
    tw.attention(q, k, v, **options)  # what is imported and remembered by the first call is not this call's
    tracemalloc.start()
    try:
        out, lse = tw.attention(q, k, v, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - out.nbytes - lse.nbytes <= tw.explain(q, k, v, **options).workspace
