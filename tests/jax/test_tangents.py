"""Forward mode in jax by the native kernel: against the oracle, and under the transformations that meet it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import assert_accurate
from support.jax_cases import case
from support.portable_cases import ALL_CASES

import tilewise as tw
from tilewise.contract import Tangents
from tilewise.kernels.reference import dense

pytest.importorskip("tilewise._native")
SLOW = pytest.mark.slow


def direction(smooth, seed=1):
    """A direction of every operand; a bias of -inf stays."""
    rng = np.random.default_rng(seed)

    def along(x):
        return jnp.where(jnp.isfinite(x), jnp.asarray(rng.standard_normal(x.shape), x.dtype), 0)

    return jax.tree.map(along, smooth)


def check(name, dtype):
    function, smooth, plan, operands = case(name, dtype, kernel="native")
    along = direction(smooth)
    found = jax.jit(lambda s, t: jax.jvp(function, (s,), (t,))[1])(smooth, along)
    exact = dense.tangents(dense.attention(plan.problem, operands), Tangents(*along))
    assert (found[0].dtype, found[1].dtype) == (dtype, plan.problem.accumulator)
    for what, got, truth in zip(("d_out", "d_lse"), found, exact, strict=True):
        assert_accurate(what, got, truth, dtype=str(np.dtype(dtype)))


# One for each kind of operand and fact: a program of jax takes seconds to compile, and the kernel's own tests see all.
QUICK = ("everything", "bias with holes", "table", "sinks", "predicate", "far rows and sinks")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=SLOW) for n in ALL_CASES])
def test_tangents_are_the_oracles(name):
    check(name, jnp.float64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *(pytest.param(t, marks=SLOW) for t in (jnp.float32, jnp.float16))])
def test_every_dtype_is_as_accurate_as_promised(dtype):
    check("everything", dtype)


@pytest.fixture
def operands():
    rng = np.random.default_rng(4)
    shapes = [(2, 2, 4, 3), (2, 1, 5, 3), (2, 1, 5, 2), (1, 2, 4, 5), (2,)]
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def attend(kernel, layout="bhsd"):
    def function(q, k, v, bias, sinks):
        if layout == "bshd":
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        mask = tw.causal("end")
        return tw.attention(q, k, v, mask=mask, bias=bias, sinks=sinks, return_lse=True, kernel=kernel, layout=layout)

    return function


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layout", ["bshd", pytest.param("bhsd", marks=SLOW)])
@pytest.mark.parametrize("moving", [(0,), (1, 3), (2, 4), pytest.param((0, 1, 2, 3, 4), marks=SLOW)], ids=str)
def test_what_does_not_move_is_left_out(operands, moving, layout):
    def push(kernel):
        def function(*moved):
            given = dict(zip(moving, moved, strict=True))
            return attend(kernel, layout)(*(given.get(n, x) for n, x in enumerate(operands)))

        primals = [operands[n] for n in moving]
        return jax.jvp(function, primals, direction(primals))

    close(push("native"), push("portable"))


def test_jacobians_and_transposes(operands):
    q, *rest = operands

    def native(q):
        return attend("native")(q, *rest)

    close(jax.jit(jax.jacfwd(native))(q), jax.jit(jax.jacrev(native))(q))
    results, push = jax.linearize(native, q)
    close(jax.linear_transpose(push, q)(results), jax.vjp(native, q)[1](results))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over forward"])
def test_second_derivatives(operands, order):
    q, *rest = operands

    def derivative(kernel):
        def loss(q):
            out, lse = attend(kernel)(q, *rest)
            return jnp.sin(out).sum() + jnp.cos(lse).sum()

        twice = jax.jacfwd(jax.jacrev(loss)) if order == "forward over reverse" else jax.jacrev(jax.jacfwd(loss))
        return jax.jit(twice)(q)

    close(derivative("native"), derivative("portable"))


def test_a_masked_tangent_is_not_seen():
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(rng.standard_normal((1, heads, 9, 4))) for heads in (2, 1, 1))
    ids = np.array([0, 0, 1, 1, 0, 1, 1, 0, 2])
    push = jax.jit(lambda *along: jax.jvp(lambda *x: tw.attention(*x, mask=tw.documents(ids)), (q, k, v), along)[1])
    clean = push(q, k, v)
    dirty = push(*(jnp.where((ids == 1)[:, None], jnp.nan, x) for x in (q, k, v)))
    np.testing.assert_array_equal(dirty[:, :, ids != 1], clean[:, :, ids != 1])
    assert jnp.isnan(dirty[:, :, ids == 1]).all()


def test_the_native_kernel_runs(operands):
    q, *rest = operands
    push = jax.jit(lambda q: jax.jvp(lambda q: attend(None)(q, *rest), (q,), (q,))[1])
    text = push.lower(q).as_text()
    assert "tilewise_tangent" in text and "while" not in text
