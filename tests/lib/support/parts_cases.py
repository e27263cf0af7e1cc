"""Problems that tile registers multiply in parts of bfloat16, and attention by its definition beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from accuracy import assert_accurate

import tilewise as tw

# Numbers that parts cannot hold, by the type of the operands.
STRANGE = {
    "float16": [np.nan, np.inf, -np.inf],
    "float32": [np.nan, np.inf, -np.inf, float(np.finfo(np.float32).max), 2.0**56, -1e30, 1e-38, -1e-45, 2.0**-101],
}
STRANGE_OF_TYPES = [(dtype, number) for dtype, numbers in STRANGE.items() for number in numbers]
FACTS = ["plain", "causal", "window", "documents", "bits", "bias", "barring bias", "table", "softcap", "sinks"]


def arrays(q_len: int, k_len: int, dim: int, value: int, heads=(4, 2), batch=2, dtype="float32") -> list[np.ndarray]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv)."""
    rng = np.random.default_rng(q_len * k_len)
    shapes = [(heads[0], q_len, dim), (heads[1], k_len, dim), (heads[1], k_len, value)]
    return [rng.standard_normal((batch, *shape)).astype(dtype) for shape in shapes]


def run(q, k, v, **options):
    """Out and lse by the native kernel."""
    return tw.attention(q, k, v, kernel="native", return_lse=True, **options)


def exact(q, k, v, seen=True, scale=None, softcap=None, bias=0.0, sinks=None, dtype: Any = float):
    """Out and lse by the definition; in float64, or as plain attention in float32."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.astype(dtype) for x in (q, np.repeat(k, group, 1), np.repeat(v, group, 1)))
    s = dtype(q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    s = (softcap * np.tanh(s / softcap) if softcap else s) + np.asarray(bias, dtype)
    s = np.where(seen, s, dtype(-np.inf))
    some = ~(s == -np.inf).all(-1, keepdims=True)
    extra = np.full((q.shape[1], 1, 1), -np.inf) if sinks is None else np.reshape(sinks, (-1, 1, 1))
    extra = extra.astype(dtype)
    top = np.where(some, np.maximum(s.max(-1, keepdims=True), extra), dtype(0))
    p = np.exp(s - top)
    total = np.where(some, p.sum(-1, keepdims=True) + np.exp(extra - top), dtype(1))
    lse = np.where(some, top + np.log(total), -np.inf)[..., 0]
    return np.where(some, p / total, dtype(0)) @ v, lse


def same(found, expected) -> None:
    """Raise unless both are alike to the bit."""
    for got, other in zip(found, expected, strict=True):
        assert got.shape == other.shape and got.tobytes() == other.tobytes()


def accurate(found, exact, plain=None) -> None:
    """Raise unless out and lse are as near to the exact ones as promised."""
    assert_accurate("out", found[0], exact[0], plain)
    assert_accurate("lse", found[1], exact[1], dtype="float32")


def facts(name: str, q, k) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the call, and the same for `exact`."""
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    rng = np.random.default_rng(q_len)
    i, j = np.arange(q_len)[:, None], np.arange(k_len)
    bits = rng.random((batch, 1, q_len, k_len)) < 0.4
    rows, keys = (np.sort(rng.integers(0, 4, (batch, n)), -1) for n in (q_len, k_len))
    dense = 5 * rng.standard_normal((1, heads, q_len, k_len)).astype(np.float32)
    barred = np.where(bits, 0, -np.inf).astype(np.float32)
    table = rng.standard_normal((heads, q_len + k_len - 1)).astype(np.float32)
    sinks = 9 * rng.standard_normal(heads).astype(np.float32)
    end = i + k_len - q_len
    return {
        "plain": ({}, {}),
        "causal": ({"mask": tw.causal("end")}, {"seen": j <= end}),
        "window": ({"mask": tw.window(40, 7, "end")}, {"seen": (j >= end - 40) & (j <= end + 7)}),
        "documents": (
            {"mask": tw.documents(rows, keys)},
            {"seen": rows[:, None, :, None] == keys[:, None, None]},
        ),
        "bits": ({"mask": tw.dense(bits)}, {"seen": bits}),
        "bias": ({"bias": dense}, {"bias": dense}),
        "barring bias": ({"bias": barred}, {"bias": barred}),
        "table": ({"bias": tw.relative(table)}, {"bias": table[:, j - i + q_len - 1]}),
        "softcap": ({"softcap": 2.0, "scale": 1.0}, {"softcap": 2.0, "scale": 1.0}),
        "sinks": ({"sinks": sinks, "mask": tw.causal("end")}, {"sinks": sinks, "seen": j <= end}),
        "negative scale": ({"scale": -0.4}, {"scale": -0.4}),
        "scale 0": ({"scale": 0.0}, {"scale": 0.0}),
        "tiny scale": ({"scale": 1e-40}, {"scale": 1e-40}),
    }[name]
