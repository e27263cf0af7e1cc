"""Numbers that parts cannot hold (test_parts.py): not finite, from 2^56 on, or below 2^-100 but for 0.

What has them or sees them takes another way, and must be what other pages make of it; nothing else may change a bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from accuracy import assert_accurate
from support.parts_cases import STRANGE, STRANGE_OF_TYPES, arrays, exact, facts, run, same

import tilewise as tw

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("tile_page")

# -- what is not seen -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["causal", "window", "documents", "bits", "barring bias", "padding", "bias and bits"])
def unseen(request, dtype):
    """A call; options; who sees which of some keys of the first batch row: (Hq, Sq)."""
    q, k, v = arrays(75, 333, 40, 24, dtype=dtype)
    keys = np.array([3, 31, 32, 70, 200, 300, 332])
    if request.param == "padding":
        keys, given, seen = keys[4:], {"mask": tw.lengths(k=np.array([200, 333]))}, np.arange(333) < 200
    elif request.param == "causal":
        keys = keys[5:]  # earlier ones every row sees
        given, told = facts("causal", q, k)
        seen = told["seen"]
    elif request.param == "bias and bits":
        given, told = facts("bits", q, k)
        given, seen = {**given, "bias": np.ones((1, 1, 75, 333), np.float32), "softcap": 3.0}, told["seen"][0]
    else:
        given, told = facts(request.param, q, k)
        seen = told["seen"] if "seen" in told else told["bias"] > -np.inf
        seen = seen[0] if seen.ndim == 4 else seen
    sees = np.broadcast_to(seen, (4, 75, 333))[:, :, keys].any(-1)
    if request.param in ("bits", "barring bias", "bias and bits"):  # where each row sees one key or another
        keys = keys[1:3]
        sees = np.broadcast_to(seen, (4, 75, 333))[:, :, keys].any(-1)
    assert not sees.all()
    return q, k, v, given, keys, sees


@pytest.mark.parametrize("dtype, number", STRANGE_OF_TYPES)
def test_what_is_masked_changes_no_bit(unseen, number) -> None:
    q, k, v, given, keys, sees = unseen
    clean = run(q, k, v, **given)
    k, v = k.copy(), v.copy()
    k[0, :, keys, 7] = v[0, :, keys, 5] = number
    found = run(q, k, v, **given)
    for got, other in zip(found, clean, strict=True):
        assert got[0][~sees].tobytes() == other[0][~sees].tobytes()
        assert got[1].tobytes() == other[1].tobytes()


@pytest.mark.parametrize("dtype, number", STRANGE_OF_TYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"mask": tw.causal("end")}], ids=str)
def test_a_strange_value_stays_in_its_column(options, dtype, number) -> None:
    q, k, v = arrays(45, 150, 24, 40, dtype=dtype)
    clean = run(q, k, v, **options)
    v[:, :, 140, 5] = v[:, :, [20, 33], 21] = number
    found = run(q, k, v, **options)
    others = np.delete(np.arange(40), [5, 21])
    same((found[0][..., others], found[1]), (clean[0][..., others], clean[1]))


@pytest.mark.parametrize("dtype, number", STRANGE_OF_TYPES)
def test_a_strange_query_stays_in_its_row(dtype, number) -> None:
    q, k, v = arrays(75, 150, 24, 40, dtype=dtype)
    clean = run(q, k, v)
    rows = np.array([0, 31, 32, 74])
    q[0, 1, rows, 3] = number
    others = np.ones(q.shape[:3], bool)
    others[0, 1, rows] = False
    same([x[others] for x in run(q, k, v)], [x[others] for x in clean])


# -- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, number", STRANGE_OF_TYPES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_seen_is_as_on_other_pages(monkeypatch, which, dtype, number) -> None:
    q, k, v = given = arrays(70, 200, 40, 24, dtype=dtype)
    largest = number == STRANGE["float32"][3]
    if largest and which == "v":
        number /= 2**12  # sums of the largest number overflow before they are divided, in one order or another
    given["qkv".index(which)][0, 1, 33, 5] = number
    found = run(q, k, v, mask=tw.causal("end"))
    monkeypatch.setenv("TILEWISE_ISA", "avx512")
    expected = run(q, k, v, mask=tw.causal("end"))
    rows = np.zeros(found[1].shape, bool)  # that see it
    if which == "q":
        rows[0, 1, 33] = True
    else:
        rows[0, 2:] = True
    for got, other in zip(found, expected, strict=True):
        kinds = [[np.isnan(x), np.isposinf(x), np.isneginf(x)] for x in (got, other)]
        np.testing.assert_array_equal(*kinds)
        if which != "v":
            assert got[rows].tobytes() == other[rows].tobytes()
    if largest:
        return  # products of the largest number are not finite
    # What is finite is exact, each column by itself.
    with np.errstate(invalid="ignore"):
        truth = exact(q, k, v, seen=np.arange(200) <= np.arange(70)[:, None] + 130)[0]
    finite = np.isfinite(truth).all((0, 1, 2))
    top = np.maximum(1, np.abs(truth[..., finite]).max((0, 1, 2), initial=0))
    assert finite.any() or which != "v"
    assert_accurate("out", (found[0][..., finite] / top).astype(dtype), truth[..., finite] / top)


@pytest.mark.parametrize("options", [{}, {"bias": np.zeros((1, 1, 1, 1))}, {"softcap": 300.0}], ids=str)
def test_large_values_beside_small_probabilities(options) -> None:
    # Parts hold probabilities down to 2^-100, but values of 2^127 count beside smaller ones.
    gaps = np.array([20.0, 60, 69, 70, 75, 80, 85], np.float32)
    q, k, v = (
        np.ones((1, 1, 40, 1), np.float32),
        np.zeros((1, 1, 50, 1), np.float32),
        np.ones((1, 1, 50, 2), np.float32),
    )
    for gap in gaps:
        k[0, 0, 41] = -gap
        for number in (np.inf, -np.inf, np.float32(1.5e38)):
            v[0, 0, 41] = [number, 1]
            out = run(q, k, v, scale=1.0, **options)[0]
            truth = exact(q, k, v, scale=1.0, **{n: x for n, x in options.items() if n == "softcap"})[0]
            top = gap * abs(truth[..., :1]) if np.isfinite(number) else 1  # a score is rounded in proportion
            assert_accurate("out", (out[..., :1] / top).astype(np.float32), truth[..., :1] / top)
            np.testing.assert_allclose(out[..., 1], 1, atol=1e-6)
