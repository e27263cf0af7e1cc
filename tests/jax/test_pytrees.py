"""Masks, biases and dropout are arguments like any other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tilewise as tw
import tilewise.jax.pytrees


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((2, 2, 8, 4)) for _ in range(3)]


VALUES = {
    "causal": tw.causal(offset=np.array([1, 2])),
    "static": tw.causal() & tw.lengths(k=5),
    "tree": ~(tw.lengths(q=np.array([3, 8]), k=4) | tw.documents(np.arange(8) // 3)) & tw.window(2, 2),
    "blocks": tw.blocks(np.eye(2, dtype=bool), 4),
    "dense": tw.dense(np.ones((8, 8), bool)),
    "intervals": tw.intervals(np.zeros(8, int), np.arange(8)),
    "bias": tw.alibi(np.ones(2)) + np.ones((8, 8)) + tw.t5(np.ones((8, 2))),
    "dropout": tw.Dropout(0.5, np.array([3, 4]), 1),
}


@pytest.mark.parametrize("name", VALUES)
def test_round_trip(name):
    value = VALUES[name]
    leaves, tree = jax.tree.flatten(value)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert again == value or name in ("bias", "dropout")
    assert jax.tree.structure(again) == tree and hash(jax.tree.structure(again)) == hash(tree)


def test_masks_are_arguments_of_jit_and_grad(arrays):
    @jax.jit
    def loss(q, mask, bias, dropout):
        return tw.attention(q, *map(jnp.asarray, arrays[1:]), mask=mask, bias=bias, dropout=dropout).sum()

    mask = tw.causal() & tw.lengths(k=jnp.array([5, 8]))
    bias, dropout = tw.alibi(jnp.array([1.0, 0.5])), tw.Dropout(0.3, jnp.uint32(4))
    q = jnp.asarray(arrays[0])
    np.testing.assert_allclose(
        loss(q, mask, bias, dropout),
        tw.attention(
            *arrays,
            mask=tw.causal() & tw.lengths(k=[5, 8]),
            bias=tw.alibi([1.0, 0.5]),
            dropout=tw.Dropout(0.3, 4),
            kernel="portable",
        ).sum(),
    )
    slope = jax.grad(loss, 2)(q, mask, bias, dropout)
    assert isinstance(slope, tw.Bias) and np.abs(slope.slopes).min() > 0


@pytest.mark.parametrize("kernel", ["portable", "native"])
def test_masks_and_sinks_may_be_mapped(arrays, kernel):
    if kernel == "native":
        pytest.importorskip("tilewise._native")
    q, k, v = map(jnp.asarray, arrays)
    masks = tw.causal() & tw.lengths(k=jnp.array([[5, 8], [0, 3], [8, 1]]))
    sinks = jnp.array([[0.0, 1.0], [2.0, -1.0], [0.0, 0.0]])
    dense = jnp.asarray(np.random.default_rng(1).random((3, 8, 8)) < 0.5)

    def attend(mask, sinks, bits, v):
        return tw.attention(q, k, v, mask=mask & tw.dense(bits), sinks=sinks, kernel=kernel)

    for axes in ((0, 0, 0, None), (0, None, 0, 0), (None, None, 0, None)):
        values = (
            masks if axes[0] == 0 else jax.tree.map(lambda x: x[0], masks),
            sinks if axes[1] == 0 else sinks[0],
            dense,
        )
        values = (*values, jnp.stack([v, -v, 2 * v]) if axes[3] == 0 else v)
        got = jax.jit(jax.vmap(attend, axes))(*values)
        for n in range(3):
            one = [
                x if axis is None else jax.tree.map(lambda x, n=n: x[n], x)
                for x, axis in zip(values, axes, strict=True)
            ]
            np.testing.assert_allclose(got[n], attend(*one), atol=1e-12)


def test_dropout_of_a_mapped_call_is_that_of_the_call(arrays):
    pytest.importorskip("tilewise._native")
    q, k, v = map(jnp.asarray, arrays)

    def attend(q):
        return tw.attention(q, k, v, dropout=tw.Dropout(0.5, 9), kernel="native")

    got = jax.vmap(attend)(jnp.stack([q, 2 * q]))
    np.testing.assert_allclose(got[1], attend(2 * q), atol=1e-12)
