"""Tiny differentiable problems for torch: extra tensors that want a gradient, and the options made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support.portable_cases import arrays

import tilewise as tw
from tilewise.contract import Tiles

SIZES = {"batch": 1, "heads": 2, "kv": 1, "q_len": 4, "k_len": 5, "dim": 2, "value": 1}


def _bits(*shape):
    return torch.from_numpy(np.random.default_rng(1).random(shape) < 0.6)


def _normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# name -> (differentiable extra tensors, options from them)
CASES = {
    "plain": ((), lambda: {}),
    "causal": ((), lambda: {"mask": tw.causal("end")}),
    "rows that see nothing": ((), lambda: {"mask": tw.causal("start") & ~tw.prefix(2)}),
    "dense mask": ((), lambda: {"mask": tw.dense(_bits(1, 2, 4, 5))}),
    "documents": ((), lambda: {"mask": tw.documents(torch.arange(4) % 2, torch.arange(5) % 3)}),
    "bias": ((_normal(1, 1, 2, 4, 5),), lambda bias: {"bias": bias}),
    "bias of keys": ((_normal(2, 1, 1, 1, 5),), lambda bias: {"bias": bias, "mask": tw.causal("end")}),
    "table": ((_normal(3, 2, 8),), lambda table: {"bias": tw.relative(table)}),
    "alibi": ((_normal(4, 2),), lambda slopes: {"bias": tw.alibi(slopes, "end"), "mask": tw.window(2, 0, "end")}),
    "sinks": ((_normal(5, 2),), lambda sinks: {"sinks": sinks, "mask": tw.causal("start") & ~tw.prefix(1)}),
    "softcap": ((), lambda: {"softcap": 0.8, "mask": tw.causal("end")}),
    "dropout": ((), lambda: {"dropout": tw.Dropout(0.4, 3), "mask": tw.causal("end")}),
    "everything": (
        (_normal(6, 8), _normal(7, 1, 2, 4, 1), _normal(8, 2)),
        lambda table, bias, sinks: {
            "bias": tw.relative(table) + bias,
            "sinks": sinks,
            "softcap": 1.2,
            "dropout": tw.Dropout(0.3, 11),
            "mask": tw.causal("end") & tw.dense(_bits(4, 5)),
            "scale": -0.8,
        },
    ),
}


def use_small_tiles(monkeypatch: Any) -> None:
    """Tiles of 3 x 4, so that sums over tiles are sums of several."""
    for module in ("kernels.portable.forward", "kernels.portable.backward"):
        monkeypatch.setattr(f"tilewise.{module}.tiles_of", lambda plan: Tiles(3, 4))
    monkeypatch.setattr("tilewise.torch.programs.default_tiles", lambda problem: Tiles(3, 4))


def problem(name: str) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """(function of tensors -> (out, lse with -inf taken out), tensors)."""
    extra, options = CASES[name]
    q, k, v = (torch.from_numpy(array) for array in arrays(**SIZES).values())

    def function(q, k, v, *extra):
        out, lse = tw.attention(q, k, v, return_lse=True, kernel="portable", **options(*extra))
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return function, tuple(tensor.clone().requires_grad_() for tensor in (q, k, v, *extra))
