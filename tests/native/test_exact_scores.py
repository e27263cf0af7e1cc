"""Scores of whole numbers up to 4,000, which plain attention computes exactly, are exact here too.

So they are with biases, small beside them or as large, and beside sinks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from accuracy import assert_accurate
from support.conformance import flat
from support.plain import plain_gradients, plain_out
from support.portable_cases import planned

import tilewise as tw
from tilewise.contract import Tangents
from tilewise.kernels.native.backward import backward
from tilewise.kernels.native.forward import forward
from tilewise.kernels.native.tangent import tangent
from tilewise.kernels.reference import dense as reference

pytest.importorskip("tilewise._native")

OPTIONS = {
    "full": {},
    "causal": {"mask": tw.causal("end")},
    "padding": {"mask": tw.lengths(k=np.array([130, 77]))},
    "negative scale": {"scale": -1.0},
    "no scale": {"scale": 0.0},
}


# What is added to scores of 3,600, as a function of them: (B, Hq, Sq, Sk) of whole numbers and, for each row, any one.
BIASES = {
    "small": lambda scores, rng: rng.integers(-3, 4, scores.shape),
    "as large": lambda scores, rng: rng.integers(-3, 4, scores.shape) - scores,
    "half as large": lambda scores, rng: rng.integers(-3, 4, scores.shape) - scores // 2,
    "of whole rows": lambda scores, rng: rng.standard_normal((*scores.shape[:-1], 1)) * 1e4 + rng.integers(-3, 4, 130),
}
SINKS = {"sinks": np.array([3600.0, 3603.0, -3600.0, 0.0])}


def _whole_numbers(rows: int, dim: int, dtype: str) -> dict[str, np.ndarray]:
    """Scores of 60 * 60 = 3,600 and a little for the keys of a query's own kind, a little for the others."""
    rng = np.random.default_rng(dim)

    def kinds(*shape: int) -> np.ndarray:
        few = rng.integers(-1, 2, (*shape, dim)) * (rng.random((*shape, dim)) < 4 / dim)
        own = np.arange(shape[-1]) % 3 % dim
        few[..., np.arange(shape[-1]), own] = 60
        return few.astype(dtype)

    return {"q": kinds(2, 4, rows), "k": kinds(2, 2, 130), "v": rng.standard_normal((2, 2, 130, 24)).astype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_scores_of_thousands_are_exact(page, rows, dim, options, dtype) -> None:
    _check(rows, dtype, _whole_numbers(rows, dim, dtype), options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, SINKS], ids=["alone", "sinks"])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_so_they_are_with_biases(page, rows, bias, options, dtype) -> None:
    whole = _whole_numbers(rows, 8, dtype)
    scores = whole["q"] @ whole["k"].repeat(2, 1).swapaxes(-1, -2)
    added = bias(scores, np.random.default_rng(rows)).astype(dtype)
    _check(rows, dtype, whole, {**options, "bias": added})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_so_they_are_beside_sinks(page, rows, dtype) -> None:
    _check(rows, dtype, _whole_numbers(rows, 8, dtype), SINKS)


def _check(rows: int, dtype: str, whole: dict[str, np.ndarray], options: dict[str, Any]) -> None:
    """out, lse, all gradients and tangents against the oracle."""
    if "sinks" in options:
        options = {**options, "sinks": options["sinks"].astype(dtype)}
    plan, operands = planned(**whole, **{"scale": 1.0, **options}, kernel="native", tiles=None)
    rng = np.random.default_rng(rows)
    oracle = reference.attention(plan.problem, operands)
    out, lse = forward(plan, operands)
    assert_accurate("out", out, oracle.out, plain_out(plan.problem, oracle, operands))
    assert_accurate("lse", lse, oracle.lse)

    d_out = rng.standard_normal(out.shape).astype(dtype)
    d_lse = rng.standard_normal(lse.shape).astype(dtype)
    found = backward(plan, operands, out, lse, d_out, d_lse)
    plain = plain_gradients(plan.problem, oracle, operands, d_out, d_lse)
    exact = reference.gradients(oracle, d_out, d_lse)
    for n, (got, truth, measure) in enumerate(zip(flat(found), flat(exact), flat(plain), strict=True)):
        if truth is not None:
            assert_accurate(f"gradient {n}", got, truth, measure, dtype=dtype)

    along = [rng.standard_normal(x.shape).astype(dtype) for x in (operands.q, operands.k, operands.v)]
    still = None if operands.sinks is None else np.zeros_like(operands.sinks)
    moving = Tangents(*along, tuple(np.zeros_like(x) for x in operands.dense), None, still)
    moved = tangent(plan, operands, out, lse, moving)
    for name, got, truth in zip(("d_out", "d_lse"), moved, reference.tangents(oracle, moving), strict=True):
        assert_accurate(name, got, truth, dtype=dtype)


@pytest.mark.parametrize("dtype, size", [("float32", 1e19), ("float64", 1e200)])
@pytest.mark.parametrize("rows", [1, 70])
def test_only_scores_overflow(page, rows, dtype, size) -> None:
    """Queries times the scale would. The largest of each row is there twice."""
    rng = np.random.default_rng(rows)
    q, k, v = (rng.standard_normal((1, 2, length, 16)).astype(dtype) for length in (rows, 70, 70))
    k[:, :, 35:] = k[:, :, :35]
    chosen = (q @ k.swapaxes(-1, -2))[..., :35].argmax(-1)[..., None]
    large, small = q * q.dtype.type(size), k / q.dtype.type(size)
    out, lse = tw.attention(large, small, v, scale=10 * size, kernel="native", return_lse=True)
    first, second = (np.take_along_axis(v, chosen + n, 2) for n in (0, 35))
    np.testing.assert_array_equal(out, (first + second) / 2)
    np.testing.assert_allclose(lse, 10 * size * (q @ k.swapaxes(-1, -2)).max(-1), rtol=1e-5)
