"""Every kernel page that this host runs computes the same definition, and TILEWISE_ISA chooses among them."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest

import tilewise as tw

_native = pytest.importorskip("tilewise._native")
# Pages that multiply bfloat16 by the machine's dot product: probabilities are rounded to bfloat16 for it, and it takes
# denormal numbers for 0.
DOT_PRODUCT = {"avx512_bf16", "amx_bf16", "neon_bf16"}


def _arrays(dtype: str, q_len: int, k_len: int, dim: int, value: int, heads: int = 4, kv: int = 2, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = [(2, heads, q_len, dim), (2, kv, k_len, dim), (2, kv, k_len, value)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _check(q, k, v, **options) -> None:
    got, lse = tw.attention(q, k, v, kernel="native", return_lse=True, **options)
    wide = [array.astype("float64") for array in (q, k, v)]
    expected, expected_lse = tw.attention(*wide, kernel="reference", return_lse=True, allow_quadratic=True, **options)
    floor = 1e-13 if q.dtype == np.float64 else 2e-6
    # Half types are rounded once, from float32: half a unit of the last place.
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(q.dtype.name, 0.0)
    weights = 0.0  # what the rounding of every probability may add up to
    if q.dtype.name == "bfloat16" and _native.isa() in DOT_PRODUCT:
        sizes = tw.attention(*wide[:2], np.abs(wide[2]), kernel="reference", allow_quadratic=True, **options)
        weights = 1.01 * unit * np.where(np.isfinite(sizes), sizes, 0)
    assert got.dtype == q.dtype
    got = got.astype(expected.dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    largest = max(1.0, np.nanmax(np.abs(expected), initial=0.0))
    allowed = weights + 1.001 * unit * np.abs(expected) + 2 * floor * largest
    assert np.all((np.abs(got - expected) <= allowed) | (got == expected) | np.isnan(expected))
    np.testing.assert_allclose(lse, expected_lse, rtol=4 * floor, atol=4 * floor)


# Tiles have 4 to 32 rows, groups 4 or 8 keys, blocks 64, chunks 64 or 128, splits 1024: one size on either side.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "q_len, k_len", [(1, 1), (1, 1100), (2, 65), (5, 128), (17, 63), (33, 129), (70, 200), (8, 2049)]
)
@pytest.mark.parametrize("dim, value", [(1, 1), (7, 33), (64, 64), (129, 20)])
def test_sizes(page, dtype, q_len, k_len, dim, value) -> None:
    _check(*_arrays(dtype, q_len, k_len, dim, value))


def _spoilt(shape: tuple[int, ...]) -> np.ndarray:
    bias = np.random.default_rng(1).standard_normal(shape)
    bias[..., ::5] = -np.inf
    bias[..., shape[2] // 2, :] = -np.inf
    return bias


OPTIONS = {
    "causal": lambda n, m: {"mask": tw.causal("end")},
    "window and sinks": lambda n, m: {"mask": tw.window(20, 3, "end") | tw.prefix(4)},
    "scattered documents": lambda n, m: {"mask": tw.documents(np.arange(n) % 3, np.arange(m) % 4)},
    "lengths": lambda n, m: {"mask": tw.lengths(k=np.array([m, m // 3]))},
    "dense": lambda n, m: {"mask": tw.dense(np.random.default_rng(2).random((2, 1, n, m)) < 0.5)},
    "predicate": lambda n, m: {"mask": tw.predicate(lambda b, h, i, j: (3 * i + j + h + b) % 4 != 0)},
    "nothing seen": lambda n, m: {"mask": tw.dense(np.zeros((n, m), bool)), "sinks": np.ones(4)},
    "bias": lambda n, m: {"bias": _spoilt((1, 4, n, m))},
    "alibi": lambda n, m: {"bias": tw.alibi(np.array([1.0, 0.5, 0.25, 0.1]), "end"), "mask": tw.causal("end")},
    "softcap": lambda n, m: {"softcap": 3.0, "mask": tw.causal("end")},
    "sinks": lambda n, m: {"sinks": np.array([0.0, 40.0, -40.0, -np.inf])},
    "dropout": lambda n, m: {"dropout": tw.Dropout(0.3, seed=5, stream=2)},
    "all dropped": lambda n, m: {"dropout": tw.Dropout(1.0, seed=5)},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("q_len, k_len", [(1, 70), (3, 1300), (40, 200)])
def test_facts(page, name, q_len, k_len, dtype) -> None:
    _check(*_arrays(dtype, q_len, k_len, 24, 40), **OPTIONS[name](q_len, k_len))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", [140, 149])
@pytest.mark.parametrize("q_len", [2, 50])
def test_what_is_masked_cannot_be_seen(page, q_len, key, dtype) -> None:
    q, k, v = _arrays(dtype, q_len, 150, 16, 24)
    clean = tw.attention(q, k, v, mask=tw.window(9, 0, "end"), kernel="native")
    k[:, :, key], v[:, :, key] = np.inf, np.nan
    got = tw.attention(q, k, v, mask=tw.window(9, 0, "end"), kernel="native")
    rows = np.arange(q_len) + 150 - q_len
    sees = (rows >= key) & (rows - 9 <= key)
    assert got[:, :, ~sees].tobytes() == clean[:, :, ~sees].tobytes()
    assert np.isnan(got[:, :, sees].astype("float32")).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [24, 64])
@pytest.mark.parametrize("q_len", [1, 3, 60])
def test_a_value_that_is_not_finite_stays_in_its_column(page, q_len, value, dtype) -> None:
    q, k, v = _arrays(dtype, q_len, 150, 16, value)
    clean = tw.attention(q, k, v, kernel="native")
    v[:, :, 20, 5], v[:, :, 77, 8], v[:, :, 149, 9] = np.inf, np.nan, -np.inf
    got = tw.attention(q, k, v, kernel="native")
    others = np.delete(np.arange(value), [5, 8, 9])
    assert got[..., others].tobytes() == clean[..., others].tobytes()
    assert (got[..., 5] == np.inf).all() and np.isnan(got[..., 8].astype("float32")).all()
    assert (got[..., 9] == -np.inf).all()


@pytest.mark.parametrize("q_len", [3, 80])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
def test_what_a_bias_of_minus_infinity_bars_cannot_be_seen(page, rubbish, dtype, q_len) -> None:
    """Be it in the key or the value, forward and backward; pairs beside it keep their bits."""
    torch = pytest.importorskip("torch")
    clean = [torch.tensor(x.astype("float32")).to(getattr(torch, dtype)) for x in _arrays(dtype, q_len, 150, 24, 24)]
    bias = torch.zeros(1, 4, q_len, 150)
    bias[..., 5] = bias[..., 140] = -np.inf
    bias[:, 1, ::2, 70] = -np.inf  # and one that other rows do see
    dirty = [x.clone() for x in clean]
    dirty[1][:, :, [5, 140]] = rubbish
    dirty[2][:, :, [5, 140]] = rubbish
    found = []
    for q, k, v in (clean, dirty):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = tw.attention(*leaves, bias=bias, return_lse=True, kernel="native")
        found.append([out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), leaves)])
    for name, one, other in zip(("out", "lse", "d_q", "d_k", "d_v"), *found, strict=True):
        assert torch.isfinite(other).all(), name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("shape", [(0, 4, 2, 5, 7), (2, 0, 0, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0)])
def test_empty(page, shape) -> None:
    batch, heads, kv, q_len, k_len = shape
    q, k, v = (np.ones(s, np.float32) for s in [(batch, heads, q_len, 8), (batch, kv, k_len, 8), (batch, kv, k_len, 6)])
    out, lse = tw.attention(q, k, v, kernel="native", return_lse=True)
    np.testing.assert_array_equal(out, np.zeros((batch, heads, q_len, 6)))
    np.testing.assert_array_equal(lse, np.full((batch, heads, q_len), -np.inf))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("q_len", [1, 40])
def test_half_types_are_read_exactly(page, dtype, q_len) -> None:
    # One key: each row of the output is the value, whichever of the 65,536 numbers stand there.
    values = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, 1, 1, -1)
    expected = values.astype("float32")
    if dtype == "bfloat16" and page in DOT_PRODUCT:
        expected[np.abs(expected) < np.finfo("float32").tiny] = 0
    q, k = np.zeros((1, 1, q_len, 3), dtype), np.zeros((1, 1, 1, 3), dtype)
    got = tw.attention(q, k, values, kernel="native").astype("float32")
    np.testing.assert_array_equal(got, np.broadcast_to(expected, got.shape))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_to_nearest_even(page, dtype) -> None:
    # The mean of a number and the next larger one is a tie.
    bits = np.arange(0x7F80 if dtype == "bfloat16" else 0x7C00, dtype=np.uint16)
    if dtype == "bfloat16" and page in DOT_PRODUCT:
        bits = bits[bits >= 0x80]  # the smallest normal number
    values = np.stack([bits, bits + np.uint16(1)]).view(dtype)
    values = np.concatenate([values, -values], 1)[None, None]
    q, k = np.zeros((1, 1, 40, 3), dtype), np.zeros((1, 1, 2, 3), dtype)
    with np.errstate(over="ignore"):
        expected = values.astype("float32").mean(2, dtype="float32", keepdims=True).astype(dtype)
    got = tw.attention(q, k, values, kernel="native")
    np.testing.assert_array_equal(got.astype("float32"), np.broadcast_to(expected.astype("float32"), got.shape))


def test_philox(page) -> None:
    # Known answers of Random123: counter and key all zero bits, and all one bits.
    assert _native.philox_word(0, 0, 0) == 0x6627E8D5
    ones = 2**64 - 1
    assert _native.philox_word(ones, ones, ones) == 0x408F276D


def test_wrong_names_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("TILEWISE_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r"^TILEWISE_ISA"):
        _native.isa()
    with pytest.raises(RuntimeError, match=r"^TILEWISE_ISA"):
        tw.attention(*_arrays("float32", 3, 4, 8, 8), kernel="native")
