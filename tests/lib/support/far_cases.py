"""Problems whose lse is far from 0 without a bias: queries and keys so large that float32 loses places of lse."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.portable_cases import arrays

import tilewise as tw

# What q and k are multiplied by: their scores are this squared.
FACTORS = (30, 100, 1000)

# name -> options of `tilewise.attention`, as functions of the convert(array) to the framework under test
LARGE_CASES: dict[str, Any] = {
    "plain": lambda c: {},
    "causal": lambda c: {"mask": tw.causal("end")},
    "sinks and dropout": lambda c: {
        "sinks": c(np.array([-9e4, 0.5, 2e3, 1e5])),
        "mask": tw.window(9, 5, "end"),
        "dropout": tw.Dropout(0.3, 4),
    },
    "least numbers": lambda c: {"bias": c(_least()), "softcap": 500.0},
}


def _least() -> np.ndarray:
    """A bias of the least number of float32, of whole rows and of the first keys of others."""
    bias = np.zeros((13, 17))
    bias[2:5], bias[7:, :6] = np.finfo(np.float32).min, np.finfo(np.float32).min
    return bias


def large(factor: float, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """q, k, v in float64; some keys stand twice, so that rows have more than one probability to tell apart."""
    given = arrays(seed, **{"dim": 16, **sizes})
    k, v = given["k"] * factor, given["v"]
    k[:, :, 1::2] = k[:, :, : k.shape[2] - 1 : 2]
    return {"q": given["q"] * factor, "k": k, "v": v}
