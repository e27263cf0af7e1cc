"""Calls over sequences that are spread over devices, held against the float64 oracle; for processes of several devices.

Importing this asks jax for its devices: the number must have been set in XLA_FLAGS before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accuracy import assert_accurate
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.plain import plain_gradients, plain_out

import tilewise as tw
from tilewise.contract import Gradients
from tilewise.jax import context_parallel_attention, shard, unshard
from tilewise.kernels.reference import dense
from tilewise.validate import prepare

S, HEADS, KV_HEADS = 64, 8, 4
_RNG = np.random.default_rng(0)
_SORTED = np.sort(_RNG.integers(0, 5, (2, S)), -1)
_MIXED = _RNG.integers(0, 3, (2, S))
_BITS = _RNG.random((2, 1, S, S)) < 0.6
_LEAVES = {
    "bias": _RNG.standard_normal((1, HEADS, S, S)),
    "table": _RNG.standard_normal((HEADS, 2 * S - 1)),
    "sinks": _RNG.standard_normal(HEADS),
}
# name -> the options without a derivative, and which of the leaves above are given
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "causal": ({"mask": tw.causal()}, ()),
    "window": ({"mask": tw.causal() & tw.window(9, 0)}, ("sinks",)),
    "documents": ({"mask": tw.causal() & tw.documents(_SORTED)}, ()),
    "labels": ({"mask": tw.documents(_MIXED) & tw.causal()}, ("table",)),
    "rows that see nothing": ({"mask": tw.lengths(q=np.array([S, 5]), k=np.array([9, 0]))}, ("sinks",)),
    "predicate": ({"mask": tw.predicate(lambda b, h, i, j: (3 * i + j + h + b) % 4 > 0) & tw.causal()}, ()),
    "everything": (
        {
            "mask": tw.causal() & tw.dense(_BITS),
            "softcap": 2.0,
            "scale": -0.6,
            "dropout": tw.Dropout(0.2, 5, 9),
        },
        ("bias", "table", "sinks"),
    ),
}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def options(values: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The options of `tilewise.attention`."""
    terms = [values[n] if n == "bias" else tw.relative(values[n]) for n in ("bias", "table") if n in values]
    bias = tw.relative(values["table"]) + values["bias"] if len(terms) == 2 else terms[0] if terms else None
    return {**fixed, "bias": bias, "sinks": values.get("sinks"), "return_lse": True}


def mesh_of(devices: int, inner: int = 1, kind: str = "Auto") -> tuple[Any, tuple[str, ...]]:
    """A mesh of the first devices, in one axis, or in two where `inner` of them spread heads."""
    shape, names = ((devices // inner, inner), ("ring", "heads")) if inner > 1 else ((devices,), ("sp",))
    kinds = (getattr(AxisType, kind),) * len(names)
    return jax.make_mesh(shape, names, axis_types=kinds, devices=jax.devices()[:devices]), names


@dataclass(frozen=True)
class Way:
    """How a call is spread: by which strategy, in which order, over how many devices, inside a `shard_map` or not."""

    strategy: str
    sharding: str
    devices: int
    inside: bool = True
    inner: int = 1
    kernel: str | None = None

    def function(self, fixed: dict[str, Any]) -> Callable[..., Any]:
        """(q, k, v, values) -> out, lse, over arrays in the sequence's own order."""
        mesh, names = mesh_of(self.devices, self.inner)
        how = {"axis_name": names, "strategy": self.strategy, "sharding": self.sharding, "kernel": self.kernel}

        def local(q: Any, k: Any, v: Any, values: Any) -> Any:
            return context_parallel_attention(q, k, v, **options(values, fixed), **how)

        def whole(q: Any, k: Any, v: Any, values: Any) -> Any:
            q, k, v = (shard(x, self.devices, sharding=self.sharding) for x in (q, k, v))
            if self.inside:
                rows = P(None, None, names)
                spread = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=rows)
                found = spread(q, k, v, values)
            else:
                found = context_parallel_attention(q, k, v, **options(values, fixed), **how, mesh=mesh)
            return tuple(unshard(x, self.devices, sharding=self.sharding) for x in found)

        return whole


def operands(case: str, dtype: str, kv_heads: int = KV_HEADS, dim: int = 8) -> tuple[Any, dict[str, Any]]:
    """q, k, v in a dtype, and the leaves that the case differentiates; tables and sinks in the accumulator's."""
    rng = np.random.default_rng(1)
    qkv = tuple(jnp.asarray(rng.standard_normal((2, h, S, dim)), dtype) for h in (HEADS, kv_heads, kv_heads))
    wide = "float64" if dtype == "float64" else "float32"
    kinds = {"bias": dtype, "table": wide, "sinks": wide}
    return qkv, {name: jnp.asarray(_LEAVES[name], kinds[name]) for name in CASES[case][1]}


def cotangents(out: Any, lse: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.standard_normal(out.shape), out.dtype), jnp.asarray(
        rng.standard_normal(lse.shape), lse.dtype
    )


def both(function: Callable[..., Any], qkv: Any, values: Any) -> tuple[Any, Any, Any]:
    """(out, lse), gradients to (q, k, v, values), and the compiled program of both."""

    @jax.jit
    def program(q: Any, k: Any, v: Any, values: Any) -> Any:
        found, pull = jax.vjp(function, q, k, v, values)
        return found, pull(cotangents(*found))

    compiled = program.lower(*qkv, values).compile()
    return (*compiled(*qkv, values), compiled)


def check(case: str, way: Way, dtype: str = "float64", kv_heads: int = KV_HEADS) -> Any:
    """Hold results and gradients against the oracle, to the rule of `accuracy`; returns the compiled program."""
    qkv, values = operands(case, dtype, kv_heads)
    fixed = CASES[case][0]
    (out, lse), (d_q, d_k, d_v, found), compiled = both(way.function(fixed), qkv, values)
    given = {"layout": "bhsd", **dict.fromkeys(("mask", "bias", "scale", "softcap", "sinks", "dropout"))}
    call = prepare(*qkv, **{**given, **options(values, fixed)})
    oracle = dense.attention(call.problem, call.operands)
    d_out, d_lse = cotangents(out, lse)
    exact = dense.gradients(oracle, d_out, d_lse)
    exact_plain, simple = None, Gradients(dense=(None,))
    if dtype != "float64":
        exact_plain = plain_out(call.problem, oracle, call.operands)
        simple = plain_gradients(call.problem, oracle, call.operands, d_out, d_lse)
    assert out.dtype == dtype
    assert_accurate("out", out, oracle.out, exact_plain)
    assert_accurate("lse", lse, oracle.lse)
    pairs = [("q", d_q, exact.q, simple.q), ("k", d_k, exact.k, simple.k), ("v", d_v, exact.v, simple.v)]
    if "bias" in values:
        pairs.append(("bias", found["bias"], exact.dense[0], simple.dense[0]))
    if "table" in values:
        pairs.append(("table", found["table"][None], exact.table, simple.table))
    if "sinks" in values:
        pairs.append(("sinks", found["sinks"], exact.sinks, simple.sinks))
    for name, got, truth, yardstick in pairs:
        assert_accurate(name, got, truth, yardstick, dtype=dtype)
    return compiled
