"""NaN and inf put where some rows see them and others don't, and who must then be changed."""

from __future__ import annotations

import numpy as np

import tilewise as tw

# Masks with rows that see the poisoned keys 2 and 9 and rows that don't, in the sizes of `portable_cases.arrays`.
MASKS = {
    "causal": lambda: tw.causal("start"),
    "window": lambda: tw.window(3, 0, "start"),
    "lengths": lambda: tw.lengths(q=np.array([13, 6]), k=np.array([9, 3])),
    "documents": lambda: tw.documents(np.arange(13) % 3, np.arange(17) % 4),
    "dense": lambda: tw.dense(np.random.default_rng(5).random((2, 4, 13, 17)) < 0.5),
    "predicate": lambda: tw.predicate(lambda b, h, i, j: (i + j) % 3 != 0),
}
KEYS = (2, 9)


def poisoned(operands: dict[str, np.ndarray], value: float) -> dict[str, np.ndarray]:
    """The arrays with keys and values of `KEYS` spoilt, in some of their components."""
    operands = {name: array.copy() for name, array in operands.items()}
    operands["k"][:, :, KEYS[0]] = value
    operands["v"][:, :, KEYS[1], 1:3] = value
    operands["v"][1, 0, KEYS[0], 0] = -value
    return operands


def rows_that_see(mask: tw.Mask, keys: tuple[int, ...] = KEYS) -> np.ndarray:
    """(B, Hq, Sq) booleans: whether a row sees one of the keys."""
    seen = tw.materialize(mask, 13, 17, batch=2, heads=4)
    return seen[..., list(keys)].any(-1)
