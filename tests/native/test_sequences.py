"""Sequences of different lengths in one call of the core, packed and in pages: each has the bits it has alone.

Arrays are exactly as large as they must be, so that a sanitizer sees what is read beyond them; pages and rows of pages
that no key stands in hold NaN, and entries of the table beyond a sequence's keys name no page.
"""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest

import tilewise as tw

_native = pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("page")

CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
GROUP, KV, D, DV = 3, 2, 40, 24
LENGTHS = [([1, 1, 1, 1], [5, 1500, 0, 64]), ([7, 0, 70, 1, 2], [9, 30, 333, 1100, 2]), ([150, 3], [130, 3])]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(params=LENGTHS, ids=str)
def batch(request, dtype):
    """Queries (Tq, Hq, D), keys (Tk, Hkv, D), values (Tk, Hkv, Dv), and the lengths of the sequences."""
    q_len, k_len = (np.array(x, np.int64) for x in request.param)
    rng = np.random.default_rng(int(k_len.sum()))
    shapes = [(q_len.sum(), GROUP * KV, D), (k_len.sum(), KV, D), (k_len.sum(), KV, DV)]
    q, k, v = ((3 * rng.standard_normal(shape)).astype(dtype) for shape in shapes)
    return q, k, v, q_len, k_len


def _begins(lengths):
    return lengths.cumsum() - lengths


