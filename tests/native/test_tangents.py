"""Tangents of the compiled kernel on every page, against the oracle; a row's bits depend on the row alone."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from accuracy import assert_accurate
from support.portable_cases import ALL_CASES, CASES, arrays, planned

import tilewise as tw
from tilewise.contract import Tangents
from tilewise.kernels.native.forward import forward
from tilewise.kernels.native.tangent import tangent
from tilewise.kernels.reference import dense as reference

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("loud_memory")

PARTS = ("q", "k", "v", "dense", "table", "sinks")


def _along(operands, seed=7) -> Tangents:
    """A direction of every operand; a bias of -inf stays."""
    rng = np.random.default_rng(seed)

    def one(x):
        if x is None:
            return None
        return np.where(np.isfinite(x.astype("float64")), rng.standard_normal(x.shape), 0).astype(x.dtype)

    q, k, v, table, sinks = (one(getattr(operands, name)) for name in ("q", "k", "v", "table", "sinks"))
    return Tangents(q, k, v, tuple(map(one, operands.dense)), table, sinks)


def _push(plan, operands, moving):
    return tangent(plan, operands, *forward(plan, operands), moving)


def _check(plan, operands, moving=None) -> None:
    moving = moving or _along(operands)
    found = _push(plan, operands, moving)
    exact = reference.tangents(reference.attention(plan.problem, operands), moving)
    assert found[0].dtype == plan.problem.result and found[1].dtype == plan.problem.accumulator
    for name, got, truth in zip(("d_out", "d_lse"), found, exact, strict=True):
        assert_accurate(name, got, truth, dtype=plan.problem.dtype)


def _same(found, expected) -> None:
    for got, other in zip(found, expected, strict=True):
        assert got.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_facts(page, name, dtype) -> None:
    qkv = {key: array.astype(dtype) for key, array in arrays().items()}
    _check(*planned(**qkv, **ALL_CASES[name](lambda x: x), kernel="native", tiles=None))


# Tiles have 4 to 48 rows, groups 4 or 8 keys, blocks 64.
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "q_len, k_len, dim, value", [(1, 1, 1, 1), (70, 200, 33, 7), (100, 129, 64, 80), (25, 64, 5, 48)]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_sizes(page, q_len, k_len, dim, value, dtype, layout) -> None:
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 4, 2, q_len, k_len, dim, value).items()}
    plan, operands = planned(**qkv, mask=tw.causal("end"), kernel="native", tiles=None)
    plan = replace(plan, problem=replace(plan.problem, layout=layout))
    _check(plan, operands)
    d_out, _ = _push(plan, operands, _along(operands))
    assert (d_out.swapaxes(1, 2) if layout == "bshd" else d_out).flags.c_contiguous


@pytest.mark.parametrize("sizes", [(0, 4, 2, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0), (2, 0, 0, 5, 7)], ids=str)
def test_nothing_to_do(page, sizes) -> None:
    plan, operands = planned(**arrays(0, *sizes), kernel="native", tiles=None)
    for got in _push(plan, operands, _along(operands)):
        np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("name", ["everything", "far rows and sinks"])
@pytest.mark.parametrize("moves", PARTS)
def test_each_operand_alone(page, moves, name) -> None:
    plan, operands = planned(**arrays(), **ALL_CASES[name](lambda x: x), kernel="native", tiles=None)
    everything = _along(operands)
    _check(plan, operands, replace(Tangents(), **{moves: getattr(everything, moves)}))
    if moves == "dense":
        for n, one in enumerate(everything.dense):
            still = [None] * len(everything.dense)
            still[n] = one
            _check(plan, operands, Tangents(dense=tuple(still)))


def test_a_part_keeps_the_accumulators() -> None:
    qkv = {key: array.astype("float16") for key, array in arrays().items()}
    plan, operands = planned(**qkv, kernel="native", tiles=None, mask=tw.causal("end"))
    _check(replace(plan, problem=replace(plan.problem, part=True)), operands)


@pytest.mark.parametrize("dtype, place", [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_a_rounded_out_is_not_taken_off(page, dtype, place) -> None:
    # Of two keys, each with a factor of 10: out and what is taken off with it are much larger than the tangent.
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 2, 2, 40, 2, 9, 32).items()}
    plan, operands = planned(**qkv, kernel="native", tiles=None, dropout=tw.Dropout(0.9, seed=1))
    moving = replace(_along(operands), v=None)
    found = _push(plan, operands, moving)
    exact = reference.tangents(reference.attention(plan.problem, operands), moving)
    assert np.all(abs(found[0].astype("float64") - exact[0]) <= place * abs(exact[0]) + 1e-4)


def test_rows_in_parts(monkeypatch) -> None:
    plan, operands = _large(mask=tw.predicate(lambda b, h, i, j: (3 * i + j + h + b) % 4 != 0))
    moving = _along(operands)
    expected = _push(plan, operands, moving)
    monkeypatch.setattr("tilewise.kernels.native.call.BITS_BYTES", 1)
    _same(_push(plan, operands, moving), expected)


def _large(dtype="float32", **options):
    qkv = {key: array.astype(dtype) for key, array in arrays(0, 2, 4, 2, 150, 300, 20, 24).items()}
    return planned(**qkv, kernel="native", tiles=None, **options)


def _seen(rows=150, keys=300, batch=2):
    """Some keys of each row, other ones in each batch row."""
    bounds = np.sort(np.random.default_rng(2).integers(0, keys + 1, (batch, 4, rows, 2)), -1)
    return bounds[..., :1], bounds[..., 1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads(page, dtype) -> None:
    starts, stops = _seen()
    plan, operands = _large(dtype, mask=tw.intervals(starts, stops), sinks=np.ones(4, np.float32))
    moving, answers = _along(operands), []
    for threads in (1, 2, 5):
        tw.set_num_threads(threads)
        answers.append(_push(plan, operands, moving))
    tw.set_num_threads(0)
    _same(answers[1], answers[0])
    _same(answers[2], answers[0])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_row_alone_has_the_bits_it_has_among_others(page, dtype) -> None:
    starts, stops = _seen()
    plan, operands = _large(dtype, mask=tw.intervals(starts, stops))
    moving = _along(operands)
    whole = _push(plan, operands, moving)
    for row in (0, 77, 149):
        rows = np.s_[1:, :, row : row + 1]
        alone = {"q": operands.q[rows], "k": operands.k[1:], "v": operands.v[1:]}
        one = planned(**alone, mask=tw.intervals(starts[rows], stops[rows]), kernel="native", tiles=None)
        given = {"lse": forward(plan, operands)[1][rows], "out": forward(plan, operands)[0][rows]}
        found = tangent(*one, **given, moving=Tangents(moving.q[rows], moving.k[1:], moving.v[1:]))
        _same(found, [x[rows] for x in whole])


def test_the_way_a_mask_is_written(page) -> None:
    starts, stops = _seen()
    j = np.arange(300)
    seen = (j >= starts) & (j < stops)
    plan, operands = _large(mask=tw.intervals(starts, stops))
    moving = _along(operands)
    expected = _push(plan, operands, moving)
    for mask in (tw.dense(seen), tw.predicate(lambda b, h, i, j: seen[b, h, i, j])):
        _same(_push(*_large(mask=mask), moving), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"dropout": tw.Dropout(0.3, 4)}], ids=str)
def test_what_is_masked_cannot_be_seen(page, options, dtype, bad) -> None:
    # Query 3 sees nothing and key 5 is seen by nobody; key 9 is seen by query 8 alone.
    seen = np.random.default_rng(1).random((13, 17)) < 0.6
    seen[3], seen[:, 5], seen[:, 9] = False, False, False
    seen[8, 9] = True
    mask = {"mask": tw.dense(seen), "bias": np.zeros((1, 1, 13, 17)), **options}
    clean = {name: array.astype(dtype) for name, array in arrays().items()}
    plan, operands = planned(**clean, **mask, kernel="native", tiles=None)
    moving = _along(operands)
    expected = _push(plan, operands, moving)

    def spoilt(q, k, v, *keys):
        q, k, v = q.copy(), k.copy(), v.copy()
        q[:, :, 3], k[:, :, keys], v[:, :, keys] = bad, bad, bad
        return q, k, v

    d_bias = np.where(seen, moving.dense[0], bad)
    for keys in ((5,), (5, 9)):
        q, k, v = spoilt(operands.q, operands.k, operands.v, *keys)
        d_q, d_k, d_v = spoilt(moving.q, moving.k, moving.v, *keys)
        found = _push(plan, replace(operands, q=q, k=k, v=v), Tangents(d_q, d_k, d_v, (d_bias,)))
        for got, other in zip(found, expected, strict=True):
            if 9 in keys:
                assert np.isnan(got[:, :, 8].astype("float32")).all()
                got, other = np.delete(got, 8, 2), np.delete(other, 8, 2)
            assert got.tobytes() == other.tobytes()


def test_rows_that_see_nothing_do_not_move() -> None:
    plan, operands = planned(**arrays(), **CASES["sinks"](lambda x: x), kernel="native", tiles=None)
    moving = replace(_along(operands), q=np.full_like(operands.q, np.nan), sinks=np.full(4, np.inf))
    d_out, d_lse = _push(plan, operands, moving)
    empty = forward(plan, operands)[1] == -np.inf
    assert empty.any() and not d_out[empty].any() and not d_lse[empty].any()


def test_errors() -> None:
    plan, operands = planned(**arrays(), kernel="native", tiles=None)
    five = replace(_along(operands), dense=(np.zeros((1, 1, 1, 1)),) * 5)
    with pytest.raises(ValueError, match="bias: at most 4"):
        _push(plan, operands, five)
    for absent in ({"dense": (np.zeros((1, 1, 1, 1)),)}, {"table": np.zeros((1, 1, 29))}, {"sinks": np.zeros(4)}):
        with pytest.raises(ValueError, match="bias, table, sinks: a tangent of what is not there"):
            _push(plan, operands, Tangents(**absent))
