"""Gradients of the compiled kernel on every page, against the oracle; their bits do not depend on threads or slabs."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from accuracy import assert_accurate
from support.conformance import flat
from support.portable_cases import ALL_CASES, arrays, planned

import tilewise as tw
from tilewise.kernels.native import card
from tilewise.kernels.native.backward import backward
from tilewise.kernels.native.forward import forward
from tilewise.kernels.reference import dense as reference

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("loud_memory")


def _differentiate(plan, operands, d_out=None, d_lse=None):
    oracle = reference.attention(plan.problem, operands)
    rng = np.random.default_rng(7)
    d_out = rng.standard_normal(oracle.out.shape).astype(plan.problem.dtype) if d_out is None else d_out
    d_lse = rng.standard_normal(oracle.lse.shape).astype(plan.problem.accumulator) if d_lse is None else d_lse
    out, lse = forward(plan, operands)
    return backward(plan, operands, out, lse, d_out, d_lse), reference.gradients(oracle, d_out, d_lse)


def _check(plan, operands, **gradients) -> None:
    found, exact = _differentiate(plan, operands, **gradients)
    for n, (got, truth) in enumerate(zip(flat(found), flat(exact), strict=True)):
        assert (got is None) == (truth is None)
        if truth is not None:
            assert_accurate(f"gradient {n}", got, truth, dtype=plan.problem.dtype)


def _same(found, expected) -> None:
    for got, other in zip(flat(found), flat(expected), strict=True):
        assert (got is None) == (other is None)
        assert got is None or got.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_facts(page, name, dtype) -> None:
    qkv = {key: array.astype(dtype) for key, array in arrays().items()}
    _check(*planned(**qkv, **ALL_CASES[name](lambda x: x), kernel="native", tiles=None))


# Tiles have 4 to 48 rows, groups 4 or 8 keys, blocks 64, segments 128 or 512.
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "q_len, k_len, dim, value", [(1, 1, 1, 1), (70, 700, 33, 7), (100, 129, 64, 80), (25, 64, 5, 48)]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_sizes(page, q_len, k_len, dim, value, dtype, layout) -> None:
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 4, 2, q_len, k_len, dim, value).items()}
    plan, operands = planned(**qkv, mask=tw.causal("end"), kernel="native", tiles=None)
    _check(replace(plan, problem=replace(plan.problem, layout=layout)), operands)


@pytest.mark.parametrize("sizes", [(0, 4, 2, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0), (2, 0, 0, 5, 7)], ids=str)
def test_nothing_to_do(page, sizes) -> None:
    plan, operands = planned(**arrays(0, *sizes), kernel="native", tiles=None)
    found, _ = _differentiate(plan, operands)
    for got, operand in zip((found.q, found.k, found.v), (operands.q, operands.k, operands.v), strict=True):
        np.testing.assert_array_equal(got, np.zeros(operand.shape))


def _large(dtype="float32", **options):
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 4, 2, 150, 900, 20, 24).items()}
    return planned(**qkv, kernel="native", tiles=None, **options)


BIASES = {
    "none": (),
    "pairs": (1, 1, 150, 900),
    "pairs of heads": (1, 4, 150, 900),
    "pairs of batch": (2, 1, 150, 900),
    "rows": (1, 4, 150, 1),
    "keys": (2, 1, 1, 900),
    "one": (1, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_threads(shape, dtype) -> None:
    bias = {"bias": np.random.default_rng(3).standard_normal(shape).astype(np.float32)} if shape else {}
    plan, operands = _large(dtype, mask=tw.causal("end"), **bias)
    _check(plan, operands)
    answers = []
    for threads in (1, 2, 5):
        tw.set_num_threads(threads)
        answers.append(_differentiate(plan, operands)[0])
    tw.set_num_threads(0)
    _same(answers[1], answers[0])
    _same(answers[2], answers[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_diagonal_crosses_segments(dtype) -> None:
    """Segments that run at the same time add to the same table."""
    table = np.random.default_rng(3).standard_normal((1, 4, 1049)).astype(np.float32)
    plan, operands = _large(dtype, bias=tw.relative(table), mask=tw.window(200, 100, "end"))
    _check(plan, operands)
    answers = []
    for threads in (1, 2, 5, 5, 5):
        tw.set_num_threads(threads)
        answers.append(_differentiate(plan, operands)[0])
    tw.set_num_threads(0)
    for answer in answers[1:]:
        _same(answer, answers[0])


def _seen_by_some_tiles() -> np.ndarray:
    # Tiles have 32 rows: of four that pass together, each meets other blocks of 64 keys, and other halves of them.
    seen = np.random.default_rng(4).random((300, 400)) < 0.9
    seen[40:90, 70:120] = seen[96:128] = seen[130:200, 128:160] = seen[:, 192:256] = seen[200:224, 256:] = False
    return seen


TOGETHER = {
    "all": {},
    "causal": {"mask": tw.causal("end")},
    "window": {"mask": tw.window(70, 20, "end")},
    "holes": {"mask": tw.dense(_seen_by_some_tiles())},
    "dropout": {"mask": tw.dense(_seen_by_some_tiles()), "dropout": tw.Dropout(0.3, 4)},
    "bias": {"bias": np.random.default_rng(3).standard_normal((1, 1, 300, 400)).astype(np.float32), "softcap": 5.0},
}


def _together(dtype, **options):
    """Two heads share keys, so that there are 19 tiles for one segment, or, with five threads, for four."""
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 1, 4, 2, 300, 400, 40, 72).items()}
    return planned(**qkv, kernel="native", tiles=None, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", TOGETHER.values(), ids=TOGETHER)
def test_tiles_that_pass_together(options, dtype) -> None:
    """Where tiles are many for each segment, several pass over a block before its keys' gradients are added to."""
    plan, operands = _together(dtype, **options)
    answers = []
    for threads in (1, 2, 5):
        tw.set_num_threads(threads)
        answers.append(_differentiate(plan, operands)[0])
        _check(plan, operands)
    tw.set_num_threads(0)
    _same(answers[1], answers[0])
    _same(answers[2], answers[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["query", "key"])
def test_one_of_the_tiles_that_pass_together_holds_what_is_not_finite(page, what, dtype) -> None:
    seen = _seen_by_some_tiles()
    seen[70] = seen[:, 100] = seen[:, 300] = False
    rng = np.random.default_rng(2)
    d_out = rng.standard_normal((1, 4, 300, 72)).astype(dtype)
    d_lse = rng.standard_normal((1, 4, 300)).astype("float32")
    tw.set_num_threads(1)
    plan, operands = _together(dtype, mask=tw.dense(seen))
    expected, _ = _differentiate(plan, operands, d_out, d_lse)
    bad = {name: getattr(operands, name).copy() for name in ("q", "k", "v")}
    if what == "query":
        _spoil(bad["q"], np.s_[:, :, 70])
        _spoil(d_out, np.s_[:, :, 70])
    else:
        _spoil(bad["k"], np.s_[:, :, 100], np.s_[:, :, 300])
        _spoil(bad["v"], np.s_[:, :, 100], np.s_[:, :, 300])
    found, _ = _differentiate(plan, replace(operands, **bad), d_out, d_lse)
    tw.set_num_threads(0)
    _same(found, expected)


# The last tile is not full and the last keys fill no vector; with 3 query rows, heads share a vector of lanes.
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("q_len, k_len", [(3, 37), (61, 131)])
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 1, 1, 1), (1, 4, 0, 1), (1, 1, 0, 0), (2, 4, 1, 0), (2, 4, 0, 0)])
def test_sums_of_biases(page, shape, q_len, k_len, dtype) -> None:
    """Gradients of a bias (a 0 stands for all queries or all keys) and of a table beside it."""
    rng = np.random.default_rng(5)
    shape = (*shape[:2], shape[2] or q_len, shape[3] or k_len)
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 4, 2, q_len, k_len, 16, 8).items()}
    bias = rng.standard_normal(shape).astype("float64" if dtype == "float64" else "float32")  # as its gradient will be
    bias[rng.random(shape) < 0.1] = -np.inf
    both = tw.relative(rng.standard_normal((4, q_len + k_len - 1))) + bias if bias.size > 1 else bias
    mask = tw.causal("end") & tw.dense(rng.random((1, 1, q_len, k_len)) < 0.8)
    _check(*planned(**qkv, mask=mask, bias=both, dropout=tw.Dropout(0.2, 3), kernel="native", tiles=None))


