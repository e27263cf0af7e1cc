"""Ours in the place of `jax.nn.dot_product_attention`, and who then calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from threading import Thread

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import tilewise.jax as tj  # noqa: E402
from tilewise.compat.jax_sdpa import attention as home  # noqa: E402

THEIRS = jax.nn.dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """How often ours ran."""
    seen = []
    inner = home.attention
    monkeypatch.setattr(home, "attention", lambda *a, **o: (seen.append(o), inner(*a, **o))[1])
    return seen


def test_names_are_loaded_when_asked_for():
    program = "import sys, tilewise.jax as tj; assert 'jax' not in sys.modules; tj.sdpa; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert set(tj.__all__) <= set(dir(tj))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = tj.nothing_of_the_kind


def test_a_block(calls):
    q = jnp.ones((3, 1, 4))
    with tj.sdpa():
        assert jax.nn.dot_product_attention is tj.dot_product_attention
        jax.nn.dot_product_attention(q, q, q)
    assert jax.nn.dot_product_attention is THEIRS and len(calls) == 1


def test_blocks_nest_and_survive_errors_and_threads():
    def work():
        for _ in range(50):
            with tj.sdpa(), tj.sdpa():
                assert jax.nn.dot_product_attention is tj.dot_product_attention

    with pytest.raises(KeyError), tj.sdpa():
        raise KeyError
    assert jax.nn.dot_product_attention is THEIRS
    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert jax.nn.dot_product_attention is THEIRS


def test_install_and_uninstall():
    tj.install()
    tj.install()
    with tj.sdpa():
        pass
    assert jax.nn.dot_product_attention is tj.dot_product_attention
    tj.uninstall()
    assert jax.nn.dot_product_attention is THEIRS
    tj.uninstall()
    assert jax.nn.dot_product_attention is THEIRS


def test_cudnn_is_asked_of_jax_also_when_installed():
    if jax.default_backend() == "cpu":
        q = jnp.ones((1, 3, 1, 8))
        with tj.sdpa(), pytest.raises(RuntimeError, match="cuDNN"):
            jax.nn.dot_product_attention(q, q, q, implementation="cudnn")


def test_nnx_uses_it(calls):
    nnx = pytest.importorskip("flax.nnx")
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    module = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    before = module(x, is_causal=True)
    with tj.sdpa():
        after = module(x, is_causal=True)
    assert len(calls) == 1 and jnp.allclose(before, after, atol=1e-6)


KERAS = """
import numpy as np, keras, tilewise.jax
from tilewise.compat.jax_sdpa import attention as home
x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
layer, calls, inner = keras.layers.MultiHeadAttention(2, 4), [], home.attention
home.attention = lambda *a, **o: (calls.append(o), inner(*a, **o))[1]
before = layer(x, x, use_causal_mask=True)
mask = np.tril(np.ones((2, 5, 5), bool))
with tilewise.jax.sdpa():
    np.testing.assert_allclose(layer(x, x, use_causal_mask=True), before, atol=1e-6)
    np.testing.assert_allclose(layer(x, x, attention_mask=mask), before, atol=1e-6)
assert len(calls) == 2, calls
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("keras"), reason="Keras is not installed")
def test_keras_uses_it():
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", KERAS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
