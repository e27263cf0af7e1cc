"""Attention over sequences that are spread over host devices, in other processes: jax counts its devices once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

if not hasattr(pytest.importorskip("jax"), "shard_map"):
    pytest.skip("needs jax 0.7 or newer", allow_module_level=True)
pytest.importorskip("tilewise._native")

SLOW = pytest.mark.slow
LIBRARY = Path(__file__).parents[1] / "lib"
# Compiling is nearly all of the time, and what it would optimise runs for milliseconds.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
COMMON = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import tilewise as tw
from tilewise.jax import context_parallel_attention, positions, shard, unshard
from support.spread_cases import *
"""


def run(program: str, devices: int) -> None:
    flags = f"--xla_force_host_platform_device_count={devices} {FLAGS}"
    paths = os.pathsep.join([str(LIBRARY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths}
    command = [sys.executable, "-c", dedent(COMMON) + dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


# (case, strategy, sharding, devices, inside, inner)
AGREE = [
    ("everything", "ring", "contiguous", 4, True, 1),
    ("everything", "all_gather", "zigzag", 4, False, 1),
    ("rows that see nothing", "ring", "contiguous", 4, False, 1),
]
SWEEP = [
    (case, strategy, sharding, devices, inside, inner)
    for devices in (4, 8)
    for case, inside in (("everything", True), ("documents", False), ("labels", True), ("predicate", False))
    for strategy, inner in (("ring", 1), ("all_gather", 1), ("ulysses", 1), ("grid", 2))
    for sharding in ("contiguous", "zigzag", "stripe")
    if not (strategy == "grid" and sharding == "stripe")
]


def test_results_and_gradients_are_the_oracles():
    """One process for all cases: it starts slower than it computes."""
    run(f"for case, *way in {AGREE}: check(case, Way(*way))", 4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", "grid"])
@pytest.mark.parametrize("devices", [4, 8])
def test_every_strategy_and_order(devices, strategy):
    cases = [case for case in SWEEP if case[3] == devices and case[1] == strategy]
    run(f"for case, *way in {cases}: check(case, Way(*way), kv_heads=8)", devices)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_narrow_dtypes_are_as_accurate_as_promised(dtype):
    run(f"check('everything', Way('ring', 'contiguous', 4), {dtype!r})", 4)


ULYSSES = """
qkv, values = operands("everything", "float32", kv_heads)
fixed = CASES["everything"][0]
way = Way("ulysses", sharding, 4, inside)
one = both(lambda q, k, v, values: tw.attention(q, k, v, **options(values, fixed)), qkv, values)
many = both(way.function(fixed), qkv, values)
for got, wanted in zip(jax.tree.leaves(many[0]), jax.tree.leaves(one[0]), strict=True):
    np.testing.assert_array_equal(got, wanted)
for got, wanted in zip(many[1][:3], one[1][:3], strict=True):
    if kv_heads >= 4 or got.shape[1] > kv_heads:  # else several devices add to the gradient of one kv head
        np.testing.assert_array_equal(got, wanted)
    else:
        np.testing.assert_allclose(got, wanted, atol=1e-4)
kinds = COLLECTIVE.findall(many[2].as_text())
assert "collective-permute" not in kinds and "all-to-all" in kinds, kinds
"""


@pytest.mark.parametrize(
    ("kv_heads", "sharding", "inside"), [(2, "zigzag", False), pytest.param(4, "contiguous", True, marks=SLOW)]
)
def test_heads_for_rows_give_the_bits_of_one_device(kv_heads, sharding, inside):
    run(f"kv_heads, sharding, inside = {kv_heads}, {sharding!r}, {inside}\n" + dedent(ULYSSES), 4)


COUNTED = """
# Forward alone: keys and values are a permutation each for every exchange that the schedule promises, and nothing else.
from tilewise.distributed import Layout, ring
from tilewise.masks.lower import lower
from tilewise.masks.site import Site

fixed = {"mask": tw.causal() & tw.window(7, 0)}
for devices in (4, 8):
    way = Way("ring", "contiguous", devices)
    qkv, values = operands("plain", "float32")
    text = jax.jit(lambda q, k, v: way.function(fixed)(q, k, v, {})).lower(*qkv).compile().as_text()
    layout = Layout("contiguous", S, devices)
    schedule = ring(layout, layout, lower(fixed["mask"], Site(1, 1, S, S)))
    promised = sum(schedule.exchanges(rank) for rank in range(devices))
    pairs = re.findall(r"collective-permute.*?source_target_pairs=\\{((?:\\{\\d+,\\d+\\},?)+)\\}", text)
    assert sum(len(found.split("},")) for found in pairs) == 2 * promised, (pairs, promised)
    # The window reaches one device back, however many there are.
    assert len(pairs) == 2 and set(COLLECTIVE.findall(text)) == {"collective-permute"}, pairs
"""


def test_what_is_sent_is_what_the_schedule_promises():
    run(COUNTED, 8)


SKIPPED = """
# Which blocks the native kernel computes, seen where it runs: below the diagonal and on it, and no other.
from tilewise.jax import ffi
inner, runs = ffi.forward, []

def counted(problem, smooth, facts):
    jax.debug.callback(lambda: runs.append(1))
    return inner(problem, smooth, facts)

ffi.forward = counted
qkv, values = operands("plain", "float32")
for mask, expected in ((tw.causal(), 4 * 5 // 2), (tw.causal() & tw.documents(np.arange(S) // 16), 4)):
    del runs[:]
    jax.block_until_ready(jax.jit(Way("ring", "contiguous", 4).function({"mask": mask}))(*qkv, {}))
    jax.effects_barrier()
    assert len(runs) == expected, (mask, len(runs), expected)
"""


def test_what_no_row_needs_is_not_computed():
    run(SKIPPED, 4)


ERROR = """
# In float32, over 1 to 8 devices: the error of many is at most twice that of one.
qkv, values = operands("plain", "float32")
wide = (np.asarray(x, np.float64) for x in qkv)
exact = tw.attention(*wide, mask=tw.causal(), kernel="reference", allow_quadratic=True)
errors = []
for devices in (1, 2, 4, 8):
    out, _ = jax.jit(Way("ring", "contiguous", devices).function({"mask": tw.causal()}))(*qkv, {})
    errors.append(np.abs(out - exact).max())
assert max(errors) <= 2 * errors[0], errors
"""


@pytest.mark.slow
def test_the_error_does_not_grow_with_the_devices():
    run(ERROR, 8)


MEMORY = """
def temporary(devices, length):
    mesh, names = mesh_of(devices)
    rows = P(None, None, names)
    local = jax.shard_map(
        lambda *x: context_parallel_attention(*x, mask=tw.causal(), axis_name=names, strategy="ring"),
        mesh=mesh, in_specs=rows, out_specs=rows,
    )
    x = [jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32, sharding=NamedSharding(mesh, rows))] * 3
    gradient = jax.jit(jax.grad(lambda *x: local(*x).sum(), (0, 1, 2)))
    return gradient.lower(*x).compile().memory_analysis().temp_size_in_bytes

# jax counts one device's temporary memory. Twice the devices hold twice the sequence in the same memory; and with the
# devices given, memory is linear in the length.
base = temporary(2, 2048)
assert temporary(4, 4096) < 1.5 * base, (temporary(4, 4096), base)
assert temporary(2, 8192) < 4.2 * base
"""


@pytest.mark.slow
def test_memory_is_linear_in_what_a_device_holds():
    run(MEMORY, 4)


DOOR = """
qkv, values = operands("plain", "float32")
q, k, v = qkv
mesh, names = mesh_of(4)

def refused(error, start, *arrays, **options):
    try:
        context_parallel_attention(*arrays, **options)
    except error as found:
        assert str(found).startswith(start), found
    else:
        raise AssertionError(f"not refused: {options}")

refused(ValueError, "axis_name: sp is bound by no enclosing shard_map", q, k, v)
refused(ValueError, "axis_name: the mesh has no axis rows", q, k, v, mesh=mesh, axis_name="rows")
refused(ValueError, "q: has 62 positions, expected a multiple of 4", q[:, :, 2:], k, v, mesh=mesh)
k_short, v_short = k[:, :, 4:], v[:, :, 4:]
refused(ValueError, "k: has 60 positions, expected a multiple of 8", q, k_short, v_short, mesh=mesh, sharding="zigzag")
refused(ValueError, "strategy: got 'rings'", q, k, v, mesh=mesh, strategy="rings")
refused(ValueError, "kernel: got 'reference'", q, k, v, mesh=mesh, kernel="reference")
refused(ValueError, "layout: got 'thd'", q, k, v, mesh=mesh, layout="thd")
refused(ValueError, "heads: got 6 query heads", q[:, :6], k[:, :2], v[:, :2], mesh=mesh, strategy="ulysses")
refused(ValueError, "mask: ", q, k, v, mesh=mesh, mask=np.ones((S, S // 2), bool))
refused(TypeError, "axis_name: got 3", q, k, v, axis_name=3)
refused(TypeError, "q: is a numpy array", *map(np.asarray, qkv), mesh=mesh)

# Arrays of a device's own rows mean what whole ones mean; and the layout of heads and rows is the caller's.
rng = np.random.default_rng(3)
bias, seen = jnp.asarray(rng.standard_normal((S, S)), jnp.float32), jnp.asarray(rng.random((8, S, S)) < 0.7)
wanted = tw.attention(q, k, v, mask=tw.dense(seen) & tw.causal(), bias=bias)
rows = P(None, None, "sp")
own = jax.shard_map(
    lambda q, k, v, bias, seen: context_parallel_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), mask=tw.dense(seen) & tw.causal(), bias=bias, layout="bshd"
    ).swapaxes(1, 2),
    mesh=mesh, in_specs=(rows, rows, rows, P("sp"), P(None, "sp")), out_specs=rows,
)
np.testing.assert_allclose(jax.jit(own)(q, k, v, bias, seen), wanted, atol=2e-6)

# Positions are where a device's rows stand.
for sharding in ("contiguous", "zigzag", "stripe"):
    here = jax.shard_map(lambda: positions(S, sharding=sharding), mesh=mesh, in_specs=(), out_specs=P("sp"))()
    np.testing.assert_array_equal(here, shard(jnp.arange(S), 4, sharding=sharding, axis=0))
    np.testing.assert_array_equal(unshard(here, 4, sharding=sharding, axis=0), np.arange(S))

# The plain call sends spread sequences here.
try:
    tw.attention(*(jax.device_put(x, NamedSharding(mesh, rows)) for x in qkv))
except ValueError as error:
    assert "tilewise.jax.context_parallel_attention" in str(error)
else:
    raise AssertionError("not refused")
"""


def test_the_door():
    run(DOOR, 4)


OTHER_AXES = """
# Batch rows on an axis of their own, left to jax where it is automatic; and a seed that is traced.
plain, values = operands("plain", "float32")
fixed = {"mask": tw.causal(), "return_lse": False}

def loss(function):
    return lambda q, k, v, seed: jnp.sin(function(q, k, v, dropout=tw.Dropout(0.3, seed), **fixed)).sum()

seed = jnp.uint32(7)
wanted = jax.jit(jax.value_and_grad(loss(tw.attention), (0, 1, 2)))(*plain, seed)
mesh = jax.make_mesh((2, 2), ("rows", "sp"), axis_types=(AxisType.Auto,) * 2)
spread = [jax.device_put(x, NamedSharding(mesh, P("rows", None, "sp"))) for x in plain]
for strategy in ("ring", "ulysses"):
    ours = loss(lambda *x, **options: context_parallel_attention(*x, mesh=mesh, strategy=strategy, **options))
    got = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(*spread, seed)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5)
mesh = jax.make_mesh((2, 2), ("rows", "sp"), axis_types=(AxisType.Explicit,) * 2)
try:
    context_parallel_attention(*plain, mesh=mesh)
except ValueError as error:
    assert str(error).startswith("mesh: has the explicit axes rows"), error
else:
    raise AssertionError("not refused")
"""


@pytest.mark.slow
def test_other_axes_of_the_mesh_are_left_alone():
    run(OTHER_AXES, 4)


@pytest.mark.slow
def test_the_example_learns_alike_on_many_devices_and_on_one():
    example = Path(__file__).parents[2] / "examples" / "context_parallel_jax.py"
    options = ["--steps", "4", "--length", "64", "--sharding", "contiguous"]
    environment = {**os.environ, "XLA_FLAGS": FLAGS}
    done = subprocess.run(
        [sys.executable, str(example), *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
