"""A row's bits depend on the row alone: not on threads, batch, other rows, the way a mask is written, or padding."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest

import tilewise as tw

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("page")

SIZES = [(1, 2, 1, 3000), (3, 1, 33, 130), (2, 3, 70, 333), (4, 2, 5, 1500), (1, 1, 150, 64)]  # group, kv, Sq, Sk


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(params=SIZES, ids=str)
def call(request, dtype):
    """q, k, v and per-row key intervals (2, Hq, Sq, 1)."""
    group, kv, q_len, k_len = request.param
    rng = np.random.default_rng(q_len)
    shapes = [(2, group * kv, q_len, 40), (2, kv, k_len, 40), (2, kv, k_len, 24)]
    q, k, v = ((3 * rng.standard_normal(shape)).astype(dtype) for shape in shapes)
    bounds = np.sort(rng.integers(0, k_len + 1, (2, group * kv, q_len, 2)), -1)
    return q, k, v, bounds[..., :1], bounds[..., 1:]


def _run(q, k, v, mask, **options):
    return tw.attention(q, k, v, mask=mask, kernel="native", return_lse=True, **options)


def _same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.tobytes() == b.tobytes()


def test_threads(call) -> None:
    q, k, v, starts, stops = call
    answers = []
    for threads in (1, 2, 5):
        tw.set_num_threads(threads)
        answers.append(_run(q, k, v, tw.intervals(starts, stops)))
    tw.set_num_threads(0)
    _same(answers[1], answers[0])
    _same(answers[2], answers[0])


def test_the_way_a_mask_is_written(call) -> None:
    q, k, v, starts, stops = call
    expected = _run(q, k, v, tw.intervals(starts, stops))
    j = np.arange(k.shape[2])
    seen = (j >= starts) & (j < stops)
    _same(_run(q, k, v, tw.dense(seen)), expected)
    _same(_run(q, k, v, tw.predicate(lambda b, h, i, j: seen[b, h, i, j])), expected)
    _same(_run(q, k, v, None, bias=np.where(seen, 0, -np.inf).astype(np.float32)), expected)


def test_batch(call) -> None:
    q, k, v, starts, stops = call
    out, lse = _run(q, k, v, tw.intervals(starts, stops))
    _same(_run(q[1:], k[1:], v[1:], tw.intervals(starts[1:], stops[1:])), (out[1:], lse[1:]))


def test_padding(call) -> None:
    q, k, v, starts, stops = call
    padding = np.full((2, k.shape[1], 200, 40), np.nan, k.dtype)
    longer = np.concatenate([k, padding], 2), np.concatenate([v, padding[..., :24]], 2)
    _same(_run(q, *longer, tw.intervals(starts, stops)), _run(q, k, v, tw.intervals(starts, stops)))


def test_other_rows(call) -> None:
    q, k, v, starts, stops = call
    row = q.shape[2] // 2
    out, lse = _run(q, k, v, tw.intervals(starts, stops))
    other_starts, other_stops = np.zeros_like(starts), np.full_like(stops, k.shape[2])
    other_starts[:, :, row], other_stops[:, :, row] = starts[:, :, row], stops[:, :, row]
    changed = np.where(np.arange(q.shape[2])[:, None] == row, q, (50 * q).astype(q.dtype))
    got, got_lse = _run(changed, k, v, tw.intervals(other_starts, other_stops))
    _same((got[:, :, row], got_lse[:, :, row]), (out[:, :, row], lse[:, :, row]))


@pytest.mark.parametrize("reach", [200, 70])
def test_beside_a_diagonal(reach, dtype) -> None:
    """Rows that see a group of keys have the same bits whether or not all of their half of the tile sees some of it."""
    rng = np.random.default_rng(reach)
    q, k, v = (rng.standard_normal((1, 2, 200, width)).astype(dtype) for width in (64, 64, 40))
    v[:, :, 150] = np.nan
    row = np.arange(200)
    starts, stops = (np.broadcast_to(x[:, None], (1, 2, 200, 1)) for x in (np.maximum(row - reach, 0), row + 1))
    out, lse = expected = _run(q, k, v, tw.intervals(starts, stops))
    blind = (row < 150) | (starts[0, 0, :, 0] > 150)
    assert (np.isfinite(out.astype("float32")).all((0, 1, 3)) == blind).all()
    _same(_run(q[:, :, 5:], k, v, tw.intervals(starts[:, :, 5:], stops[:, :, 5:])), [x[:, :, 5:] for x in expected])
    far = row // 4 % 2 == 1  # these see all, so every half sees all
    wide = np.where(far[:, None], 0, starts), np.where(far[:, None], 200, stops)
    got, got_lse = _run(q, k, v, tw.intervals(*wide))
    _same((got[:, :, ~far], got_lse[:, :, ~far]), (out[:, :, ~far], lse[:, :, ~far]))
