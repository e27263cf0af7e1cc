"""The portable kernel on NumPy arrays against the oracle: values, gradients, dtypes, layouts, empty sizes."""

import numpy as np
import pytest
from support.portable_cases import ALL_CASES, CASES, SMALL, arrays, planned

import tilewise as tw
from tilewise.contract import Tiles
from tilewise.kernels.portable.backward import backward
from tilewise.kernels.portable.forward import forward
from tilewise.kernels.reference import dense


def _same(value):
    return value


def check(operands, tiles=SMALL, tol=1e-12, **options):
    plan, operands = planned(**operands, tiles=tiles, **options)
    exact = dense.attention(plan.problem, operands)
    out, lse = forward(plan, operands)
    np.testing.assert_allclose(out, exact.out, rtol=0, atol=tol)
    np.testing.assert_allclose(lse, exact.lse, rtol=tol, atol=tol)
    rng = np.random.default_rng(99)
    d_out, d_lse = (rng.standard_normal(x.shape).astype(x.dtype) for x in (out, lse))
    want = dense.gradients(exact, d_out, d_lse)
    got = backward(plan, operands, out, lse, d_out, d_lse)
    for name in ("q", "k", "v", "table", "sinks"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=0, atol=10 * tol, err_msg=name)
            assert a.shape == getattr(operands, name).shape and a.dtype == getattr(operands, name).dtype
    for a, b in zip(got.dense, want.dense, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * tol, err_msg="bias")


@pytest.mark.parametrize("tiles", [SMALL, Tiles(4, 4), None], ids=str)
@pytest.mark.parametrize("name", ALL_CASES)
def test_case(name, tiles):
    check(arrays(), tiles, **ALL_CASES[name](_same))


@pytest.mark.parametrize("q_len", [0, 1, 13])
@pytest.mark.parametrize("k_len", [0, 1, 17])
@pytest.mark.parametrize("batch", [0, 1])
def test_sizes(q_len, k_len, batch):
    rng = np.random.default_rng(0)
    options = {"bias": tw.relative(rng.standard_normal(max(q_len + k_len - 1, 0))) + rng.standard_normal((1, 1, 1, 1))}
    check(arrays(batch=batch, q_len=q_len, k_len=k_len), mask=tw.causal("end"), sinks=0.5, **options)


def test_no_heads():
    check(arrays(heads=0, kv=0), mask=tw.causal("end"))
    check(arrays(heads=0, kv=2), mask=tw.causal("end"))


def test_many_heads_in_slabs():
    check(arrays(batch=70, heads=6, kv=3, q_len=3, k_len=4), None, mask=tw.lengths(k=np.arange(70) % 5))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layout_of_output(layout):
    operands = arrays()
    if layout == "bshd":
        operands = {name: np.ascontiguousarray(array.swapaxes(1, 2)) for name, array in operands.items()}
    out = tw.attention(**operands, layout=layout, kernel="portable")
    assert out.flags.c_contiguous
    check(operands, layout=layout)


def test_strides():
    operands = arrays()
    operands["q"] = operands["q"][:, :, ::-1]
    operands["k"] = np.broadcast_to(operands["k"][:1], operands["k"].shape)
    operands["v"] = np.asfortranarray(operands["v"])
    check(operands)


def test_huge_scores():
    operands = arrays()
    operands["q"] *= 1e4
    check(operands, tol=1e-9, mask=tw.causal("end"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lower_precision(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    operands = {name: array.astype(dtype) for name, array in arrays(q_len=33, k_len=65).items()}
    plan, operands = planned(**operands, mask=tw.causal("end"), softcap=5.0)
    out, lse = forward(plan, operands)
    exact = dense.attention(plan.problem, operands)
    assert out.dtype == dtype and lse.dtype == np.float32
    # One rounding at the end: half a unit in the last place of the largest output, beside the accumulator's error.
    digits = np.finfo(np.float32).eps if dtype == "float32" else float(_eps(dtype))
    np.testing.assert_allclose(out.astype(np.float64), exact.out, rtol=0.51 * digits, atol=4e-6)
    np.testing.assert_allclose(lse, exact.lse, rtol=4e-6)


def _eps(dtype):
    return pytest.importorskip("ml_dtypes").finfo(dtype).eps


def test_half_precision_accumulates_in_float32():
    q = np.full((1, 1, 4, 64), 256, np.float16)
    out = tw.attention(q, q, q, kernel="portable", scale=1.0)
    np.testing.assert_array_equal(out, q)


def test_same_bits_again():
    plan, operands = planned(**arrays(), **CASES["everything"](_same))
    first, second = forward(plan, operands), forward(plan, operands)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_inputs_are_not_changed():
    operands = arrays()
    before = {name: array.copy() for name, array in operands.items()}
    check(operands, **CASES["everything"](_same))
    for name, array in operands.items():
        np.testing.assert_array_equal(array, before[name])
