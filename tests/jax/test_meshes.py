"""Inside `shard_map` on a mesh of several devices, in a process of its own: jax counts its devices once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec
import tilewise as tw

q, k, v = (jnp.asarray(np.random.default_rng(n).standard_normal((4, 2, 10, 4)), jnp.float32) for n in range(3))
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

def attend(q, k, v):
    return tw.attention(q, k, v, mask=tw.causal(), bias=tw.alibi(jnp.ones(2)), kernel={kernel!r})

def gradient(q, k, v):
    return jax.grad(lambda k: jnp.sin(attend(q, k, v)).sum())(k)

for function in (attend, gradient):
    sharded = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    np.testing.assert_allclose(jax.jit(sharded)(q, k, v), function(q, k, v), atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["portable", "native"])
def test_shard_map(kernel):
    if kernel == "native":
        pytest.importorskip("tilewise._native")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = [sys.executable, "-c", PROGRAM.format(kernel=kernel)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
