"""Dense masks are read alike however they lie in memory, and calls of few keys have the bits of calls of many."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from accuracy import assert_accurate

import tilewise as tw

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("page")


@pytest.fixture(params=["float32", "float64", "float16", "bfloat16"])
def dtype(request) -> str:
    return request.param


def _arrays(q_len: int, k_len: int, dtype: str, dim: int = 40, value: int = 24) -> list[np.ndarray]:
    rng = np.random.default_rng(k_len)
    shapes = [(1, 2, q_len, dim), (1, 2, k_len, dim), (1, 2, k_len, value)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _run(q, k, v, mask=None):
    return tw.attention(q, k, v, mask=mask, kernel="native", return_lse=True)


def _check(got, q, k, v, mask=None) -> None:
    wide = [x.astype("float64") for x in (q, k, v)]
    exact = tw.attention(*wide, mask=mask, kernel="reference", return_lse=True, allow_quadratic=True)
    assert_accurate("out", got[0], exact[0])
    assert_accurate("lse", got[1], exact[1])


def _same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.tobytes() == b.tobytes()


def _laid_out(seen: np.ndarray) -> dict[str, np.ndarray]:
    """The same booleans (1, H, Sq, Sk) in other places of memory."""
    _, heads, rows, keys = seen.shape
    wide = np.ones((1, heads, rows, 3 * keys + 5), bool)
    wide[..., 2 : 2 + 3 * keys : 3] = seen
    part = np.ones((1, heads, rows, keys + 7), bool)
    part[..., 3 : 3 + keys] = seen
    numbers = np.where(seen, np.arange(keys) % 255 + 1, 0).astype(np.uint8)
    return {
        "keys far apart": wide[..., 2 : 2 + 3 * keys : 3],
        "part of a row": part[..., 3 : 3 + keys],
        "queries beside each other": np.ascontiguousarray(seen.swapaxes(2, 3)).swapaxes(2, 3),
        "keys backwards": np.ascontiguousarray(seen[..., ::-1])[..., ::-1],
        "bytes other than 1": numbers.view(bool),
    }


@pytest.mark.parametrize("k_len", [300, 64])
def test_places_in_memory(dtype, k_len) -> None:
    q, k, v = _arrays(90, k_len, dtype)
    seen = np.random.default_rng(1).random((1, 2, 90, k_len)) < 0.6
    expected = _run(q, k, v, tw.dense(seen))
    _check(expected, q, k, v, tw.dense(seen))
    for name, mask in _laid_out(seen).items():
        got = _run(q, k, v, tw.dense(mask))
        assert [x.tobytes() for x in got] == [x.tobytes() for x in expected], name


def test_broadcast_axes(dtype) -> None:
    q, k, v = _arrays(90, 300, dtype)
    rng = np.random.default_rng(2)
    for shape in [(1, 1, 90, 300), (1, 1, 1, 300), (1, 2, 90, 1)]:
        mask = rng.random(shape) < 0.6
        whole = np.ascontiguousarray(np.broadcast_to(mask, (1, 2, 90, 300)))
        _same(_run(q, k, v, tw.dense(mask)), _run(q, k, v, tw.dense(whole)))


def test_dense_and_ranges_together(dtype) -> None:
    q, k, v = _arrays(150, 300, dtype)
    mask = np.random.default_rng(3).random((1, 1, 150, 300)) < 0.6
    place = np.arange(150)[:, None] + 150
    window = (np.arange(300) >= place - 70) & (np.arange(300) <= place + 30)
    _same(_run(q, k, v, tw.dense(mask) & tw.window(70, 30, "end")), _run(q, k, v, tw.dense(mask & window)))


def test_scores_of_barred_keys_are_not_seen(dtype) -> None:
    """However large they are: a row's reference is raised by what it sees alone."""
    q, k, v = _arrays(90, 200, dtype)
    seen = np.random.default_rng(4).random((1, 1, 90, 200)) < 0.6
    seen[..., 5::7] = False
    expected = _run(q, k, v, tw.dense(seen))
    for garbage in (1e4, -1e4, np.inf, np.nan):
        other = k.copy()
        other[:, :, 5::7] = garbage
        _same(_run(q, other, v, tw.dense(seen)), expected)


@pytest.mark.parametrize("k_len", [1, 13, 16, 17, 48, 77, 80, 128])
def test_few_keys(dtype, k_len) -> None:
    """An item of many tiles and one chunk of keys, against the same keys as the first of more."""
    q, k, v = _arrays(600, 300, dtype)
    expected = _run(q, k, v, tw.lengths(k=np.array([k_len])))
    got = _run(q, k[:, :, :k_len], v[:, :, :k_len])
    _same(got, expected)
    _same(_run(q[:, :, 100:350], k[:, :, :k_len], v[:, :, :k_len]), [x[:, :, 100:350] for x in expected])
    _check(got, q, k[:, :, :k_len], v[:, :, :k_len])


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 15, 33, 40, 65])
def test_widths(dtype, dim) -> None:
    """Rows are turned into lanes and back by pieces whose last is ragged."""
    q, k, v = _arrays(70, 50, dtype, dim, dim)
    _check(_run(q, k, v), q, k, v)
