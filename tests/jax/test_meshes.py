"""On meshes of several devices, in a process of its own: jax counts its devices once.

What is counted are the collectives in the compiled program: where batch rows and heads are spread there are none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest

if not hasattr(pytest.importorskip("jax"), "shard_map"):
    pytest.skip("needs jax 0.7 or newer", allow_module_level=True)

COMMON = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import tilewise as tw

COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\\(")
kernel, devices = sys.argv[1], len(jax.devices())
rng = np.random.default_rng(0)

def arrays(kv_heads=8, batch=4):
    shapes = [(batch, 8, 24, 4), (batch, kv_heads, 24, 4), (batch, kv_heads, 24, 4)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

def mesh_of(kind, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(getattr(AxisType, kind),) * len(axes))

def functions(options):
    attend = lambda *x: tw.attention(*x, kernel=kernel, **options)
    return attend, jax.grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2))

def check(function, spread, plain, collectives=()):
    compiled = jax.jit(function).lower(*spread).compile()
    assert sorted(set(COLLECTIVE.findall(compiled.as_text()))) == sorted(collectives), compiled.as_text()
    results = compiled(*spread)
    for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(function(*plain)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    return results
"""

SPREAD = """
for kind in ("Auto", "Explicit"):
    mesh = mesh_of(kind, rows=2, heads=devices // 2)
    for kv_heads, options in CASES:
        plain = arrays(kv_heads)
        divides = kv_heads % (devices // 2) == 0
        specs = P("rows", "heads"), *[P("rows", "heads" if divides else None)] * 2
        spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(plain, specs)]
        attend, gradient = functions(options)
        out = check(attend, spread, plain)
        assert out.sharding.is_equivalent_to(spread[0].sharding, 4)
        # Where several devices share a kv head, its gradient is summed over them, and nothing else is sent.
        check(gradient, spread, plain, () if divides else ("all-reduce",))
"""

CASES = {
    "bias": '[(8, {"mask": tw.causal(), "bias": tw.alibi(np.ones(8)) + rng.standard_normal((8, 24, 24))})]',
    "grouped": '[(4, {"mask": tw.lengths(k=np.array([9, 24, 0, 3])), "sinks": jnp.ones(8)}), (2, {}), (1, {})]',
    "numbered": '[(8, {"dropout": tw.Dropout(0.3, 5)}), (2, {"dropout": tw.Dropout(0.3, 5)})]',
    "predicate": '[(4, {"mask": tw.predicate(lambda b, h, i, j: (3 * i + j + b + h) % 4 > 0)})]',
}

SHARED_BIAS = """
mesh = mesh_of("Auto", rows=2, heads=devices // 2)
q, k, v = arrays()
bias, sinks = jnp.asarray(rng.standard_normal((8, 24, 24)), jnp.float32), jnp.ones(8)

def loss(q, k, v, bias, sinks):
    return jnp.sin(tw.attention(q, k, v, bias=bias, sinks=sinks, kernel=kernel)).sum()

specs = *[P("rows", "heads")] * 3, P("heads"), P("heads")
plain = (q, k, v, bias, sinks)
spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(plain, specs)]
check(jax.grad(loss, (0, 1, 2, 3, 4)), spread, plain, ("all-reduce",))
"""

DROPPED = """
# The native kernel draws a part's bits as those of the whole: the results are one device's, bit for bit.
mesh = mesh_of("Auto", rows=2, heads=devices // 2)
for kv_heads in (8, 2):
    plain = arrays(kv_heads)
    spread = [jax.device_put(x, NamedSharding(mesh, P("rows", "heads"))) for x in plain[:1]] + plain[1:]
    attend = jax.jit(functions({"dropout": tw.Dropout(0.3, 5)})[0])
    compiled = attend.lower(*spread).compile()
    assert "tilewise_forward" in compiled.as_text()
    np.testing.assert_array_equal(compiled(*spread), attend(*plain))
"""

REFUSED = """
for kind in ("Auto", "Explicit"):
    mesh = mesh_of(kind, s=devices)
    whole = [jax.device_put(x, NamedSharding(mesh, P())) for x in arrays()]
    for n, name in enumerate("qkv"):
        spread = list(whole)
        spread[n] = jax.device_put(spread[n], NamedSharding(mesh, P(None, None, "s")))
        for attend in (functions({})[0], jax.jit(functions({})[0])):
            try:
                attend(*spread)
            except Exception as error:
                assert f"{name}: its sequence is spread over the mesh axes s" in str(error), error
                assert "tilewise.jax.context_parallel_attention" in str(error)
            else:
                raise AssertionError("not refused")
# A sequence that is spread afterwards is nobody's loss.
mesh = mesh_of("Auto", s=devices)
after = jax.jit(functions({})[0], out_shardings=NamedSharding(mesh, P(None, None, "s")))
plain = arrays()
np.testing.assert_allclose(after(*plain), functions({})[0](*plain), atol=1e-5)
"""

SHARD_MAP = """
mesh = mesh_of("Auto", rows=2, heads=devices // 2)
plain = (*arrays(), jnp.asarray(rng.standard_normal((8, 24, 24)), jnp.float32))

def attend(q, k, v, bias):
    return tw.attention(q, k, v, mask=tw.causal(), bias=bias, kernel=kernel)

for names, own, shared in (({"rows", "heads"}, P("rows", "heads"), P("heads")), ({"rows"}, P("rows"), P())):
    inside = jax.shard_map(attend, mesh=mesh, in_specs=(own, own, own, shared), out_specs=own, axis_names=names)
    for function in (lambda f: f, lambda f: jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2, 3))):
        for got, wanted in zip(
            jax.tree.leaves(jax.jit(function(inside))(*plain)), jax.tree.leaves(function(attend)(*plain)), strict=True
        ):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
"""


def run(program: str, kernel: str, devices: int = 8) -> None:
    if kernel == "native":
        pytest.importorskip("tilewise._native")
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", dedent(COMMON) + dedent(program), kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "kernel", "devices"),
    [
        ("bias", "native", 8),
        ("grouped", "native", 8),
        pytest.param("bias", "native", 4, marks=SLOW),
        pytest.param("bias", "portable", 8, marks=SLOW),
        pytest.param("grouped", "portable", 4, marks=SLOW),
        pytest.param("numbered", "native", 8, marks=SLOW),
        pytest.param("predicate", "portable", 8, marks=SLOW),
    ],
)
def test_batch_rows_and_heads_are_spread(case, kernel, devices):
    run(f"CASES = {CASES[case]}\n" + SPREAD, kernel, devices)


def test_dropout_of_parts_is_native_and_that_of_the_whole():
    run(DROPPED, "native", 4)


def test_gradients_of_what_batch_rows_share():
    run(SHARED_BIAS, "native")


@pytest.mark.parametrize("kernel", ["native", pytest.param("portable", marks=SLOW)])
def test_spread_sequences_are_refused(kernel):
    run(REFUSED, kernel, 4)


@pytest.mark.parametrize("kernel", ["native", pytest.param("portable", marks=SLOW)])
def test_shard_map(kernel):
    run(SHARD_MAP, kernel, 4)
