"""The primitives under compositions of transformations: native and portable kernels against the plain formula."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tilewise as tw

KERNELS = ["native", pytest.param("portable", marks=pytest.mark.slow)]
B, H, SQ, SK = 2, 2, 4, 5


@pytest.fixture
def operands():
    rng = np.random.default_rng(4)
    shapes = [(B, H, SQ, 3), (B, 1, SK, 3), (B, 1, SK, 2), (1, H, SQ, SK), (H,)]
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


@pytest.fixture(params=KERNELS)
def ours(request):
    if request.param == "native":
        pytest.importorskip("tilewise._native")

    def attend(q, k, v, bias, sinks):
        return tw.attention(
            q, k, v, mask=tw.causal("end"), bias=bias, sinks=sinks, return_lse=True, kernel=request.param
        )

    return partial(loss, attend)


def plain(q, k, v, bias, sinks):
    """The same, plainly."""
    scores = q @ jnp.repeat(k, H, 1).mT / np.sqrt(q.shape[-1]) + bias
    seen = jnp.arange(SK) <= jnp.arange(SQ)[:, None] + SK - SQ
    scores = jnp.where(seen, scores, -jnp.inf)
    all_scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], -1)
    lse = jax.nn.logsumexp(all_scores, -1)
    return jnp.exp(scores - lse[..., None]) @ jnp.repeat(v, H, 1), lse


def loss(attend, *operands):
    out, lse = attend(*operands)
    return jnp.sin(out).sum() + jnp.cos(lse).sum()


theirs = partial(loss, plain)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


ALL = (0, 1, 2, 3, 4)


def both(ours, transform, *args):
    close(jax.jit(transform(ours))(*args), jax.jit(transform(theirs))(*args))


def stacked(x, axis, size=3):
    return jnp.stack([x * (1 + 0.1 * n) for n in range(size)], axis)


# Which operands are mapped, and along which of their axes.
MAPPED = [
    (1, None, 0, None, None),
    (None, 2, None, None, None),
    (None, None, None, 0, None),
    (0, 0, 0, None, 0),
    (None, None, None, None, 0),
]


@pytest.mark.parametrize("axes", MAPPED)
def test_mapped_gradients(ours, operands, axes):
    mapped = [x if axis is None else stacked(x, axis) for x, axis in zip(operands, axes, strict=True)]
    both(ours, lambda f: jax.vmap(jax.grad(f, ALL), axes), *mapped)


def test_gradients_of_mapped(ours, operands):
    axes = (1, None, 0, None, 0)
    mapped = [x if axis is None else stacked(x, axis) for x, axis in zip(operands, axes, strict=True)]
    both(ours, lambda f: jax.grad(lambda *x: jnp.cos(jax.vmap(f, axes)(*x)).sum(), ALL), *mapped)


def test_one_batch_row_mapped(ours, operands):
    # As modules do: a function of one example, mapped; its bias is then the same for all, or each its own.
    q, k, v, bias, sinks = operands
    one = [stacked(x[:1], 0) for x in (q, k, v)]
    for bias_axis in (None, 0):
        args = (*one, bias if bias_axis is None else stacked(bias, 0), sinks)
        both(ours, lambda f, axis=bias_axis: jax.vmap(jax.grad(f, ALL), (0, 0, 0, axis, None)), *args)


def test_mapped_twice(ours, operands):
    many = [stacked(stacked(x, 0, 2), 0) for x in operands[:3]]
    both(ours, lambda f: jax.vmap(jax.vmap(f, (0, 0, 0, None, None)), (0, 0, 0, None, None)), *many, *operands[3:])


def test_nothing_mapped_over_nothing(ours, operands):
    q, *rest = operands
    gradients = jax.vmap(jax.grad(ours), (0, None, None, None, None))(jnp.zeros((0, *q.shape)), *rest)
    assert gradients.shape == (0, *q.shape)


@pytest.mark.parametrize("argument", [0, 3])
def test_jacobians(ours, operands, argument):
    for jacobian in (jax.jacfwd, jax.jacrev):
        both(ours, lambda f, jacobian=jacobian: jacobian(jax.grad(f), argument), *operands)


def test_second_order_both_ways(ours, operands):
    along = tuple(map(jnp.cos, operands))

    def forward_over_reverse(f):
        return lambda *x: jax.jvp(jax.grad(f, ALL), x, along)[1]

    def reverse_over_forward(f):
        return jax.grad(lambda *x: jax.jvp(f, x, along)[1], ALL)

    def reverse_over_reverse(f):
        return jax.grad(lambda *x: sum(jnp.vdot(a, b) for a, b in zip(jax.grad(f, ALL)(*x), along, strict=True)), ALL)

    both(ours, lambda f: lambda *x: [g(f)(*x) for g in (forward_over_reverse, reverse_over_forward)], *operands)
    both(ours, reverse_over_reverse, *operands)


def test_linearize_and_its_transpose(ours, operands):
    def transform(f):
        def run(*x):
            value, linear = jax.linearize(f, *x)
            (back,) = jax.linear_transpose(lambda q: linear(q, *map(jnp.zeros_like, x[1:])), x[0])(jnp.ones(()))
            return value, linear(*map(jnp.cos, x)), back

        return run

    both(ours, transform, *operands)


def test_scan_and_remat(ours, operands):
    def transform(f):
        def total(*x):
            step = jax.checkpoint(lambda carry, _: (carry + f(carry * x[0], *x[1:]), None))
            return jax.lax.scan(step, 1.0, None, 3)[0]

        return jax.grad(total, ALL)

    both(ours, transform, *operands)


def test_without_jit(ours, operands):
    with jax.disable_jit():
        got = jax.grad(ours, ALL)(*operands)
    close(got, jax.grad(theirs, ALL)(*operands))


def test_export(ours, operands):
    pytest.importorskip("flatbuffers")
    from jax import export

    exported = export.export(
        jax.jit(jax.grad(ours, ALL)),
        disabled_checks=[
            export.DisabledSafetyCheck.custom_call(f"tilewise_{name}") for name in ("forward", "backward")
        ],
    )(*operands)
    again = export.deserialize(exported.serialize())
    close(again.call(*operands), jax.grad(theirs, ALL)(*operands))


def test_shapes_and_donation(ours, operands):
    shapes = jax.eval_shape(jax.grad(ours, ALL), *operands)
    assert [x.shape for x in shapes] == [x.shape for x in operands]
    donated = jax.jit(jax.grad(ours), donate_argnums=0)(operands[0].copy(), *operands[1:])
    close(donated, jax.grad(theirs)(*operands))


def test_gradients_run_the_native_kernel(operands):
    pytest.importorskip("tilewise._native")
    q, k, v, _, _ = operands
    attend = partial(tw.attention, mask=tw.causal("end"))
    text = jax.jit(jax.grad(lambda q: attend(q, k, v).sum())).lower(q).as_text()
    assert "tilewise_forward" in text and "tilewise_backward" in text
