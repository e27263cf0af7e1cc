"""Small problems, one for each thing the portable kernel must do, in tiles so small that every tile boundary is met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import tilewise as tw
from tilewise.contract import Operands, Plan, Tiles
from tilewise.plan.choose import choose
from tilewise.validate import prepare

SMALL = Tiles(5, 7)
FAR = 2.0**100
ALL = frozenset({"q", "k", "v", "bias", "table", "sinks"})


def arrays(seed: int = 0, batch=2, heads=4, kv=2, q_len=13, k_len=17, dim=6, value=5) -> dict[str, np.ndarray]:
    """q, k, v in float64."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (batch, heads, q_len, dim), "k": (batch, kv, k_len, dim), "v": (batch, kv, k_len, value)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _holes(seed: int, *shape: int) -> np.ndarray:
    """A bias with -inf in places, all of row 3."""
    bias = _normal(seed, *shape)
    bias[np.random.default_rng(seed).random(shape) < 0.3] = -np.inf
    bias[..., 3, :] = -np.inf
    return bias


def _far(seed: int, *shape: int) -> np.ndarray:
    """A bias that carries the lse of whole rows so far from 0 that it cannot hold the logarithm of a sum as well."""
    bias = _normal(seed, *shape)
    bias[..., 2:6, :], bias[..., 8:10, :] = -FAR, FAR
    return bias


def _bits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.6


# name -> options of `tilewise.attention`, as functions of the convert(array) to the framework under test
CASES: dict[str, Any] = {
    "plain": lambda c: {},
    "causal": lambda c: {"mask": tw.causal("end")},
    "causal start": lambda c: {"mask": tw.causal("start")},
    "window": lambda c: {"mask": tw.window(3, 1, "end")},
    "sinks and window": lambda c: {"mask": tw.causal("end") & (tw.window(2, 0, "end") | tw.prefix(2))},
    "lengths": lambda c: {"mask": tw.lengths(q=c(np.array([13, 4])), k=c(np.array([5, 0])))},
    "documents": lambda c: {"mask": tw.documents(c(np.arange(13) % 3), c(np.arange(17) % 4))},
    "dense mask": lambda c: {"mask": tw.dense(c(_bits(1, 2, 4, 13, 17)))},
    "dense mask of keys": lambda c: {"mask": tw.dense(c(_bits(2, 2, 1, 1, 17)))},
    "predicate": lambda c: {"mask": tw.predicate(lambda b, h, i, j: (i * 3 + j + h + b) % 4 != 0)},
    "nobody sees": lambda c: {"mask": tw.dense(c(np.zeros((13, 17), bool)))},
    "bias": lambda c: {"bias": c(_normal(3, 2, 4, 13, 17))},
    "bias of heads": lambda c: {"bias": c(_normal(4, 1, 4, 13, 1))},
    "bias of keys": lambda c: {"bias": c(_normal(5, 2, 1, 1, 17))},
    "bias with holes": lambda c: {"bias": c(_holes(6, 2, 1, 13, 17)), "mask": tw.causal("end")},
    "two biases": lambda c: {"bias": tw.Bias.__add__(tw.relative(c(_normal(7, 29))), c(_normal(8, 13, 17)))},
    "alibi": lambda c: {"bias": tw.alibi(c(np.array([1.0, 0.5, 0.25, 0.1])), "end"), "mask": tw.causal("end")},
    "table": lambda c: {"bias": tw.relative(c(_normal(9, 2, 4, 29)))},
    "table with holes": lambda c: {"bias": tw.relative(c(np.where(np.arange(29) % 5 == 0, -np.inf, 0.5)))},
    "softcap": lambda c: {"softcap": 1.5, "mask": tw.causal("end"), "scale": 0.7},
    "sinks": lambda c: {"sinks": c(_normal(10, 4)), "mask": tw.window(2, 0, "start") & ~tw.prefix(3)},
    "dropout": lambda c: {"dropout": tw.Dropout(0.3, 77), "mask": tw.causal("end")},
    "everything": lambda c: {
        "mask": tw.causal("end") & tw.dense(c(_bits(11, 2, 1, 13, 17))),
        "bias": tw.relative(c(_normal(12, 1, 4, 29))) + c(_normal(13, 2, 1, 13, 17)) + c(_normal(14, 1, 4, 1, 17)),
        "softcap": 2.0,
        "sinks": c(_normal(15, 4)),
        "dropout": tw.Dropout(0.2, 5, 9),
        "scale": -0.6,
    },
}

# Rows whose lse is far from 0. In the caller's precision the definition itself overflows, without finite differences.
FAR_CASES: dict[str, Any] = {
    "far rows": lambda c: {"bias": c(_far(16, 2, 1, 13, 17)), "mask": tw.causal("end")},
    "far rows and sinks": lambda c: {
        "bias": tw.relative(c(_normal(17, 4, 29))) + c(_far(18, 13, 17)),
        "sinks": c(np.array([-FAR, 0.5, -FAR, FAR])),
        "dropout": tw.Dropout(0.2, 6),
        "softcap": 2.0,
    },
}
ALL_CASES = CASES | FAR_CASES


def planned(
    q: Any, k: Any, v: Any, *, kernel: str = "portable", tiles: Tiles | None = SMALL, **options: Any
) -> tuple[Plan, Operands]:
    """The plan of a call, wanting every gradient, and its operands."""
    defaults = dict.fromkeys(("mask", "bias", "scale", "softcap", "sinks", "dropout"))
    call = prepare(q, k, v, **{**defaults, "layout": "bhsd", "return_lse": True, **options})
    plan = choose(replace(call.problem, gradients=ALL), kernel, True)
    return (replace(plan, tiles=tiles) if tiles else plan), call.operands
