"""The derivative of a mapped call whose mask is mapped, or whose bias is beside a mask (a condition on each tile)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import assert_accurate

import tilewise as tw


@pytest.mark.parametrize("kernel", ["portable", pytest.param(None, marks=pytest.mark.slow)])
def test_gradients_of_mapped_calls(kernel):
    rng = np.random.default_rng(0)
    x, bias = (jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((3, 1, 2, 10, 4), (3, 1, 2, 10, 10)))
    mask, lengths = jnp.asarray(rng.random((3, 1, 1, 10, 10)) < 0.5), jnp.asarray([[3], [10], [0]])

    def attend(x, bias, mask, lengths):
        return jnp.sin(tw.attention(x, x, x, bias=bias, mask=tw.dense(mask) & tw.lengths(k=lengths), kernel=kernel))

    gradient = jax.grad(lambda x, bias: jax.vmap(attend)(x, bias, mask, lengths).sum(), argnums=(0, 1))
    got = jax.jit(gradient)(x, bias)
    single = jax.jit(jax.grad(lambda *given: attend(*given).sum(), argnums=(0, 1)))
    for n in range(3):
        for name, a, b in zip(("q", "bias"), got, single(x[n], bias[n], mask[n], lengths[n]), strict=True):
            assert_accurate(name, a[n], b.astype("float64"))
