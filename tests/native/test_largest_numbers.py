"""Biases and sinks of the largest numbers are finite, only -inf bars a key; gradients of huge scores are exact."""

from __future__ import annotations

import numpy as np
import pytest
from accuracy import assert_accurate

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


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("number", [-1.20892582e24, -1e9, 3e10, -1e38])
def test_a_sink_as_large_as_the_bias_is_one_key_more(number, rows, page):
    q, k, v = inputs(rows, "float32")
    bias, sinks = np.full((1, 1, 1, 1), number, np.float32), np.full(2, number, np.float32)
    out = tw.attention(q, k, v, bias=bias, sinks=sinks, kernel="native")
    np.testing.assert_allclose(out, np.broadcast_to(v.sum(2, keepdims=True) / 71, out.shape), atol=1e-6)


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


def check_huge_scores(kernel, dtype, size):
    """lse near 10^4 is rounded by 0.001, and where a probability is 1, its gradient is a difference that must be 0."""
    torch = pytest.importorskip("torch")
    random = torch.Generator().manual_seed(size)
    q, k, v, d_out = (torch.randn(1, 2, 70, 64, generator=random) * by for by in (size, size, 1, 1))
    given = [x.to(getattr(torch, dtype)) for x in (q, k, v)]
    d_out = d_out.to(given[0].dtype)

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        return torch.autograd.grad(function(*leaves), leaves, d_out.to(dtype))

    def plain(q, k, v):
        return torch.softmax(q @ k.mT / 8, -1) @ v

    found = gradients(lambda q, k, v: tw.attention(q, k, v, kernel=kernel), given[0].dtype)
    exact, yardstick = gradients(plain, torch.float64), gradients(plain, given[0].dtype)
    for name, got, truth, measure in zip("qkv", found, exact, yardstick, strict=True):
        assert_accurate(name, got, truth, measure)

    def tangent(function, dtype):
        along = [torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for n, x in enumerate(given)]
        moved = torch.func.jvp(
            function, tuple(x.to(dtype) for x in given), tuple(x.to(given[0].dtype).to(dtype) for x in along)
        )
        return moved[1]

    if kernel == "native" and dtype == "float32":
        moved = tangent(lambda q, k, v: tw.attention(q, k, v, kernel=kernel), torch.float32)
        assert_accurate("d_out", moved, tangent(plain, torch.float64), tangent(plain, torch.float32))


@pytest.mark.parametrize("size", [20, 50, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_huge_scores_are_as_exact_as_plain_attentions(dtype, size, page):
    check_huge_scores("native", dtype, size)


@pytest.mark.parametrize("size", [20, 50, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_portable_kernels_are_too(dtype, size):
    check_huge_scores("portable", dtype, size)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_whose_rounding_is_hundreds_are_as_exact(dtype, biased, page):
    """Beyond 2^31 a rounded score and the exact one may be 128 apart. Each key stands there twice: the largest ties."""
    torch = pytest.importorskip("torch")
    random = torch.Generator().manual_seed(1)
    given = [torch.randn(1, 2, 70, 64, generator=random).to(getattr(torch, dtype)) for _ in "qkv"]
    given[0][:, :, ::3] *= 1e10
    given[1][:, :, 1::2] = given[1][:, :, ::2]
    d_out = torch.randn(1, 2, 70, 64, generator=random).to(given[0].dtype)
    bias = torch.randn(70, 1, generator=random) if biased else None

    def differentiated(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, d_out.to(dtype))

    def plain(q, k, v):
        return torch.softmax(q @ k.mT / 8, -1) @ v  # the bias is a constant of each row

    found = differentiated(lambda q, k, v: tw.attention(q, k, v, bias=bias, kernel="native"), given[0].dtype)
    exact, yardstick = differentiated(plain, torch.float64), differentiated(plain, given[0].dtype)
    for name, got, truth, measure in zip(("out", *"qkv"), found, exact, yardstick, strict=True):
        assert_accurate(name, got, truth, measure)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_such_products_change_no_bit_of_the_others(dtype, page):
    torch = pytest.importorskip("torch")
    random = torch.Generator().manual_seed(2)
    q, k, v, d_out = (torch.randn(1, 2, 70, 64, generator=random).to(getattr(torch, dtype)) for _ in range(4))
    others = torch.arange(70) % 3 > 0
    results = []
    for size in (1, 1e10):
        own = torch.where(others[:, None], q, q * size).requires_grad_()
        out, lse = tw.attention(own, k, v, kernel="native", return_lse=True)
        results.append((out, lse, torch.autograd.grad(out, own, d_out)[0]))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near[:, :, others], far[:, :, others])
