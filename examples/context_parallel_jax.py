"""A small decoder learns text with every sequence spread over devices, and over one device, to the same losses.

    python examples/context_parallel_jax.py --devices 4 --steps 30

The devices are made of the CPU; with accelerators, give `--no-host`. Over several machines, start this on each, with
`jax.distributed.initialize()` (and its coordinator's address) before anything else; the mesh then spans them all.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

Parameters = dict[str, Any]


def text_bytes(count: int) -> Any:
    """The first `count` bytes of the standard library's longest modules: real text that is on every machine."""
    import numpy as np

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    found = b""
    for path in files:
        found += path.read_bytes()
        if len(found) >= count:
            break
    return np.frombuffer(found[:count], np.uint8).astype(np.int32)


def initial(key: Any, width: int, layers: int) -> Parameters:
    """Weights of a decoder over bytes: embedding (256, width) and blocks of attention and a two-layer network."""
    import jax

    def normal(shape: tuple[int, ...]) -> Any:
        nonlocal key
        key, used = jax.random.split(key)
        return jax.random.normal(used, shape) * shape[0] ** -0.5

    blocks = [
        {"qkv": normal((width, 3 * width)), "out": normal((width, width)), "up": normal((width, 4 * width)),
         "down": normal((4 * width, width))}
        for _ in range(layers)
    ]  # fmt: skip
    return {"embedding": normal((256, width)) * 4, "blocks": blocks}


def rotated(x: Any, places: Any) -> Any:
    """Rotary embedding (Su et al., 2021) of (B, S, H, D) at the positions (S,)."""
    import jax.numpy as jnp

    half = x.shape[-1] // 2
    angles = places[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1)


def loss_of(parameters: Parameters, tokens: Any, targets: Any, places: Any, heads: int, attend: Any) -> Any:
    """Mean cross entropy of the next byte over the positions given, (B, S) tokens and targets at `places` (S,)."""
    import jax
    import jax.numpy as jnp

    def normed(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    x = parameters["embedding"][tokens]
    for block in parameters["blocks"]:
        q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(normed(x) @ block["qkv"], 3, -1))
        x = x + attend(rotated(q, places), rotated(k, places), v).reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(normed(x) @ block["up"]) @ block["down"]
    scores = jax.nn.log_softmax(normed(x) @ parameters["embedding"].T)
    return -jnp.take_along_axis(scores, targets[..., None], -1).mean()


def train(devices: int, steps: int, length: int, strategy: str, sharding: str, width: int = 64) -> list[float]:
    """The loss of each step, with every sequence spread over so many devices.

    Args:
        length: positions of a sequence; a multiple of twice the devices.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    import tilewise as tw
    from tilewise.jax import context_parallel_attention, positions, shard

    heads, batch = 4, 2
    mesh = jax.make_mesh((devices,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def attend(q: Any, k: Any, v: Any) -> Any:
        return context_parallel_attention(
            q, k, v, mask=tw.causal(), layout="bshd", strategy=strategy, sharding=sharding
        )  # fmt: skip

    def local(parameters: Parameters, tokens: Any, targets: Any) -> Any:
        places = positions(length, sharding=sharding)
        # Each device's mean is over as many positions, so the mean of means is the mean of all.
        return jax.lax.pmean(loss_of(parameters, tokens, targets, places, heads, attend), "sp")

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, "sp"), P(None, "sp")), out_specs=P())

    @jax.jit
    def step(parameters: Parameters, moment: Parameters, rows: Any) -> tuple[Any, ...]:
        tokens, targets = (shard(x, devices, sharding=sharding, axis=1) for x in (rows[:, :-1], rows[:, 1:]))
        loss, gradient = jax.value_and_grad(spread)(parameters, tokens, targets)
        moment = jax.tree.map(lambda m, g: 0.9 * m + g, moment, gradient)
        return loss, jax.tree.map(lambda p, m: p - 0.05 * m, parameters, moment), moment

    parameters = initial(jax.random.key(0), width, layers=2)
    moment = jax.tree.map(jnp.zeros_like, parameters)
    text, losses = text_bytes(steps * batch * length + 1), []
    for n in range(steps):
        starts = [(n * batch + row) * length for row in range(batch)]
        rows = jnp.stack([jnp.asarray(text[start : start + length + 1]) for start in starts])
        loss, parameters, moment = step(parameters, moment, rows)
        losses.append(float(loss))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--strategy", default="ring", choices=("auto", "ring", "all_gather", "ulysses"))
    parser.add_argument("--sharding", default="zigzag", choices=("contiguous", "zigzag", "stripe"))
    parser.add_argument("--host", action=argparse.BooleanOptionalAction, default=True, help="devices made of the CPU")
    chosen = parser.parse_args()
    if chosen.host:  # jax reads this once, when it is first asked for its devices
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={chosen.devices}"
        os.environ.update(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    many = train(chosen.devices, chosen.steps, chosen.length, chosen.strategy, chosen.sharding)
    one = train(1, chosen.steps, chosen.length, "ring", "contiguous")
    print(f"{'step':>4}  {f'{chosen.devices} devices':>10}  {'1 device':>10}  {'difference':>10}")
    for n, (a, b) in enumerate(zip(many, one, strict=True)):
        if n % max(1, chosen.steps // 10) == 0 or n == chosen.steps - 1:
            print(f"{n:4}  {a:10.5f}  {b:10.5f}  {abs(a - b):10.1e}")
    worst = max(abs(a - b) / b for a, b in zip(many, one, strict=True))
    print(f"largest difference of a loss, relative: {worst:.1e}")
    if not worst < 1e-3:
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