def _place(x):
    *outer, row, head, _ = (stride // x.itemsize for stride in x.strides)
    return (x.ctypes.data, outer[0] if outer else 0, head, row)


def _causal(q_len, k_len):
    """Stops of causal("end"), row by row."""
    return np.concatenate(
        [np.clip(np.arange(a) + b - a + 1, 0, b) for a, b in zip(q_len, k_len, strict=True)] or [[]]
    ).astype(np.int32)


def _arguments(q, k, v, out, lse, q_len, k_len, *, causal, pages=None, **facts):
    stops = _causal(q_len, k_len)
    starts = np.zeros_like(stops)
    place = [_begins(q_len), q_len, _begins(k_len), k_len]
    alive = [starts, stops, place]
    return alive, {
        "dtype": CODES[str(q.dtype)], "threads": 2,
        "sizes": (len(q_len), GROUP * KV, KV, q_len.max(), k_len.max(), D, DV),
        "rows": (0, q_len.max()), "q": _place(q), "k": _place(k), "v": _place(v), "out": _place(out),
        "lse": lse.ctypes.data, "scale": D**-0.5, "softcap": 0.0,
        "ranges": (starts.ctypes.data, stops.ctypes.data, 0, 1, 0, 0) if causal else None,
        "labels": None, "mask": None, "bits": None, "biases": (), "table": None, "sinks": 0, "dropout": None,
        "part": False, "pages": pages, "sequences": (*(x.ctypes.data for x in place), 0, 0, len(q)), **facts,
    }  # fmt: skip


def _outputs(q):
    return np.full((*q.shape[:2], DV), 7, q.dtype), np.full((q.shape[1], q.shape[0]), 7, np.float32)


def _alone(q, k, v, q_len, k_len, causal, **options):
    outs, lses = [], []
    for n in range(len(q_len)):
        rows, keys = (slice(int(b[n]), int(b[n] + x[n])) for b, x in ((_begins(q_len), q_len), (_begins(k_len), k_len)))
        out, lse = tw.attention(
            q[rows], k[keys], v[keys], layout="thd", mask=tw.causal("end") if causal else None, kernel="native",
            return_lse=True, **{name: value(n) for name, value in options.items()},
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs), np.concatenate(lses, -1)


def _same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_packed(batch, causal) -> None:
    out, lse = _outputs(batch[0])
    alive, arguments = _arguments(*batch[:3], out, lse, *batch[3:], causal=causal)
    _native.forward(**arguments)
    _same((out, lse), _alone(*batch, causal))
    assert alive


@pytest.mark.parametrize("size", [1, 5, 16, 64, 100])
def test_pages(batch, size) -> None:
    q, k, v, q_len, k_len = batch
    needed = -(-k_len // size)
    rng = np.random.default_rng(size)
    order = iter(1 + rng.permutation(int(needed.sum())))  # page 0 belongs to nobody
    table = np.full((len(k_len), int(needed.max())), -(2**31), np.int32)
    # Heads first, in memory: the layout is a matter of strides.
    k_pages, v_pages = (
        np.full((1 + needed.sum(), KV, size, x.shape[-1]), np.nan, x.dtype).swapaxes(1, 2) for x in (k, v)
    )
    for n, first in enumerate(_begins(k_len)):
        for entry in range(needed[n]):
            table[n, entry] = page = next(order)
            for pages, x in ((k_pages, k), (v_pages, v)):
                part = x[first + entry * size : first + min((entry + 1) * size, k_len[n])]
                pages[page, : len(part)] = part
    out, lse = _outputs(q)
    alive, arguments = _arguments(
        q, k_pages, v_pages, out, lse, q_len, k_len, causal=True, pages=(table.ctypes.data, table.shape[1], size)
    )
    _native.forward(**arguments)
    _same((out, lse), _alone(*batch, True))
    assert alive


def test_dropout_and_a_table_of_distances(batch) -> None:
    q, k, v, q_len, k_len = batch
    table = np.random.default_rng(1).standard_normal((KV * GROUP, q_len.max() + k_len.max() - 1)).astype(np.float32)
    first = q_len.max() - q_len
    out, lse = _outputs(q)
    alive, arguments = _arguments(
        q, k, v, out, lse, q_len, k_len, causal=True, table=(table.ctypes.data, 0, table.shape[1]),
        dropout=(2**30, 4 / 3, 11, 5, 0, 0, 0, 0, 0),
    )  # fmt: skip
    arguments["sequences"] = (*arguments["sequences"][:4], first.ctypes.data, 0, len(q))
    _native.forward(**arguments)
    cut = {n: table[:, first[n] :][:, : max(q_len[n] + k_len[n] - 1, 0)] for n in range(len(q_len))}
    expected = _alone(
        *batch, True, bias=lambda n: tw.relative(cut[n]), dropout=lambda n: tw.Dropout(0.25, 11, 5 + (n << 32))
    )
    _same((out, lse), expected)
    assert alive


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients(batch, threads) -> None:
    q, k, v, q_len, k_len = batch
    rng = np.random.default_rng(2)
    out, lse = _outputs(q)
    d_out = rng.standard_normal(out.shape).astype(q.dtype)
    d_q, d_k, d_v = np.ones_like(q), np.ones_like(k), np.ones_like(v)
    alive, arguments = _arguments(q, k, v, out, lse, q_len, k_len, causal=True)
    _native.forward(**arguments)
    gradients = {
        "d_out": _place(d_out), "d_lse": 0, "d_q": _place(d_q), "d_k": _place(d_k), "d_v": _place(d_v), "gather": (),
        "d_sinks": 0,
    }  # fmt: skip
    _native.backward(**(arguments | {"threads": threads}), **gradients)
    expected = [np.ones_like(x) for x in (d_q, d_k, d_v)]
    for n in range(len(q_len)):
        rows, keys = (slice(int(b[n]), int(b[n] + x[n])) for b, x in ((_begins(q_len), q_len), (_begins(k_len), k_len)))
        own = [x[part] for x, part in ((q, rows), (k, keys), (v, keys), (out, rows), (d_out, rows))]
        logarithms = np.ascontiguousarray(lse[:, rows])
        counts = [np.array([x[n]], np.int64) for x in (q_len, k_len)]
        more, alone = _arguments(*own[:4], logarithms, *counts, causal=True)
        found = [x[part] for x, part in zip(expected, (rows, keys, keys), strict=True)]
        places = {"d_out": _place(own[4]), **dict(zip(("d_q", "d_k", "d_v"), map(_place, found), strict=True))}
        del alone["sequences"]
        _native.backward(**alone, **(gradients | places))
        alive += more
        if not q_len[n]:  # gradients of keys that nobody sees are written, too
            assert not any(x[keys].any() for x in (d_k, d_v))
    _same((d_q, d_k, d_v), expected)
    assert d_q.any() and d_k.any() and d_v.any()


def test_pages_have_no_backward_pass(batch) -> None:
    q, k, v, q_len, k_len = batch
    out, lse = _outputs(q)
    table = np.zeros((len(k_len), int(k_len.max())), np.int32)
    alive, arguments = _arguments(
        q, k[:, None], v[:, None], out, lse, q_len, k_len, causal=False, pages=(table.ctypes.data, table.shape[1], 1)
    )
    with pytest.raises(RuntimeError, match=r"^pages: "):
        _native.backward(
            **arguments, d_out=_place(out), d_lse=0, d_q=(0,) * 4, d_k=(0,) * 4, d_v=(0,) * 4, gather=(),
            d_sinks=0,
        )  # fmt: skip
    assert alive
