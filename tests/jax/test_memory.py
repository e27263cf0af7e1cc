"""Compiled programs promise linear memory: what they keep beside inputs and outputs at most doubles with the length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import tilewise as tw

OPTIONS = {
    "plain": lambda s: {},
    "causal": lambda s: {"mask": tw.causal()},
    "everything linear": lambda s: {
        "mask": tw.documents(jnp.arange(s) % 7) & tw.window(200, 0),
        "bias": tw.alibi(jnp.ones(2)),
        "softcap": 5.0,
        "sinks": jnp.ones(2),
        "dropout": tw.Dropout(0.1, 3),
    },
    "predicate": lambda s: {"mask": tw.predicate(lambda b, h, i, j: (i + j) % 3 > 0)},
}


LINEAR = [
    *[
        pytest.param("portable", name, marks=pytest.mark.slow if name in ("plain", "causal") else ())
        for name in OPTIONS
    ],
    *[("native", name) for name in OPTIONS if name != "predicate"],  # traced, a predicate is the portable kernel's
]


def temporary(function, *args) -> int:
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("kernel", "name"), LINEAR)
def test_gradients_are_linear(kernel, name):
    if kernel == "native":
        pytest.importorskip("tilewise._native")

    def bytes_at(length):
        array = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        values = jax.ShapeDtypeStruct((2,), jnp.float32)
        options = OPTIONS[name](length)

        def loss(q, k, v, values):
            bias = {"bias": tw.alibi(values), "sinks": values} if "bias" in options else {}
            return tw.attention(q, k, v, kernel=kernel, **{**options, **bias}).sum()

        return temporary(jax.grad(loss, (0, 1, 2, 3)), *[array] * 3, values)

    small, large = bytes_at(4096), bytes_at(16384)
    assert large < 4.2 * small and large < 16384 * 4096


def test_an_array_of_all_pairs_is_read_in_place():
    length = 4096
    array = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
    bits, bias = jax.ShapeDtypeStruct((length, length), jnp.bool_), jax.ShapeDtypeStruct((length, length), jnp.float32)
    forward = temporary(
        lambda q, m, b: tw.attention(q, q, q, mask=tw.dense(m), bias=b, kernel="portable"), array, bits, bias
    )
    assert forward < length * length / 2


def test_second_derivatives_are_linear():
    def bytes_at(length):
        array = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)

        def loss(q):
            return jnp.sin(tw.attention(q, q, q, mask=tw.causal(), kernel="portable")).sum()

        return temporary(lambda q: jax.grad(lambda q: jnp.vdot(jax.grad(loss)(q), q))(q), array)

    assert bytes_at(16384) < 4.2 * bytes_at(4096)
