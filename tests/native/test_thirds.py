"""float32 in tile registers, in parts of bfloat16: as near to float64 as float32 must be, and blind to what is masked.

Parts cannot hold every number: those that are not finite, from 2^56 on, or below 2^-100 but for 0, take another way
("strange" here). A problem is multiplied in parts if its kv heads have more than 8 rows (query heads of the group times
queries), not both 64 of these or fewer and more than 1024 keys, and rows may depend on their number. So the numbers of
rows and keys may change bits across these borders, as they do across those of splits; nothing else may.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from accuracy import assert_accurate

import tilewise as tw

_native = pytest.importorskip("tilewise._native")
PAGE = "amx_bf16"
STRANGE = [np.nan, np.inf, -np.inf, np.finfo(np.float32).max, 2.0**56, -1e30, 1e-38, -1e-45, 2.0**-101]


@pytest.fixture(autouse=True)
def page(monkeypatch) -> None:
    found = _native.build_info()
    if PAGE not in found["supported_pages"]:
        pytest.skip(found["refused_pages"].get(PAGE, "no AMX-BF16 in this processor or compiler"))
    monkeypatch.setenv("TILEWISE_ISA", PAGE)


def _arrays(q_len: int, k_len: int, dim: int, value: int, heads=(4, 2), batch: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(q_len * k_len)
    shapes = [(heads[0], q_len, dim), (heads[1], k_len, dim), (heads[1], k_len, value)]
    return [rng.standard_normal((batch, *shape)).astype(np.float32) for shape in shapes]


def _run(q, k, v, **options):
    return tw.attention(q, k, v, kernel="native", return_lse=True, **options)


def _exact(q, k, v, seen=True, scale=None, softcap=None, bias=0.0, sinks=None, dtype: Any = float):
    """Out and lse by the definition; in float64, or as plain attention in float32."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.astype(dtype) for x in (q, np.repeat(k, group, 1), np.repeat(v, group, 1)))
    s = dtype(q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    s = (softcap * np.tanh(s / softcap) if softcap else s) + np.asarray(bias, dtype)
    s = np.where(seen, s, dtype(-np.inf))
    some = ~(s == -np.inf).all(-1, keepdims=True)
    extra = np.full((q.shape[1], 1, 1), -np.inf) if sinks is None else np.reshape(sinks, (-1, 1, 1))
    extra = extra.astype(dtype)
    top = np.where(some, np.maximum(s.max(-1, keepdims=True), extra), dtype(0))
    p = np.exp(s - top)
    total = np.where(some, p.sum(-1, keepdims=True) + np.exp(extra - top), dtype(1))
    lse = np.where(some, top + np.log(total), -np.inf)[..., 0]
    return np.where(some, p / total, dtype(0)) @ v, lse


def _same(found, expected) -> None:
    for got, other in zip(found, expected, strict=True):
        assert got.tobytes() == other.tobytes()


def _accurate(found, exact, plain=None) -> None:
    assert_accurate("out", found[0], exact[0], plain)
    assert_accurate("lse", found[1], exact[1])


# -- how near to float64 ----------------------------------------------------------------------------------------------


def _facts(name: str, q, k) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the call, and the same for `_exact`."""
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    rng = np.random.default_rng(q_len)
    i, j = np.arange(q_len)[:, None], np.arange(k_len)
    bits = rng.random((batch, 1, q_len, k_len)) < 0.4
    rows, keys = (np.sort(rng.integers(0, 4, (batch, n)), -1) for n in (q_len, k_len))
    dense = 5 * rng.standard_normal((1, heads, q_len, k_len)).astype(np.float32)
    barred = np.where(bits, 0, -np.inf).astype(np.float32)
    table = rng.standard_normal((heads, q_len + k_len - 1)).astype(np.float32)
    sinks = 9 * rng.standard_normal(heads).astype(np.float32)
    end = i + k_len - q_len
    return {
        "plain": ({}, {}),
        "causal": ({"mask": tw.causal("end")}, {"seen": j <= end}),
        "window": ({"mask": tw.window(40, 7, "end")}, {"seen": (j >= end - 40) & (j <= end + 7)}),
        "documents": (
            {"mask": tw.documents(rows, keys)},
            {"seen": rows[:, None, :, None] == keys[:, None, None]},
        ),
        "bits": ({"mask": tw.dense(bits)}, {"seen": bits}),
        "bias": ({"bias": dense}, {"bias": dense}),
        "barring bias": ({"bias": barred}, {"bias": barred}),
        "table": ({"bias": tw.relative(table)}, {"bias": table[:, j - i + q_len - 1]}),
        "softcap": ({"softcap": 2.0, "scale": 1.0}, {"softcap": 2.0, "scale": 1.0}),
        "sinks": ({"sinks": sinks, "mask": tw.causal("end")}, {"sinks": sinks, "seen": j <= end}),
        "negative scale": ({"scale": -0.4}, {"scale": -0.4}),
        "scale 0": ({"scale": 0.0}, {"scale": 0.0}),
        "tiny scale": ({"scale": 1e-40}, {"scale": 1e-40}),
    }[name]


FACTS = ["plain", "causal", "window", "documents", "bits", "bias", "barring bias", "table", "softcap", "sinks"]
SHAPES = [
    (9, 1, 1, 1), (33, 31, 5, 300), (200, 77, 16, 33), (70, 1025, 40, 16), (32, 1024, 64, 80), (65, 300, 300, 5),
    (17, 130, 512, 256), (100, 64, 96, 512), (11, 513, 200, 1),
]  # fmt: skip


@pytest.mark.parametrize("name", [*FACTS, "negative scale", "scale 0", "tiny scale"])
def test_accuracy(name) -> None:
    for number, shape in enumerate(SHAPES):
        q, k, v = _arrays(*shape, heads=[(4, 2), (3, 1), (2, 2)][number % 3])
        given, told = _facts(name, q, k)
        _accurate(_run(q, k, v, **given), _exact(q, k, v, **told), _exact(q, k, v, **told, dtype=np.float32)[0])
        turned = [x.swapaxes(1, 2).copy() for x in (q, k, v)]
        out, lse = _run(*turned, layout="bshd", **given)
        _same((out.swapaxes(1, 2), lse), _run(q, k, v, **given))


def test_dropout() -> None:
    q, k, v = _arrays(70, 300, 40, 33)
    options: dict[str, Any] = {"dropout": tw.Dropout(0.3, seed=5), "mask": tw.causal("end"), "return_lse": True}
    exact = tw.attention(*(x.astype(float) for x in (q, k, v)), kernel="reference", allow_quadratic=True, **options)
    found = tw.attention(q, k, v, kernel="native", **options)
    _accurate(found, exact)


@pytest.mark.parametrize("spread", ["columns", "keys"])
def test_values_of_every_size(spread) -> None:
    """Each column is as exact as if it were alone; all sizes are on both sides of what parts can hold."""
    q, k, v = _arrays(70, 300, 64, 41)
    size = (10.0 ** np.linspace(-34, 34, 41)).astype(np.float32)
    v *= size if spread == "columns" else np.resize(size, (300, 1))
    exact = _exact(q, k, v)
    found = _run(q, k, v)
    top = np.abs(exact[0]).max((0, 1, 2))
    assert_accurate("out", (found[0] / top).astype(np.float32), exact[0] / top)
    assert_accurate("lse", found[1], exact[1])


@pytest.mark.parametrize("size", [1e-33, 1e-29, 1e-20, 1e10, 1e16, 1e20, 1e35])
def test_values_of_one_size(size) -> None:
    q, k, v = _arrays(40, 200, 33, 24)
    v = v * np.float32(size)
    out, lse = _run(q, k, v, mask=tw.causal("end"))
    exact = _exact(q, k, v, seen=np.arange(200) <= np.arange(40)[:, None] + 160)
    _accurate(((out / size).astype(np.float32), lse), (exact[0] / size, exact[1]))


@pytest.mark.parametrize("decades", [8, 17, 30])
def test_large_numbers_beside_small_ones(decades) -> None:
    q, k, v = _arrays(40, 200, 80, 24)
    _accurate(_run(q * np.float32(10**decades), k * np.float32(10**-decades), v), _exact(q, k, v))
    size = (10.0 ** np.linspace(-decades, decades, 80)).astype(np.float32)
    q, k = q * size, k / size
    _accurate(_run(q, k, v), _exact(q, k, v))


@pytest.mark.parametrize("scale", [1e10, 1e23, 1e25, 1e30, 1e36, 1e38])
def test_scales_that_make_scores_of_tiny_products(scale) -> None:
    # Tile registers make 0 of what is below 2^-126.
    q, k, v = _arrays(40, 200, 16, 24)
    q, k = (x * np.float32((0.3 / scale) ** 0.5) for x in (q, k))
    _accurate(_run(q, k, v, scale=scale), _exact(q, k, v, scale=scale))


@pytest.mark.parametrize("scale", [1e25, 1e36, 1e37])
def test_derivatives_at_such_scales(scale) -> None:
    torch = pytest.importorskip("torch")
    arrays = _arrays(40, 200, 16, 24)
    sizes = [np.float32((0.3 / scale) ** 0.5)] * 2 + [np.float32(1)]
    given = [torch.from_numpy(x * size) for x, size in zip(arrays, sizes, strict=True)]
    along = [torch.flip(x, (-1,)) for x in given]

    def plain(q, k, v):
        return torch.softmax(q @ k.repeat_interleave(2, 1).mT * scale, -1) @ v.repeat_interleave(2, 1)

    def derivatives(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        gradients = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
        tangent = torch.func.jvp(function, tuple(x.to(dtype) for x in given), tuple(x.to(dtype) for x in along))[1]
        return [*(x * float(size) for x, size in zip(gradients, sizes, strict=True)), tangent]  # of numbers near 1

    found = derivatives(lambda *x: tw.attention(*x, scale=scale, kernel="native"), torch.float32)
    for name, got, exact in zip("qkvt", found, derivatives(plain, torch.float64), strict=True):
        assert_accurate(name, got, exact)


def test_probabilities() -> None:
    q, k, _ = _arrays(70, 300, 64, 1)
    v = np.broadcast_to(np.eye(300, dtype=np.float32), (2, 2, 300, 300)).copy()
    found = _run(3 * q, k, v)
    _accurate(found, _exact(3 * q, k, v))
    np.testing.assert_allclose(found[0].sum(-1), 1, atol=2e-6)


# -- what is not seen -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["causal", "window", "documents", "bits", "barring bias", "padding", "bias and bits"])
def unseen(request):
    """A call; options; who sees which of some keys of the first batch row: (Hq, Sq)."""
    q, k, v = _arrays(75, 333, 40, 24)
    keys = np.array([3, 31, 32, 70, 200, 300, 332])
    if request.param == "padding":
        keys, given, seen = keys[4:], {"mask": tw.lengths(k=np.array([200, 333]))}, np.arange(333) < 200
    elif request.param == "causal":
        keys = keys[5:]  # earlier ones every row sees
        given, told = _facts("causal", q, k)
        seen = told["seen"]
    elif request.param == "bias and bits":
        given, told = _facts("bits", q, k)
        given, seen = {**given, "bias": np.ones((1, 1, 75, 333), np.float32), "softcap": 3.0}, told["seen"][0]
    else:
        given, told = _facts(request.param, q, k)
        seen = told["seen"] if "seen" in told else told["bias"] > -np.inf
        seen = seen[0] if seen.ndim == 4 else seen
    sees = np.broadcast_to(seen, (4, 75, 333))[:, :, keys].any(-1)
    if request.param in ("bits", "barring bias", "bias and bits"):  # where each row sees one key or another
        keys = keys[1:3]
        sees = np.broadcast_to(seen, (4, 75, 333))[:, :, keys].any(-1)
    assert not sees.all()
    return q, k, v, given, keys, sees


@pytest.mark.parametrize("number", STRANGE)
def test_what_is_masked_changes_no_bit(unseen, number) -> None:
    q, k, v, given, keys, sees = unseen
    clean = _run(q, k, v, **given)
    k, v = k.copy(), v.copy()
    k[0, :, keys, 7] = v[0, :, keys, 5] = number
    found = _run(q, k, v, **given)
    for got, other in zip(found, clean, strict=True):
        assert got[0][~sees].tobytes() == other[0][~sees].tobytes()
        assert got[1].tobytes() == other[1].tobytes()


@pytest.mark.parametrize("number", STRANGE)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"mask": tw.causal("end")}], ids=str)
def test_a_strange_value_stays_in_its_column(options, number) -> None:
    q, k, v = _arrays(45, 150, 24, 40)
    clean = _run(q, k, v, **options)
    v[:, :, 140, 5] = v[:, :, [20, 33], 21] = number
    found = _run(q, k, v, **options)
    others = np.delete(np.arange(40), [5, 21])
    _same((found[0][..., others], found[1]), (clean[0][..., others], clean[1]))


@pytest.mark.parametrize("number", STRANGE)
def test_a_strange_query_stays_in_its_row(number) -> None:
    q, k, v = _arrays(75, 150, 24, 40)
    clean = _run(q, k, v)
    rows = np.array([0, 31, 32, 74])
    q[0, 1, rows, 3] = number
    others = np.ones(q.shape[:3], bool)
    others[0, 1, rows] = False
    _same([x[others] for x in _run(q, k, v)], [x[others] for x in clean])


# -- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STRANGE)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_seen_is_as_on_other_pages(monkeypatch, which, number) -> None:
    q, k, v = arrays = _arrays(70, 200, 40, 24)
    if number == STRANGE[3] and which == "v":
        number /= 2**12  # sums of the largest number overflow before they are divided, in one order or another
    arrays["qkv".index(which)][0, 1, 33, 5] = number
    found = _run(q, k, v, mask=tw.causal("end"))
    monkeypatch.setenv("TILEWISE_ISA", "avx512")
    expected = _run(q, k, v, mask=tw.causal("end"))
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
    if number == STRANGE[3]:
        return  # products of the largest number are not finite
    # What is finite is exact, each column by itself.
    with np.errstate(invalid="ignore"):
        exact = _exact(q, k, v, seen=np.arange(200) <= np.arange(70)[:, None] + 130)
    finite = np.isfinite(exact[0]).all((0, 1, 2))
    top = np.maximum(1, np.abs(exact[0][..., finite]).max((0, 1, 2), initial=0))
    assert finite.any() or which != "v"
    assert_accurate("out", (found[0][..., finite] / top).astype(np.float32), exact[0][..., finite] / top)


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
            out = _run(q, k, v, scale=1.0, **options)[0]
            exact = _exact(q, k, v, scale=1.0, **{n: x for n, x in options.items() if n == "softcap"})[0]
            top = gap * abs(exact[..., :1]) if np.isfinite(number) else 1  # a score is rounded in proportion
            assert_accurate("out", (out[..., :1] / top).astype(np.float32), exact[..., :1] / top)
            np.testing.assert_allclose(out[..., 1], 1, atol=1e-6)
