"""Derivatives of float32 and float16 in parts of bfloat16 (test_parts.py): exact, and blind to what is masked."""

from __future__ import annotations

import numpy as np
import pytest
from accuracy import assert_accurate
from support.parts_cases import STRANGE_OF_TYPES, arrays

import tilewise as tw

torch = pytest.importorskip("torch")
pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("tile_page")
LARGEST = float(np.finfo(np.float32).max)
STRANGE = [(dtype, number) for dtype, number in STRANGE_OF_TYPES if number != -np.inf]


@pytest.fixture(autouse=True)
def threads():
    """The number of threads that torch had stands again after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _numbers(q_len, k_len, dim, value, heads=(4, 2), batch=2, dtype="float32"):
    """q, k, v and gradients of out and lse."""
    rng = np.random.default_rng(q_len + k_len)
    d_out = rng.standard_normal((batch, heads[0], q_len, value)).astype(dtype)
    d_lse = rng.standard_normal((batch, heads[0], q_len)).astype("float32")
    numbers = [*arrays(q_len, k_len, dim, value, heads, batch, dtype), d_out, d_lse]
    return [torch.from_numpy(x) for x in numbers]


def _native_attention(**options):
    return lambda q, k, v: tw.attention(q, k, v, kernel="native", return_lse=True, **options)


def _plain(seen=True, scale=None):
    def attention(q, k, v):
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~torch.as_tensor(seen), -torch.inf)
        return scores.softmax(-1) @ v.repeat_interleave(group, 1), scores.logsumexp(-1)

    return attention


def _gradients(attention, q, k, v, d_out, d_lse=None, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    if d_lse is None:
        return torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return torch.autograd.grad([out, lse], leaves, [d_out.to(out.dtype), d_lse.to(lse.dtype)])


def _tangents(attention, given, along, dtype=None):
    given, along = (tuple(x.to(dtype or x.dtype) for x in each) for each in (given, along))
    return torch.func.jvp(attention, given, along)[1]


_BOTH = ((_native_attention(), torch.float32), (_plain(), torch.float64))


def _bits(x) -> bytes:
    return x.detach().contiguous().numpy().tobytes()


def _accurate(names, found, exact) -> None:
    """Each relative to the largest number of its own."""
    for name, got, truth in zip(names, found, exact, strict=True):
        top = truth.abs().max()
        assert_accurate(name, (got.double() / top).float(), truth / top)


# -- how near to float64 ----------------------------------------------------------------------------------------------

SHAPES = [(9, 1, 1, 1), (33, 31, 5, 40), (200, 77, 16, 33), (70, 513, 40, 16), (65, 100, 128, 5), (17, 130, 300, 80)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, causal, dtype) -> None:
    q, k, v, d_out, d_lse = _numbers(*shape, heads=[(4, 2), (3, 1), (2, 2)][shape[0] % 3], dtype=dtype)
    causal = causal and shape[0] <= shape[1]  # else the first rows see nothing
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = seen.tril(k.shape[2] - q.shape[2]) if causal else seen
    native, plain = _native_attention(mask=tw.causal("end") if causal else None), _plain(seen)
    given = (q, k, v, d_out, d_lse)
    for got, truth in zip(_gradients(native, *given), _gradients(plain, *given, dtype=torch.float64), strict=True):
        assert_accurate("gradient", got, truth)
    along = [torch.flip(x, (-1,)) for x in given[:3]]
    found, exact = _tangents(native, given[:3], along), _tangents(plain, given[:3], along, torch.float64)
    for got, truth in zip(found, exact, strict=True):
        assert_accurate("tangent", got, truth)


@pytest.mark.parametrize("size", [1e-33, 1e-31, 1e-28, 1e-25, 1e-22, 1e-15, 1e15, 1e18, 1e30])
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_of_one_size(through, size) -> None:
    # Slopes as little as this have no parts, nor have those that are as large.
    q, k, v, d_out, d_lse = _numbers(40, 150, 33, 24)
    given = (q, k, v, d_out * size, None) if through == "out" else (q, k, v, d_out * 0, d_lse * size)
    found, exact = _gradients(_native_attention(), *given), _gradients(_plain(), *given, dtype=torch.float64)
    which = slice(0, 3 if through == "out" else 2)  # lse does not move with the values
    _accurate("qkv"[which], found[which], exact[which])


def test_scores_are_those_of_the_forward_pass() -> None:
    # What is lost of the probabilities' sum stands beside their gradients, times keys that are alike.
    q, k, v, d_out, _ = _numbers(64, 150, 33, 24)
    k, d_out = k + 50, d_out * 1e-23
    _accurate("qkv", *(_gradients(f, q, k, v, d_out, dtype=t) for f, t in _BOTH))


@pytest.mark.parametrize("decades", [8, 17, 25])
def test_large_numbers_beside_small_ones(decades) -> None:
    q, k, v, d_out, _ = _numbers(40, 150, 33, 24)
    given = (q * 10.0**decades, k * 10.0**-decades, v, d_out)
    _accurate("qkv", _gradients(_native_attention(), *given), _gradients(_plain(), *given, dtype=torch.float64))


# -- what is not seen, and what order sums have -----------------------------------------------------------------------


def _sights():
    bits = torch.from_numpy(np.random.default_rng(3).random((1, 1, 150, 200)) < 0.05)
    rows, keys = np.arange(150) // 50, np.arange(200) // 67
    return {
        "documents": ({"mask": tw.documents(rows[None], keys[None])}, torch.from_numpy(rows[:, None] == keys)),
        "causal": ({"mask": tw.causal("end")}, torch.ones(150, 200, dtype=torch.bool).tril(50)),
        "bits": ({"mask": tw.dense(bits), "softcap": 3.0}, bits[0, 0]),
        "barring bias": ({"bias": torch.zeros(1, 1, 150, 200).masked_fill(~bits, -torch.inf)}, bits[0, 0]),
    }


@pytest.mark.parametrize("dtype, number", STRANGE)
@pytest.mark.parametrize("sight", ["documents", "causal", "bits", "barring bias"])
def test_what_is_not_seen_changes_no_bit(sight, dtype, number) -> None:
    options, seen = _sights()[sight]
    native, clean = _native_attention(**options), _numbers(150, 200, 40, 24, dtype=dtype)
    expected = _gradients(native, *clean)
    for which, place in ((0, 99), (1, 160), (2, 160), (3, 99), (4, 99)):
        given = [x.clone() for x in clean]
        given[which][0, 1, place] = number  # query head 1, or the keys of the heads 2 and 3
        keys = which in (1, 2)
        rows = seen[:, place] if keys else torch.arange(150) == place  # that see it
        found = _gradients(native, *given)
        heads = slice(2, 4) if keys else slice(1, 2)
        touched = torch.zeros(found[0].shape[:3], dtype=torch.bool)
        touched[0, heads, rows] = True
        assert _bits(found[0][~touched]) == _bits(expected[0][~touched])
        touched = torch.zeros(found[1].shape[:3], dtype=torch.bool)
        touched[0, int(keys)] = seen[rows].any(0)
        assert not touched.all()
        for got, other in zip(found[1:], expected[1:], strict=True):
            assert _bits(got[~touched]) == _bits(other[~touched])


@pytest.mark.parametrize("dtype, number", STRANGE)
def test_threads_and_batches_change_no_bit(dtype, number) -> None:
    # They decide how many tiles pass over a segment of keys together.
    given = _numbers(64, 333, 80, 24, heads=(2, 2), dtype=dtype)
    given[0][0, 1, [3, 40], 5] = given[3][1, 1, [40, 60], 7] = given[1][0, 0, 140, 9] = number
    native = _native_attention(mask=tw.causal("end"))
    answers = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        tw.set_num_threads(threads)
        answers.append(_gradients(native, *given))
    rows = [_gradients(native, *(x[b : b + 1] for x in given)) for b in range(2)]
    tw.set_num_threads(0)
    alone = [torch.cat(pair) for pair in zip(*rows, strict=True)]
    for answer in (*answers[1:], alone):
        assert list(map(_bits, answer)) == list(map(_bits, answers[0]))


@pytest.mark.parametrize("dtype, number", STRANGE)
def test_tangents_of_what_is_not_seen(dtype, number) -> None:
    options, seen = _sights()["causal"]
    native, given = _native_attention(**options), _numbers(150, 200, 40, 24, dtype=dtype)[:3]
    along = [torch.flip(x, (-1,)) for x in given]
    expected = _tangents(native, given, along)
    untouched = ~seen[:, 160]
    for moving in (given, along):
        for which in (1, 2):
            changed = [x.clone() for x in moving]
            changed[which][:, :, 160, 5] = number
            found = _tangents(native, *((changed, along) if moving is given else (given, changed)))
            for got, other in zip(found, expected, strict=True):
                assert _bits(got[:, :, untouched]) == _bits(other[:, :, untouched])


# -- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, number", [case for case in STRANGE if case[1] != LARGEST])
@pytest.mark.parametrize("which", range(5), ids=["q", "k", "v", "d_out", "d_lse"])
def test_what_is_seen_is_as_on_other_pages(monkeypatch, which, dtype, number) -> None:
    given = _numbers(70, 150, 40, 24, dtype=dtype)
    given[which][(0, 1, 33, 5)[: given[which].ndim]] = number
    native = _native_attention(mask=tw.causal("end"))
    found = _gradients(native, *given)
    monkeypatch.setenv("TILEWISE_ISA", "avx512")
    expected = _gradients(native, *given)
    for got, other in zip(found, expected, strict=True):
        assert torch.equal(got.isnan(), other.isnan())
        assert torch.equal(got.isposinf(), other.isposinf()) and torch.equal(got.isneginf(), other.isneginf())
        finite = other.isfinite()
        top = other[finite].abs().max()
        assert_accurate("gradient", got[finite] / top, other[finite].double() / top)
