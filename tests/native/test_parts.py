"""float32 and float16 in tile registers, in parts of bfloat16: as near to float64 as their type must be.

A problem is multiplied in parts if its kv heads have more than 8 rows (query heads of the group times queries), and
rows may depend on their number. So the number of rows may change bits across this border; nothing else may.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from accuracy import assert_accurate
from support.parts_cases import FACTS, accurate, arrays, exact, facts, run, same

import tilewise as tw

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("tile_page")

SHAPES = [
    (9, 1, 1, 1), (33, 31, 5, 300), (200, 77, 16, 33), (70, 1025, 40, 16), (32, 1024, 64, 80), (65, 300, 300, 5),
    (17, 130, 512, 256), (100, 64, 96, 512), (11, 513, 200, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", [*FACTS, "negative scale", "scale 0", "tiny scale"])
def test_accuracy(name, dtype) -> None:
    for number, shape in enumerate(SHAPES):
        q, k, v = arrays(*shape, heads=[(4, 2), (3, 1), (2, 2)][number % 3], dtype=dtype)
        given, told = facts(name, q, k)
        accurate(run(q, k, v, **given), exact(q, k, v, **told), exact(q, k, v, **told, dtype=np.float32)[0])
        turned = [x.swapaxes(1, 2).copy() for x in (q, k, v)]
        out, lse = run(*turned, layout="bshd", **given)
        same((out.swapaxes(1, 2), lse), run(q, k, v, **given))


def test_dropout() -> None:
    q, k, v = arrays(70, 300, 40, 33)
    options: dict[str, Any] = {"dropout": tw.Dropout(0.3, seed=5), "mask": tw.causal("end"), "return_lse": True}
    truth = tw.attention(*(x.astype(float) for x in (q, k, v)), kernel="reference", allow_quadratic=True, **options)
    accurate(tw.attention(q, k, v, kernel="native", **options), truth)


@pytest.mark.parametrize("spread", ["columns", "keys"])
def test_values_of_every_size(spread) -> None:
    """Each column is as exact as if it were alone; all sizes are on both sides of what parts can hold."""
    q, k, v = arrays(70, 300, 64, 41)
    size = (10.0 ** np.linspace(-34, 34, 41)).astype(np.float32)
    v *= size if spread == "columns" else np.resize(size, (300, 1))
    truth = exact(q, k, v)
    found = run(q, k, v)
    top = np.abs(truth[0]).max((0, 1, 2))
    assert_accurate("out", (found[0] / top).astype(np.float32), truth[0] / top)
    assert_accurate("lse", found[1], truth[1])


@pytest.mark.parametrize("size", [1e-33, 1e-29, 1e-20, 1e10, 1e16, 1e20, 1e35])
def test_values_of_one_size(size) -> None:
    q, k, v = arrays(40, 200, 33, 24)
    v = v * np.float32(size)
    out, lse = run(q, k, v, mask=tw.causal("end"))
    truth = exact(q, k, v, seen=np.arange(200) <= np.arange(40)[:, None] + 160)
    accurate(((out / size).astype(np.float32), lse), (truth[0] / size, truth[1]))


@pytest.mark.parametrize("decades", [8, 17, 30])
def test_large_numbers_beside_small_ones(decades) -> None:
    q, k, v = arrays(40, 200, 80, 24)
    accurate(run(q * np.float32(10**decades), k * np.float32(10**-decades), v), exact(q, k, v))
    size = (10.0 ** np.linspace(-decades, decades, 80)).astype(np.float32)
    q, k = q * size, k / size
    accurate(run(q, k, v), exact(q, k, v))


@pytest.mark.parametrize("scale", [1e10, 1e23, 1e25, 1e30, 1e36, 1e38])
def test_scales_that_make_scores_of_tiny_products(scale) -> None:
    # Tile registers make 0 of what is below 2^-126.
    q, k, v = arrays(40, 200, 16, 24)
    q, k = (x * np.float32((0.3 / scale) ** 0.5) for x in (q, k))
    accurate(run(q, k, v, scale=scale), exact(q, k, v, scale=scale))


@pytest.mark.parametrize("scale", [1e25, 1e36, 1e37])
def test_derivatives_at_such_scales(scale) -> None:
    torch = pytest.importorskip("torch")
    numbers = arrays(40, 200, 16, 24)
    sizes = [np.float32((0.3 / scale) ** 0.5)] * 2 + [np.float32(1)]
    given = [torch.from_numpy(x * size) for x, size in zip(numbers, sizes, strict=True)]
    along = [torch.flip(x, (-1,)) for x in given]

    def plain(q, k, v):
        return torch.softmax(q @ k.repeat_interleave(2, 1).mT * scale, -1) @ v.repeat_interleave(2, 1)

    def derivatives(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        gradients = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
        tangent = torch.func.jvp(function, tuple(x.to(dtype) for x in given), tuple(x.to(dtype) for x in along))[1]
        return [*(x * float(size) for x, size in zip(gradients, sizes, strict=True)), tangent]  # of numbers near 1

    found = derivatives(lambda *x: tw.attention(*x, scale=scale, kernel="native"), torch.float32)
    for name, got, truth in zip("qkvt", found, derivatives(plain, torch.float64), strict=True):
        assert_accurate(name, got, truth)


def test_probabilities() -> None:
    q, k, _ = arrays(70, 300, 64, 1)
    v = np.broadcast_to(np.eye(300, dtype=np.float32), (2, 2, 300, 300)).copy()
    found = run(3 * q, k, v)
    accurate(found, exact(3 * q, k, v))
    np.testing.assert_allclose(found[0].sum(-1), 1, atol=2e-6)


@pytest.mark.parametrize("spread", [1, 4])
def test_float16_is_rounded_once(spread) -> None:
    """Sums are exact beside the rounding of out: probabilities in two parts are off by 2^-17 of themselves at most."""
    q, k, v = arrays(70, 1000, 64, 80, dtype="float16")
    q *= np.float16(spread)
    out, lse = run(q, k, v)
    truth = exact(q, k, v)
    weighed = exact(q, k, abs(v))[0]
    assert np.all(abs(out - truth[0]) <= 2.0**-11 * abs(truth[0]) + 2.0**-16 * weighed)
    assert_accurate("lse", lse, truth[1], dtype="float32")


def test_float16_of_every_size() -> None:
    """Its least and its largest numbers are held in parts."""
    q, k, v = arrays(70, 300, 64, 41, dtype="float16")
    v *= np.float16(2.0) ** np.resize(np.arange(-24, 12), 41).astype(np.float16)
    q, k = (q * 2.0**-13).astype(np.float16), (k * 2.0**12).astype(np.float16)
    truth, found = exact(q, k, v), run(q, k, v)
    assert np.all(abs(found[0] - truth[0]) <= 2.0**-11 * abs(truth[0]) + 2.0**-16 * exact(q, k, abs(v))[0] + 2.0**-25)
    assert_accurate("lse", found[1], truth[1], dtype="float32")
