"""Compositions of jax's transformations give what they give for the plain formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jax_cases import case, finite, plain

import tilewise as tw


def losses(name: str):
    """The same loss, of out and lse, by the kernel and by the plain formula; and where to take it."""
    function, smooth, plan, operands = case(name)

    def loss(function):
        def value(smooth):
            out, lse = function(smooth)
            return jnp.sin(out).sum() + jnp.cos(finite(lse)).sum()

        return value

    return loss(function), loss(plain(plan, operands)), smooth


def direction(smooth, seed=1):
    leaves, tree = jax.tree.flatten(smooth)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves])


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["everything"])
def test_forward_mode(name):
    ours, theirs, smooth = losses(name)
    along = direction(smooth)
    close(jax.jit(lambda s, t: jax.jvp(ours, (s,), (t,)))(smooth, along), jax.jvp(theirs, (smooth,), (along,)))


@pytest.mark.parametrize(
    ("name", "order"), [("bias with holes", "forward over reverse"), ("everything", "reverse over forward")]
)
def test_second_order(name, order):
    ours, theirs, smooth = losses(name)
    along = direction(smooth)
    if name == "bias with holes":  # a direction cannot leave -inf
        along = along._replace(
            dense=tuple(jnp.where(jnp.isfinite(x), d, 0) for x, d in zip(smooth.dense, along.dense, strict=True))
        )

    def product(loss):
        if order == "forward over reverse":
            return lambda s: jax.jvp(jax.grad(loss), (s,), (along,))[1]
        return lambda s: jax.grad(lambda s: jax.jvp(loss, (s,), (along,))[1])(s)

    close(jax.jit(product(ours))(smooth), jax.jit(product(theirs))(smooth))


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(4)
    return [rng.standard_normal((1, 2, n, 3)) for n in (4, 5, 5)]


def simple(q, k, v):
    """Causal attention from the end, plainly."""
    scores = q @ k.mT / np.sqrt(q.shape[-1])
    seen = jnp.arange(k.shape[2]) <= jnp.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1) @ v


def ours(q, k, v, **options):
    return tw.attention(q, k, v, mask=tw.causal("end"), **options)


def test_hessian(small):
    q, k, v = map(jnp.asarray, small)
    close(
        jax.hessian(lambda q: jnp.sin(ours(q, k, v)).sum())(q), jax.hessian(lambda q: jnp.sin(simple(q, k, v)).sum())(q)
    )


@pytest.mark.parametrize("kernel", ["portable", "native"])
def test_vmap_and_grad_in_either_order(small, kernel):
    if kernel == "native":
        pytest.importorskip("tilewise._native")
    q, k, v = map(jnp.asarray, small)
    many = jnp.stack([q, 2 * q, -q])

    def results(attend):
        def loss(*args):
            return jnp.sin(attend(*args)).sum()

        inside = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None, None)))(many, k, v)
        outside = jax.grad(lambda q, k: jax.vmap(loss, (0, None, None))(q, k, v).sum(), (0, 1))
        return inside, jax.jit(outside)(many, k)

    close(results(lambda *args: ours(*args, kernel=kernel)), results(simple))


def test_scan_and_checkpoint(small):
    q, k, v = (jnp.asarray(x)[..., :4, :] for x in small)

    def layers(attend):
        def loss(q):
            step = jax.checkpoint(lambda q, _: (q + attend(q, k, v), None))
            return jax.lax.scan(step, q, None, 3)[0].sum()

        return jax.jit(jax.value_and_grad(loss))(q)

    close(layers(ours), layers(simple))


def test_a_predicate_may_look_at_traced_arrays(small):
    q, k, v = map(jnp.asarray, small)

    @jax.jit
    def loss(q, limit):
        mask = tw.predicate(lambda b, h, i, j: j < limit[i] * jnp.ones_like(b + h))
        return jnp.sin(tw.attention(q, k, v, mask=mask)).sum()

    limit = jnp.array([1.0, 5.0, 0.0, 3.0])
    seen = np.arange(5) < np.asarray(limit)[:, None]
    expected = jax.grad(lambda q: jnp.sin(tw.attention(q, k, v, mask=tw.dense(seen))).sum())(q)
    close(jax.grad(loss)(q, limit), expected)


def test_a_new_seed_is_no_new_program(small):
    q, k, v = map(jnp.asarray, small)
    traces = []

    @jax.jit
    def drop(seed):
        traces.append(seed)
        return tw.attention(q, k, v, dropout=tw.Dropout(0.5, seed))

    values = [drop(jnp.uint32(seed)) for seed in (1, 2, 1)]
    assert len(traces) == 1
    close(values[0], values[2])
    assert not np.array_equal(values[0], values[1])
    close(values[0], tw.attention(*small, dropout=tw.Dropout(0.5, 1), kernel="portable"))


def test_gradients_as_older_jax_needs_them(monkeypatch):
    # Sizes of their own, so that no program compiled for another test is found.
    q, k, v = jax.random.normal(jax.random.key(3), (3, 1, 2, 37, 6))
    mask = tw.causal() & tw.documents(jnp.arange(37) % 3)

    def gradients(scale):
        loss = lambda *x: (tw.attention(*x, mask=mask, scale=scale, kernel="portable") ** 2).sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    expected = gradients(0.5)
    jax.clear_caches()
    monkeypatch.setattr("tilewise.jax.maps._SCANS_TRANSPOSE", (10**6,))
    for got, new in zip(gradients(0.5), expected, strict=True):
        np.testing.assert_array_equal(got, new)
    jax.clear_caches()
