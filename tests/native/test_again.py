"""NumPy calls like one made before take a shorter way (`kernels/native/again.py`), which can't be told from outside."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import tilewise as tw
from tilewise._remembered import MOST, Remembered
from tilewise.kernels.native import again

pytestmark = pytest.mark.usefixtures("fresh")

MASKS = {
    "none": lambda rng: None,
    "causal": lambda rng: tw.causal("end"),
    "window": lambda rng: tw.window(5, 2, "end") & tw.causal("end"),
    "prefix": lambda rng: tw.prefix(7) | tw.window(3, 0, "start"),
    "booleans": lambda rng: rng.random((2, 1, 20, 33)) < 0.6,
    "of columns": lambda rng: (rng.random((33, 20)) < 0.6).T,
    "of rows": lambda rng: np.broadcast_to(rng.random((20, 1)) < 0.6, (20, 33)),
    "dense": lambda rng: tw.dense(rng.random((1, 4, 20, 33)) < 0.6),
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "_calls", Remembered())


def arrays(rng: np.random.Generator, layout: str = "bhsd", dtype: str = "float32") -> list[np.ndarray]:
    """q (2, 4, 20, 8), k and v (2, 2, 33, 8) in the layout."""
    made = [rng.standard_normal((2, heads, length, 8)).astype(dtype) for heads, length in ((4, 20), (2, 33), (2, 33))]
    return [np.ascontiguousarray(x.swapaxes(1, 2)) for x in made] if layout == "bshd" else made


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kind", MASKS)
def test_later_calls_are_as_the_first(kind: str, layout: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):  # other numbers each time: the second and third take the shorter way
        q, k, v = arrays(rng, layout, dtype)
        mask = MASKS[kind](rng)
        out, lse = tw.attention(q, k, v, mask=mask, layout=layout, return_lse=True)
        copies = [np.stack([x, x])[0] for x in (q, k, v)]
        again._calls, held = Remembered(), again._calls
        want, want_lse = tw.attention(*copies, mask=mask, layout=layout, return_lse=True)
        again._calls = held
        assert out.flags.c_contiguous == want.flags.c_contiguous and out.strides == want.strides
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
        assert len(again._calls) == 1


def test_every_option_counts() -> None:
    q, k, v = arrays(np.random.default_rng(1))
    given = [
        {}, {"scale": 0.5}, {"softcap": 2.0}, {"mask": tw.causal("end")}, {"mask": tw.causal("start")},
        {"mask": tw.causal(offset=3)}, {"invariance": "row"}, {"return_lse": True}, {"kernel": "native"},
    ]  # fmt: skip
    first = [tw.attention(q, k, v, **options) for options in given]
    assert len(again._calls) == len(given)
    for options, want in zip(given, first, strict=True):
        got = tw.attention(q, k, v, **options)
        assert type(got) is type(want)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[3], first[4])
    sliced = tw.attention(q[:, :, :, ::-1][:, :, :, ::-1], k[:, :, :30], v[:, :, :30])
    np.testing.assert_array_equal(sliced, tw.attention(q, k[:, :, :30].copy(), v[:, :, :30].copy()))


def test_a_mask_is_read_in_each_call() -> None:
    rng = np.random.default_rng(2)
    q, k, v = arrays(rng)
    seen = np.ones((20, 33), bool)
    whole = tw.attention(q, k, v, mask=seen)
    seen[:, 5:] = False
    np.testing.assert_array_equal(tw.attention(q, k, v, mask=seen), tw.attention(q, k, v, mask=tw.lengths(k=5)))
    assert not np.array_equal(tw.attention(q, k, v, mask=seen), whole)


def test_what_may_change_is_not_remembered() -> None:
    rng = np.random.default_rng(3)
    q, k, v = arrays(rng)
    limit = 30
    for given in (
        {"mask": tw.lengths(k=np.array([3, 9]))},
        {"mask": tw.predicate(lambda b, h, i, j: j < limit)},
        {"mask": tw.causal("end") & tw.dense(np.ones((20, 33), bool))},
        {"bias": rng.standard_normal((20, 33)).astype(np.float32)},
        {"bias": tw.alibi(np.full(4, 0.5, np.float32), align="end")},
        {"sinks": np.zeros(4, np.float32)},
        {"dropout": tw.Dropout(0.5, seed=1)},
        {"kernel": "portable"},
    ):
        tw.attention(q, k, v, **given)
    assert not again._calls
    tw.attention(q[..., ::2], k[..., ::2], v[..., ::2])  # copied by the kernel
    assert not again._calls
    limit = 4
    masked = tw.attention(q, k, v, mask=tw.predicate(lambda b, h, i, j: j < limit))
    np.testing.assert_array_equal(masked, tw.attention(q, k, v, mask=tw.lengths(k=4)))


def test_arrays_that_the_core_cannot_read() -> None:
    q, k, v = arrays(np.random.default_rng(4))
    want = tw.attention(q, k, v)
    odd = np.empty(q.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(q.shape)  # the same shape, strides and dtype
    odd[...] = q
    assert not odd.flags.aligned and odd.strides == q.strides
    np.testing.assert_array_equal(tw.attention(odd, k, v), want)
    swapped = q.astype(q.dtype.newbyteorder())
    with pytest.raises(TypeError, match="^q:"):
        tw.attention(swapped, k, v)
    hidden = np.ma.masked_array(q, q > 0)
    with pytest.raises(TypeError, match="^q:"):
        tw.attention(hidden, k, v)


def test_wrong_options_stay_wrong() -> None:
    q, k, v = arrays(np.random.default_rng(5))
    tw.attention(q, k, v, scale=1.0)
    for wrong, name in (
        ({"scale": True}, "scale"), ({"scale": [1.0]}, "scale"), ({"layout": "sbhd"}, "layout"),
        ({"kernel": "fast"}, "kernel"), ({"invariance": "none"}, "invariance"), ({"softcap": -1.0}, "softcap"),
        ({"mask": np.ones((20, 33))}, "mask"), ({"mask": np.ones((21, 33), bool)}, "mask"),
        ({"mask": "causal"}, "mask"),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"^{name}"):
                tw.attention(q, k, v, **wrong)


def test_no_array_is_kept_and_the_number_of_calls_is_bounded() -> None:
    rng = np.random.default_rng(6)
    q, k, v = arrays(rng)
    out = tw.attention(q, k, v, mask=(seen := rng.random((20, 33)) < 0.5))
    held = [weakref.ref(x) for x in (q, k, v, out, seen)]
    assert len(again._calls) == 1
    del q, k, v, out, seen
    gc.collect()
    assert not any(found() is not None for found in held)
    for length in range(1, MOST + 5):
        x = np.ones((1, 1, length, 1), np.float32)
        tw.attention(x, x, x)
    assert len(again._calls) == MOST
