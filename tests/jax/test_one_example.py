"""Attention of one example under `vmap`, and equinox modules run by it."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import assert_accurate

import tilewise as tw
from tilewise.jax import attention_one
from tilewise.jax.integrations.equinox import multihead_attention

S, HEADS, WIDTH = 7, 4, 16


def arrays(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def wide(x):
    return np.asarray(x, "float64")


def plain(q, k, v, mask=None):
    """(S, H, D)."""
    scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("hqk,khd->qhd", weights, v)


TRIANGLE = np.tril(np.ones((S, S), bool))


@pytest.mark.parametrize(
    "mask",
    [
        np.stack([TRIANGLE] * HEADS),
        pytest.param(TRIANGLE, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_mapped_over_a_batch(mask):
    q, k, v = arrays((3, S, HEADS, 8), (3, S, HEADS, 8), (3, S, HEADS, 6))
    out, back = jax.vjp(jax.vmap(lambda q, k, v: attention_one(q, k, v, mask)), q, k, v)
    right, right_back = jax.vjp(jax.vmap(lambda q, k, v: plain(q, k, v, mask)), *map(wide, (q, k, v)))
    assert_accurate("out", out, right)
    for name, a, b in zip("qkv", back(jnp.ones_like(out)), right_back(jnp.ones_like(right)), strict=True):
        assert_accurate(name, a, b)


def test_masks_mapped_with_the_batch():
    q, k, v = arrays(*[(3, S, HEADS, 8)] * 3)
    lengths = np.array([2, 5, 7])
    out = jax.vmap(lambda q, k, v, n: attention_one(q, k, v, tw.lengths(k=n[None])))(q, k, v, jnp.asarray(lengths))
    mask = np.arange(S) < lengths[:, None, None]
    for b in range(3):
        assert_accurate("out", out[b], plain(*map(wide, (q[b], k[b], v[b])), mask[b]))


def test_one_head_mapped_over_heads():
    q, k, v = arrays(*[(S, HEADS, 8)] * 3)
    out = jax.vmap(lambda q, k, v: attention_one(q, k, v, tw.causal()), in_axes=1, out_axes=1)(q, k, v)
    assert_accurate("out", out, plain(*map(wide, (q, k, v)), TRIANGLE))


def test_dropout_bits_are_those_of_numpy():
    q, k, v = arrays(*[(S, HEADS, 8)] * 3)
    out = attention_one(q, k, v, dropout=0.5, key=11)
    same = tw.attention(*(np.asarray(x)[None] for x in (q, k, v)), dropout=tw.Dropout(0.5, 11), layout="bshd")[0]
    assert_accurate("out", out, wide(same))
    layer = SimpleNamespace(p=0.5, inference=True)
    assert jnp.array_equal(attention_one(q, k, v, dropout=layer), attention_one(q, k, v))
    assert jnp.array_equal(attention_one(q, k, v, dropout=layer, inference=False, key=11), out)


@pytest.mark.parametrize(
    ("name", "change"),
    [("key", {"dropout": 0.5}), ("query", {"query": np.ones(3)}), ("value", {"value": np.ones((S, 8))})],
)
def test_errors_name_the_argument(name, change):
    given = {"query": np.ones((S, 1, 8)), "key_": np.ones((S, 1, 8)), "value": np.ones((S, 1, 8))} | change
    with pytest.raises(ValueError, match=f"^{name}: "):
        attention_one(**given)


@pytest.mark.skipif(not find_spec("equinox"), reason="equinox is not installed")
class TestEquinox:
    @pytest.fixture
    def module(self):
        import equinox

        return equinox.nn.MultiheadAttention(
            HEADS, WIDTH, key_size=6, value_size=5, output_size=9, qk_size=8, vo_size=3, use_query_bias=True,
            dtype=jnp.float32, key=jax.random.key(0),
        )  # fmt: skip

    @pytest.mark.parametrize("mask", [None, TRIANGLE, np.stack([TRIANGLE] * HEADS)])
    def test_as_the_module(self, module, mask):
        x, k, v = arrays((S, WIDTH), (S, 6), (S, 5))
        turn = lambda q, k, v: (jnp.cos(q), jnp.sin(k), v)  # noqa: E731
        got = multihead_attention(module, x, k, v, mask, process_heads=turn)
        assert_accurate("out", got, wide(module(x, k, v, mask, process_heads=turn)))

    @pytest.mark.slow
    def test_mapped_with_gradients_to_its_parameters(self, module):
        import equinox

        x, k, v = arrays((3, S, WIDTH), (3, S, 6), (3, S, 5))

        @equinox.filter_jit
        @equinox.filter_grad
        def gradient(module, call):
            return jnp.sin(jax.vmap(lambda x, k, v: call(module, x, k, v, TRIANGLE))(x, k, v)).sum()

        ours, theirs = gradient(module, multihead_attention), gradient(module, type(module).__call__)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert_accurate("parameter", a, wide(b))

    def test_lengths_and_shapes(self, module):
        x, k, v = arrays((S, WIDTH), (S, 6), (S, 5))
        with pytest.raises(ValueError, match="^value: "):
            multihead_attention(module, x, k, v[1:])
        with pytest.raises(ValueError, match="^process_heads: "):
            multihead_attention(module, x, k, v, process_heads=lambda q, k, v: (q, k, v[:, :1]))