def test_probabilities_near_the_end_of_the_exponent(page) -> None:
    """Slopes so steep that far keys' probabilities are on both sides of the smallest number there is."""
    qkv = {key: array.astype(np.float32) for key, array in arrays(0, 2, 4, 2, 150, 300, 16, 8).items()}
    _check(*planned(**qkv, bias=tw.alibi(np.linspace(0.2, 2.0, 4), "end"), kernel="native", tiles=None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("keys", [1, 3, 100])
def test_the_rounding_of_out_is_not_multiplied_by_dropout(page, keys, dtype) -> None:
    # A bias that all keys of a row share moves nothing but lse, however large the factor of what dropout keeps.
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 4, 2, 40, keys, 20, 32).items()}
    options = {"bias": np.zeros((1, 1, 40, 1)), "dropout": tw.Dropout(0.9, seed=1), "mask": tw.causal("end")}
    plan, operands = planned(**qkv, **options, kernel="native", tiles=None)
    found, _ = _differentiate(plan, operands, d_lse=np.zeros((2, 4, 40), np.float32))
    np.testing.assert_allclose(found.dense[0], 0, atol=2e-3)


def test_rows_in_parts(monkeypatch) -> None:
    mask = tw.predicate(lambda b, h, i, j: (3 * i + j + h + b) % 4 != 0)
    monkeypatch.setattr("tilewise.kernels.native.call.BITS_BYTES", 1)
    _check(*_large(mask=mask, sinks=np.ones(4, np.float32)))


