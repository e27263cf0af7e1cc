"""xlstm-jax's Llama attention over fsdp and tensor axes, in a process of its own: jax counts its devices once."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROGRAM = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tilewise.compat.xlstm_jax_llama import (
    ParallelConfig, SelfAttention, SelfAttentionConfig, gather_parameters, multihead_attention, parameter_specs)
from tilewise.compat.xlstm_jax_llama.sharding import over_mesh

fsdp, tensor = {fsdp}, {tensor}
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((4, 10, 64)), jnp.float32)
ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 10)), axis=1))
options = dict(head_dim=8, qk_norm=True, use_bias=True, reference_scale="num_heads")
parallel = ParallelConfig(fsdp_axis_size=fsdp, model_axis_size=tensor, fsdp_min_weight_size=100)
one, many = (SelfAttention(SelfAttentionConfig(**options, **more)) for more in ({{}}, {{"parallel": parallel}}))
first = one.init(jax.random.key(0), x)
params = jax.tree.map(lambda a: a + 0.1 * jnp.asarray(rng.standard_normal(a.shape), a.dtype), first)
mesh = Mesh(np.array(jax.devices()[:fsdp * tensor]).reshape(1, fsdp, 1, tensor), ("dp", "fsdp", "pp", "tp"))
specs = {{"params": parameter_specs(params["params"], parallel)}}
kernel = specs["params"]["dense_q"]["kernel"]
assert kernel == P("fsdp" if fsdp > 1 else None, "tp" if tensor > 1 else None, None), kernel

def place(tree, specs):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)

def loss(module):
    return lambda params, x, ids: jnp.sin(module.apply(params, x, segment_ids=ids)).mean()

def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), got, want)

want = jax.jit(jax.value_and_grad(loss(one), argnums=(0, 1)))(params, x, ids)
params, x, ids = place(params, specs), *place((x, ids), (P("fsdp"), P("fsdp")))

# Under jit, with and without a mesh that is set; with one, attention moves nothing between devices.
whole = jax.jit(jax.value_and_grad(loss(many), argnums=(0, 1)))
close(whole(params, x, ids), want)
with jax.set_mesh(mesh):
    close(whole(params, x, ids), want)
    q = jax.device_put(jnp.ones((4, 10, 8, 8)), NamedSharding(mesh, P("fsdp", None, "tp")))
    attend = jax.jit(over_mesh(lambda *qkv_ids: multihead_attention(*qkv_ids), parallel))
    text = attend.lower(q, q, q, ids).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)

# Inside shard_map the module works on its share; gradients of what is split are averaged, the others here.
@partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("fsdp"), P("fsdp")), out_specs=(P(), (specs, P("fsdp"))))
def step(params, x, ids):
    def local(params, x):
        params = {{"params": gather_parameters(params["params"], specs["params"], parallel)}}
        return loss(many)(params, x, ids)

    value, (d_params, d_x) = jax.value_and_grad(local, argnums=(0, 1))(params, x)
    d_params = jax.tree.map(lambda g, spec: g if "fsdp" in spec else g / fsdp, d_params, specs)
    return jax.lax.pmean(value, "fsdp"), (d_params, d_x / fsdp)

close(jax.jit(step)(params, x, ids), want)

# First values are those of one device.
tp_specs = {{"params": parameter_specs(first["params"], ParallelConfig(model_axis_size=tensor))}}
init = jax.shard_map(lambda key: many.init(key, jnp.ones((1, 2, 64))), mesh=mesh, in_specs=P(), out_specs=tp_specs)
jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(0)), first)
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("flax"), reason="flax is not installed")
@pytest.mark.parametrize(("fsdp", "tensor"), [(2, 4), (4, 2), (2, 2), (4, 1), (1, 4)])
def test_as_on_one_device(fsdp, tensor):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    program = [sys.executable, "-c", PROGRAM.format(fsdp=fsdp, tensor=tensor)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SHORT = """
import jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from tilewise.compat.xlstm_jax_llama import ParallelConfig, SelfAttention, SelfAttentionConfig

mesh = Mesh(np.array(jax.devices()), ("tp",))
def run(size, width):
    module = SelfAttention(SelfAttentionConfig(head_dim=8, parallel=ParallelConfig(model_axis_size=size)))
    jax.shard_map(lambda x: module.init_with_output(jax.random.key(0), x)[0], mesh=mesh, in_specs=P(), out_specs=P())(
        np.ones((1, 2, width), "float32"))
for size, width, word in ((4, 16, "model_axis_size: "), (2, 24, "x: ")):
    try:
        run(size, width)
    except ValueError as error:
        assert str(error).startswith(word), error
    else:
        raise SystemExit("no error")
run(2, 32)
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("flax"), reason="flax is not installed")
def test_sizes_that_do_not_go_together():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", SHORT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
