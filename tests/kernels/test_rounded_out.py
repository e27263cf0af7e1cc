"""Backward passes take d_out . out from out, which a half type has rounded. Where dropout keeps few pairs, out has been
multiplied before, and that rounding would be the largest error of all: there it is summed anew (`state.far_from`)."""

from __future__ import annotations

import numpy as np
import pytest

import tilewise as tw

SEEN = tw.causal("end")


def _arrays(keys: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    return tuple(rng.standard_normal((2, 4, length, 20)).astype(np.float32) for length in (40, keys, keys))


# A bias that all keys of a row share moves nothing but lse, however large the factor of what dropout keeps.
@pytest.mark.parametrize("kernel", ["portable", "native"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("keys", [3, 100])
def test_torch(keys, dtype, kernel) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in _arrays(keys))
    d_out = torch.from_numpy(_arrays(keys)[0]).to(q.dtype)

    def moved(bias):
        out = tw.attention(q, k, v, bias=bias, mask=SEEN, dropout=tw.Dropout(0.9, seed=1), kernel=kernel)
        return (out * d_out).sum(dtype=torch.float32)

    bias = torch.zeros(1, 1, 40, 1, requires_grad=True)
    (found,) = torch.autograd.grad(moved(bias), bias)
    np.testing.assert_allclose(found, 0, atol=2e-3)
    # The same by the formula that can be differentiated again.
    found, _ = torch.func.jvp(torch.func.grad(moved), (bias.detach(),), (torch.ones_like(bias),))
    np.testing.assert_allclose(found, 0, atol=2e-3)


@pytest.mark.parametrize("kernel", ["portable", "native"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax(dtype, kernel) -> None:
    jax = pytest.importorskip("jax")
    q, k, v = (jax.numpy.asarray(x, dtype) for x in _arrays(100))

    def moved(bias):
        out = tw.attention(q, k, v, bias=bias, mask=SEEN, dropout=tw.Dropout(0.9, seed=1), kernel=kernel)
        return (out * q).astype("float32").sum()

    np.testing.assert_allclose(jax.grad(moved)(jax.numpy.zeros((1, 1, 40, 1))), 0, atol=2e-3)
