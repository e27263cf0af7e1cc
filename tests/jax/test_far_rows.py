"""Rows whose lse is far from 0 without a bias: the portable kernel's derivatives."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import assert_accurate
from support.far_cases import FACTORS, LARGE_CASES, large
from support.jax_cases import plain
from support.portable_cases import planned

from tilewise.contract import Tangents
from tilewise.jax.call import run
from tilewise.kernels.portable.jax_scan import Smooth
from tilewise.kernels.reference import dense


def problem(name, factor, dtype=jnp.float32):
    """A case as a function of its smooth operands, these, the yardstick, and the oracle."""

    def convert(x):
        return jnp.asarray(x, dtype if x.dtype == np.float64 else None)

    plan, operands = planned(**{key: convert(x) for key, x in large(factor).items()}, **LARGE_CASES[name](convert))
    smooth = Smooth(operands.q, operands.k, operands.v, operands.dense, operands.table, operands.sinks)

    def function(smooth):
        return run(plan, replace(operands, **smooth._asdict()))

    return function, smooth, plain(plan, operands), dense.attention(plan.problem, operands)


def directions(seed, tree):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


SLOW = pytest.mark.slow
# Each is a program that takes seconds to compile.
QUICK = {("causal", 30), ("plain", 1000)}
SWEEP = [
    pytest.param(name, factor, marks=() if (name, factor) in QUICK else SLOW)
    for name in LARGE_CASES
    for factor in FACTORS
]


@pytest.mark.parametrize("name, factor", SWEEP)
def test_gradients(name, factor):
    function, smooth, simple, oracle = problem(name, factor)
    along = directions(1, jax.eval_shape(function, smooth))

    def pulled(function):
        return jax.jit(lambda s: jax.vjp(function, s)[1](along)[0])(smooth)

    found, yardsticks, exact = pulled(function), pulled(simple), dense.gradients(oracle, *along)
    for name in ("q", "k", "v", "sinks"):
        if getattr(found, name) is not None:
            assert_accurate(name, *(getattr(x, name) for x in (found, exact, yardsticks)))


def moved(smooth, seed):
    """A direction of q, k and v."""
    zeros = jax.tree.map(jnp.zeros_like, smooth)
    return zeros._replace(**directions(seed, {name: getattr(smooth, name) for name in "qkv"}))


@pytest.mark.parametrize("name, factor", [("plain", 100), pytest.param("sinks and dropout", 1000, marks=SLOW)])
def test_tangents(name, factor):
    function, smooth, simple, oracle = problem(name, factor)
    along = moved(smooth, 2)

    def pushed(function):
        return jax.jit(lambda s, t: jax.jvp(function, (s,), (t,))[1])(smooth, along)

    exact = dense.tangents(oracle, Tangents(along.q, along.k, along.v, (None,) * len(smooth.dense), None, None))
    for what, *three in zip(("d_out", "d_lse"), pushed(function), exact, pushed(simple), strict=True):
        assert_accurate(what, *three)


def test_second_derivatives():
    """In float64, where far rows are found again as well: the derivatives of what is found must be the formula's."""
    function, smooth, simple, _ = problem("causal", 30, jnp.float64)
    along, inner = moved(smooth, 3), directions(4, jax.eval_shape(function, smooth))

    def twice(function):
        return jax.jit(jax.grad(lambda s: sum(jnp.vdot(x, jnp.sin(y)) for x, y in zip(
            inner, jax.jvp(function, (s,), (along,))[1], strict=True))))(smooth)  # fmt: skip

    for got, exact in zip(jax.tree.leaves(twice(function)), jax.tree.leaves(twice(simple)), strict=True):
        assert_accurate("second derivative", got, exact)


@pytest.mark.slow
def test_mapped_examples_of_which_one_has_far_rows():
    function, smooth, _, _ = problem("plain", 100)
    factors = jnp.asarray([1.0, 0.01], jnp.float32)

    @jax.jit
    def slope(factor):
        return jax.grad(lambda q: function(smooth._replace(q=q))[0].sum())(smooth.q * factor)

    for got, factor in zip(jax.jit(jax.vmap(slope))(factors), factors, strict=True):
        assert_accurate("q", got, slope(factor), dtype="float32")
