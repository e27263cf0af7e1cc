"""Biases and sinks of the largest numbers are finite: only -inf bars a key."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tilewise._native")

import tilewise as tw

LARGEST = {"float32": np.finfo(np.float32), "float64": np.finfo(np.float64)}


def inputs(rows: int, dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    return [rng.standard_normal((1, 2, length, 16)).astype(dtype) for length in (rows, 70, 70)]


@pytest.mark.parametrize("rows", [1, 3, 70])  # decoding, and tiles
@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_of_one_bias_are_means(dtype, rows, page):
    q, k, v = inputs(rows, dtype)
    for number in (LARGEST[dtype].min, LARGEST[dtype].max, LARGEST[dtype].min / 2):
        for bias in (np.full((rows, 70), number, dtype), np.full((1, 1, 1, 70), number, dtype)):
            out, lse = tw.attention(q, k, v, bias=bias, kernel="native", return_lse=True)
            np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), atol=1e-6)
            assert np.isfinite(lse).all() and (np.sign(lse) == np.sign(number)).all()


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("dtype", LARGEST)
def test_the_smallest_number_leaves_the_others_alone(dtype, rows, page):
    """As barred keys of a row that sees others are often written; infinity bars them for good."""
    q, k, v = inputs(rows, dtype)
    bias = np.zeros((rows, 70), dtype)
    bias[:, :30] = LARGEST[dtype].min
    barred = np.where(bias < 0, -np.inf, bias).astype(dtype)
    np.testing.assert_array_equal(*(tw.attention(q, k, v, bias=own, kernel="native") for own in (bias, barred)))
    nothing = tw.attention(q, k, v, bias=np.full((rows, 70), -np.inf, dtype), kernel="native")
    assert (nothing == 0).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_sink_takes_all(dtype, page):
    q, k, v = inputs(5, dtype)
    out, lse = tw.attention(q, k, v, sinks=LARGEST[dtype].max, kernel="native", return_lse=True)
    assert (out == 0).all() and np.isfinite(lse).all() and (lse > 0).all()
    without = tw.attention(q, k, v, kernel="native")
    np.testing.assert_array_equal(tw.attention(q, k, v, sinks=LARGEST[dtype].min, kernel="native"), without)


@pytest.mark.parametrize("number", [-1e9, np.finfo(np.float32).min, np.finfo(np.float32).max])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_gradients_of_such_rows_are_those_of_plain_attention(rows, number, page):
    """At 1e9 scores are rounded to multiples of 64 in either: lse has no place for the logarithm of a sum of them."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in inputs(rows, "float32"))
    bias = torch.zeros(rows, 70)
    bias[:9] = float(number)
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(tw.attention(q, k, v, bias=bias, kernel="native"), (q, k, v), d_out)
    plain = torch.softmax(q @ k.mT / 4 + bias, -1) @ v
    for got, expected in zip(found, torch.autograd.grad(plain, (q, k, v), d_out), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
