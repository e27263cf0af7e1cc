"""Rows that see few of many keys: tiles are swept one after another, and what they read moves along the keys with them.

A dense mask is swept the other way, so the same mask must give the same bits written either way.
"""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from accuracy import assert_accurate

import tilewise as tw

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("page")

LENGTH = 2300  # more than twice the keys that a page holds at once


def _intervals(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops (LENGTH, ranges) of what each row sees; both widths of integers occur."""
    rows = np.arange(LENGTH, dtype=np.int64 if name == "anywhere" else np.int32)
    begin = np.maximum(rows - 90, 0)
    if name == "behind":
        return begin[:, None], rows[:, None] + 1
    if name == "ahead":
        return rows[:, None], np.minimum(rows + 70, LENGTH)[:, None]
    if name == "first keys too":  # which share their place with other keys now and then
        return np.stack([0 * rows, np.maximum(begin, 5)], 1), np.stack([np.minimum(rows + 1, 5), rows + 1], 1)
    # Every 40 rows look somewhere else, forwards or backwards; some rows see nothing.
    places = np.random.default_rng(5).integers(0, LENGTH - 200, LENGTH // 40 + 1)[rows // 40]
    return places[:, None], (places + rows % 200)[:, None]


def _seen(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    keys = np.arange(LENGTH)
    return ((keys >= starts[..., None]) & (keys < stops[..., None])).any(1)


def _arrays(dtype: str, dim: int, value: int) -> list[np.ndarray]:
    rng = np.random.default_rng(dim)
    shapes = [(1, 2, LENGTH, dim), (1, 1, LENGTH, dim), (1, 1, LENGTH, value)]
    return [(2 * rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def _run(q, k, v, mask, **options):
    return tw.attention(q, k, v, mask=mask, kernel="native", return_lse=True, **options)


def _same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["behind", "ahead", "first keys too", "anywhere"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranges_and_the_same_mask_stored(dtype: str, name: str) -> None:
    q, k, v = _arrays(dtype, 40, 24)
    starts, stops = _intervals(name)
    _same(_run(q, k, v, tw.intervals(starts, stops)), _run(q, k, v, tw.dense(_seen(starts, stops))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_heads_of_which_fewer_keys_are_held(dtype: str) -> None:
    q, k, v = _arrays(dtype, 264, 260)
    starts, stops = _intervals("behind")
    _same(_run(q, k, v, tw.intervals(starts, stops)), _run(q, k, v, tw.dense(_seen(starts, stops))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_do_not_depend_on_their_number(dtype: str) -> None:
    q, k, v = _arrays(dtype, 40, 24)
    starts, stops = _intervals("behind")
    whole = _run(q, k, v, tw.intervals(starts, stops), invariance="row")
    _same(whole, _run(q, k, v, tw.dense(_seen(starts, stops)), invariance="row"))
    rows = slice(1700, 1703)
    alone = _run(q[:, :, rows], k, v, tw.intervals(starts[rows], stops[rows]), invariance="row")
    _same(alone, [np.ascontiguousarray(x[:, :, rows]) for x in whole])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_masked_cannot_be_seen(dtype: str) -> None:
    q, k, v = _arrays(dtype, 40, 24)
    starts, stops = _intervals("behind")
    mask = tw.intervals(starts, stops)
    expected = _run(q, k, v, mask)
    k[:, :, 1030], v[:, :, 1030] = np.nan, np.inf
    out, lse = _run(q, k, v, mask)
    seen = _seen(starts, stops)[:, 1030]
    _same((out[:, :, ~seen], lse[:, :, ~seen]), (expected[0][:, :, ~seen], expected[1][:, :, ~seen]))
    assert np.isnan(out[:, :, seen].astype(np.float32)).all() and np.isnan(lse[:, :, seen]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_the_definition(dtype: str) -> None:
    q, k, v = _arrays(dtype, 40, 24)
    starts, stops = _intervals("first keys too")
    out, lse = _run(q, k, v, tw.intervals(starts, stops))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact, exact_lse = tw.attention(
        *wide, mask=tw.intervals(starts, stops), kernel="reference", return_lse=True, allow_quadratic=True
    )
    assert_accurate("out", out, exact)
    assert_accurate("lse", lse, exact_lse)
