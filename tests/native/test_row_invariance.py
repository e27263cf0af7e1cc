"""With invariance="row" a row has the same bits in a prefill, in any chunk of one and alone, on every page."""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest

import tilewise as tw

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("page")

KV_HEADS, D, DV = 2, 37, 21
CHUNKS = (1, 7, 64, 100)
# Query heads per kv head, and tokens: on both sides of a split's 1024 keys, and of the rows that decode takes apart.
SIZES = [(4, 140), (1, 1100)]

END = {"mask": tw.causal("end")}


def _padded(tokens: int) -> dict:
    return {"mask": tw.causal("end") & tw.lengths(k=np.array([min(tokens, 60)]))}


@lru_cache
def _pairs() -> np.ndarray:
    """A number for each pair of a query and a key."""
    return np.random.default_rng(7).standard_normal((1, 1, 1100, 1100)).astype(np.float32)


def _bias(rows: int, tokens: int) -> dict:
    """A dense bias, -inf at random places; the rows asked for are the last."""
    pairs = _pairs()[:, :, tokens - rows : tokens, :tokens]
    return {**END, "bias": np.where(pairs > 1, -np.inf, pairs).astype(np.float32)}


def _bits(rows: int, tokens: int) -> dict:
    return {"mask": tw.causal("end") & tw.dense(_pairs()[:, :, tokens - rows : tokens, :tokens] < 0.7)}


def _dropout(rows: int, tokens: int, heads: int) -> dict:
    """Numbered as a part of 1100 queries and keys, whatever rows are asked for."""
    whole = 1100
    strides = (0, whole * whole, whole, 1)  # 0: every batch row drops the same
    return {**END, "dropout": tw.Dropout(0.3, seed=5, first=(tokens - rows) * whole, strides=strides)}


# What is added to a call of `rows` last queries of `tokens` tokens by `heads` heads.
KINDS = {
    "causal": lambda rows, tokens, heads: END,
    "window": lambda rows, tokens, heads: {"mask": tw.window(50, 0, "end")},
    "alibi": lambda rows, tokens, heads: {**END, "bias": tw.alibi(np.linspace(0.01, 0.5, heads), "end")},
    "padding": lambda rows, tokens, heads: _padded(tokens),
    "softcap": lambda rows, tokens, heads: {**END, "softcap": 3.0},
    "sinks": lambda rows, tokens, heads: {**END, "sinks": np.linspace(-1, 2, heads)},
    "bias": lambda rows, tokens, heads: _bias(rows, tokens),
    "dense mask": lambda rows, tokens, heads: _bits(rows, tokens),
    "dropout": _dropout,
}


@lru_cache
def _arrays(dtype: str, group: int, tokens: int):
    rng = np.random.default_rng(tokens)
    shapes = [(1, group * KV_HEADS, tokens, D), (1, KV_HEADS, tokens, D), (1, KV_HEADS, tokens, DV)]
    return [(3 * rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def _run(q, k, v, kind: str, first: int, last: int):
    """Queries [first, last) with the keys that there are once the last of them has come."""
    options = KINDS[kind](last - first, last, q.shape[1])
    part = q[:, :, first:last], k[:, :, :last], v[:, :, :last]
    return tw.attention(*part, kernel="native", return_lse=True, invariance="row", **options)


def _same(got, expected, rows: slice) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.tobytes() == b[:, :, rows].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("group, tokens", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_chunks_and_decode(dtype, group, tokens, kind) -> None:
    arrays = _arrays(dtype, group, tokens)
    expected = _run(*arrays, kind, 0, tokens)
    # Of a long prompt, rows about the end of a split.
    starts = (0, 40) if tokens < 1024 else (960, tokens - 64)
    for chunk in CHUNKS:
        for start in starts:
            last = min(tokens, start + chunk)
            _same(_run(*arrays, kind, start, last), expected, slice(start, last))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_token_of_a_decode(dtype) -> None:
    arrays = _arrays(dtype, 2, 90)
    expected = _run(*arrays, "causal", 0, 90)
    for n in range(90):
        _same(_run(*arrays, "causal", n, n + 1), expected, slice(n, n + 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_keys_and_threads_that_a_row_does_not_see(dtype) -> None:
    """Batch, keys beyond sight that are not finite, and threads."""
    q, k, v = _arrays(dtype, 2, 1100)
    expected = tw.attention(q, k, v, mask=END["mask"], invariance="row", return_lse=True)
    garbage = np.full((1, KV_HEADS, 1100, D), np.nan, k.dtype)
    more = [np.concatenate([x, garbage[..., : x.shape[3]]], 2) for x in (k, v)]
    two = [np.concatenate([-x, x], 0) for x in (q, *more)]
    for threads in (1, 3):
        tw.set_num_threads(threads)
        for rows in (slice(0, 1100), slice(1030, 1031)):
            stops = np.arange(1, 1101)[rows, None]
            mask = tw.intervals(np.zeros_like(stops)[None, None], stops[None, None])
            got = tw.attention(two[0][:, :, rows], *two[1:], mask=mask, invariance="row", return_lse=True)
            _same([x[1:] for x in got], expected, rows)
    tw.set_num_threads(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_in_a_batch_and_with_more_keys(dtype) -> None:
    """Keys that no row sees, another batch row before it, and one row of many."""
    q, k, v = _arrays(dtype, 2, 1100)
    options = {"kernel": "native", "return_lse": True, "invariance": "row"}
    expected = tw.attention(q, k, v, **options, **_dropout(1100, 1100, 4))
    stops = np.arange(1, 1101)[None, None, :, None]
    for rows in (slice(0, 1100), slice(500, 530), slice(1030, 1031)):
        part = [np.concatenate([-x, x], 0) for x in (q[:, :, rows], k, v)]
        mask = tw.intervals(np.zeros_like(stops)[:, :, rows], stops[:, :, rows])
        dropout = _dropout(rows.stop - rows.start, rows.stop, 4)["dropout"]
        got = tw.attention(*part, **options, mask=mask, dropout=dropout)
        _same([x[1:] for x in got], expected, rows)


def test_dropout_must_be_numbered_by_a_whole() -> None:
    q, k, v = _arrays("float32", 2, 90)
    with pytest.raises(ValueError, match="^invariance: got 'row' with dropout"):
        tw.attention(q, k, v, dropout=tw.Dropout(0.3, seed=5), invariance="row")


def test_signs_of_zeros() -> None:
    """A negative sum rescaled to nothing stays -0 where unseen keys are skipped, and turns 0 where they are added."""
    q = np.ones((1, 1, 40, 1), np.float32)
    k = np.zeros((1, 1, 24, 1), np.float32)
    k[0, 0, 8] = 1000
    v = np.full((1, 1, 24, 1), -0.0, np.float32)
    v[0, 0, 0], v[0, 0, 16:] = -1, 1
    stops = np.full((1, 1, 40, 1), 16)
    alone = tw.attention(q, k, v, mask=tw.intervals(0 * stops, stops), kernel="native", invariance="row")
    stops[0, 0, 1] = 24
    beside = tw.attention(q, k, v, mask=tw.intervals(0 * stops, stops), kernel="native", invariance="row")
    assert alone[0, 0, 0].tobytes() == beside[0, 0, 0].tobytes()