@pytest.mark.parametrize("wanted", [{"q"}, {"k"}, {"v"}, {"bias"}, {"sinks"}], ids=str)
def test_what_is_not_wanted_is_not_made(page, wanted) -> None:
    options = {"bias": np.ones((1, 1, 13, 17)), "sinks": np.ones(4)}
    plan, operands = planned(**arrays(), **options, kernel="native", tiles=None)
    everything, _ = _differentiate(plan, operands)
    found, _ = _differentiate(replace(plan, problem=replace(plan.problem, gradients=frozenset(wanted))), operands)
    for name, got, all_of_it in zip(
        ("q", "k", "v", "bias", "table", "sinks"), flat(found), flat(everything), strict=True
    ):
        assert (got is None) == (name not in wanted)
        if got is not None:
            np.testing.assert_array_equal(got, all_of_it)


def _spoil(array, *places) -> None:
    for place in places:
        array[place] = np.nan


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"dropout": tw.Dropout(0.3, 4)}], ids=str)
def test_what_is_masked_cannot_be_seen(page, options, dtype) -> None:
    # Query 3 sees nothing and key 5 is seen by nobody; key 9 is seen by query 8 alone.
    seen = np.random.default_rng(1).random((13, 17)) < 0.6
    seen[3], seen[:, 5], seen[:, 9] = False, False, False
    seen[8, 9] = True
    clean, rng = {name: array.astype(dtype) for name, array in arrays().items()}, np.random.default_rng(2)
    d_out, d_lse = rng.standard_normal((2, 4, 13, 5)).astype(dtype), rng.standard_normal((2, 4, 13))
    d_lse = d_lse.astype("float32" if dtype == "bfloat16" else dtype)
    mask = {"mask": tw.dense(seen), **options}
    expected, _ = _differentiate(*planned(**clean, **mask, kernel="native", tiles=None), d_out, d_lse)
    bad = {name: array.copy() for name, array in clean.items()}
    _spoil(bad["q"], np.s_[:, :, 3])
    _spoil(bad["k"], np.s_[:, :, 5])
    _spoil(bad["v"], np.s_[:, :, 5])
    _spoil(d_out, np.s_[:, :, 3])
    _spoil(d_lse, np.s_[:, :, 3])
    found, _ = _differentiate(*planned(**bad, **mask, kernel="native", tiles=None), d_out, d_lse)
    for got, other in zip((found.q, found.k, found.v), (expected.q, expected.k, expected.v), strict=True):
        assert got.tobytes() == other.tobytes()
    _spoil(bad["v"], np.s_[:, :, 9])
    found, _ = _differentiate(*planned(**bad, **mask, kernel="native", tiles=None), d_out, d_lse)
    q_nan, k_nan = (np.isnan(array.astype("float32")) for array in (found.q, found.k))
    assert q_nan[:, :, 8].all() and not np.delete(q_nan, 8, 2).any()
    sees_none = ~seen[8]
    assert k_nan[:, :, ~sees_none].all() and not k_nan[:, :, sees_none].any()


def test_the_card_promises_them_all() -> None:
    assert card.CARD.gradients == {"q", "k", "v", "bias", "table", "sinks"}
