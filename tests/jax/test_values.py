"""Results and gradients of every case against the oracle, in tiles that meet every boundary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import assert_accurate
from support.jax_cases import case, plain
from support.portable_cases import ALL_CASES

from tilewise.kernels.reference import dense


def cotangents(dtype, out, lse):
    rng = np.random.default_rng(99)
    return jnp.asarray(rng.standard_normal(out.shape), dtype), jnp.asarray(rng.standard_normal(lse.shape), lse.dtype)


def check(name: str, dtype, kernel: str = "portable") -> None:
    function, smooth, plan, operands = case(name, dtype, kernel=kernel)
    assert plan.kernel == kernel

    def results(function):
        @jax.jit
        def both(smooth):
            (out, lse), pull = jax.vjp(function, smooth)
            return out, lse, pull(cotangents(dtype, out, lse))[0]

        return both(smooth)

    out, lse, gradients = results(function)
    # In float64 the floors alone must do; elsewhere plain attention is the yardstick.
    simple_out, _, simple = (None, None, None) if dtype == jnp.float64 else results(plain(plan, operands))
    oracle = dense.attention(plan.problem, operands)
    exact = dense.gradients(oracle, *cotangents(dtype, out, lse))
    assert out.dtype == dtype and lse.dtype == plan.problem.accumulator
    assert_accurate("out", out, oracle.out, simple_out)
    assert_accurate("lse", lse, oracle.lse)
    for field, got in gradients._asdict().items():
        wanted = getattr(exact, field) if field == "dense" else (getattr(exact, field),)
        yardsticks = [None] * len(wanted) if dtype == jnp.float64 else jax.tree.leaves(getattr(simple, field))
        for value, truth, yardstick in zip(jax.tree.leaves(got), wanted, yardsticks, strict=got is not None):
            assert_accurate(field, value, truth, yardstick, dtype=str(np.dtype(dtype)))


# Near relations of cases that run always; each costs seconds of compilation.
RARER = ("causal start", "window", "dense mask of keys", "bias of heads", "bias of keys", "table", "nobody sees")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in RARER else ()) for n in ALL_CASES])
def test_results_and_gradients_are_the_oracles(name):
    check(name, jnp.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_every_dtype_is_as_accurate_as_promised(dtype):
    check("everything", dtype)


@pytest.mark.parametrize("name", ALL_CASES)
def test_the_native_kernels_results_and_gradients_are_the_oracles(name):
    pytest.importorskip("tilewise._native")
    check(name, jnp.float64, "native")


@pytest.mark.parametrize("name", ["everything", "bias of heads", "table"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_native_kernel_is_as_accurate_as_promised(name, dtype):
    pytest.importorskip("tilewise._native")
    check(name, dtype, "native")


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 40)])
@pytest.mark.parametrize("kernel", ["portable", "native"])
def test_any_length(sizes, kernel):
    if kernel == "native":
        pytest.importorskip("tilewise._native")
    import tilewise as tw

    q_len, k_len = sizes
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 2, n, 3))) for n in (q_len, k_len, k_len))
    options = {"mask": tw.causal("end"), "return_lse": True, "kernel": kernel}
    out, lse = tw.attention(q, k, v, **options)
    expected = tw.attention(
        *(np.asarray(x) for x in (q, k, v)), mask=tw.causal("end"), return_lse=True, kernel="portable"
    )
    np.testing.assert_allclose(out, expected[0], atol=1e-12)
    np.testing.assert_allclose(lse, expected[1], atol=1e-12)
    gradient = jax.grad(lambda q: tw.attention(q, k, v, **options)[0].sum())(q)
    assert gradient.shape == q.shape and np.isfinite(gradient).all()
