"""What is masked cannot be seen, also by gradients; what is seen is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tilewise as tw
import tilewise.jax.pytrees

IDS = np.array([0, 0, 1, 1, 0, 1, 1, 0, 2])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(8)
    return [rng.standard_normal((1, heads, 9, 4)) for heads in (2, 1, 1)]


@jax.jit
def gradients(q, k, v, weight, mask):
    def loss(q, k, v):
        out, lse = tw.attention(q, k, v, mask=mask, return_lse=True, kernel="portable")
        return (out * weight).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "cotangent"])
def test_a_neighbouring_document_is_not_seen(arrays, place, poison):
    weight = np.ones((1, 2, 9, 4))
    inputs = dict(zip(("q", "k", "v", "cotangent"), (*arrays, weight), strict=True))
    clean = gradients(*inputs.values(), tw.documents(IDS))
    inputs[place] = np.where((IDS == 1)[:, None], poison, inputs[place])
    dirty = gradients(*inputs.values(), tw.documents(IDS))
    for got, wanted in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(got[..., IDS != 1, :], wanted[..., IDS != 1, :])
    # The poisoned document itself must not pretend to be well.
    assert not all(np.isfinite(got[..., IDS == 1, :]).all() for got in dirty)


def test_padding_is_not_seen(arrays):
    q, k, v = arrays
    mask = tw.lengths(q=7, k=6)
    weight = np.ones((1, 2, 9, 4))
    clean = gradients(q, k, v, weight, mask)
    padded = [np.where(np.arange(9)[:, None] >= n, np.nan, x) for x, n in ((q, 7), (k, 6), (v, 6), (weight, 7))]
    for got, wanted in zip(gradients(*padded, mask), clean, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert np.isfinite(got).all()


def test_a_nan_that_is_seen_shows(arrays):
    q, k, v = arrays
    v = np.where(np.arange(9)[:, None] == 4, np.nan, v)
    out = tw.attention(*map(jnp.asarray, (q, k, v)), mask=tw.causal(), kernel="portable")
    assert np.isfinite(out[:, :, :4]).all() and np.isnan(out[:, :, 4:]).all()


def test_rows_of_minus_infinity_have_no_gradient(arrays):
    bias = np.where(np.arange(9)[:, None] == 3, -np.inf, 0.5)

    def loss(q, bias):
        return tw.attention(q, *map(jnp.asarray, arrays[1:]), bias=bias, sinks=jnp.ones(2)).sum()

    d_q, d_bias = jax.grad(loss, (0, 1))(jnp.asarray(arrays[0]), jnp.asarray(bias))
    assert np.isfinite(d_q).all() and np.isfinite(d_bias).all()
    assert not np.any(d_q[:, :, 3]) and not np.any(d_bias[3]) and np.any(d_bias[2])
