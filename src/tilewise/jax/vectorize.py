"""The maps of attention under `vmap`: the mapped axis becomes a part of the batch axis, or else a loop.

It can become one where each mapped example is then a batch row like any other, and nothing of Sq x Sk is copied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .case import Case, Flags
from .maps import BACKWARD, TANGENT, Map

Array = Any


def batch(of: Map, operands: tuple, axes: tuple, *, case: Case, chosen: Flags, local: bool) -> tuple[list, list[int]]:
    """The rule of `vmap` for one of the maps."""
    mapped = [axis is not None for axis in axes]
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    fronts = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    own, rows = _own(of, case, chosen, mapped), case.problem.batch
    if _folds(of, case, chosen, own, [x.shape[m:] for x, m in zip(fronts, mapped, strict=True)]):
        parts = zip(fronts, mapped, own, of.operands(case, chosen), strict=True)
        folded = [
            _folded(x, m, size, rows) if alone or (letters[0] == "b" and x.shape[0] > 1) else x
            for x, m, alone, letters in parts
        ]
        start = len(of.linear(case, chosen))
        larger = case.resized(folded[start : start + case.tree.num_leaves])
        results = of.bind(*folded, case=larger, chosen=chosen, local=local)
        return [x.reshape(size, rows, *x.shape[1:]) for x in results], [0] * len(results)

    def one(moving: list[Array]) -> list[Array]:
        rest = iter(moving)
        each = (next(rest) if m else x for x, m in zip(fronts, mapped, strict=True))
        return of.bind(*each, case=case, chosen=chosen, local=local)

    results = jax.lax.map(one, [x for x, m in zip(fronts, mapped, strict=True) if m])
    return results, [0] * len(results)


def _own(of: Map, case: Case, chosen: Flags, mapped: list[bool]) -> list[bool]:
    """Which operands each example needs for itself."""
    own, first = list(mapped), len(of.linear(case, chosen))
    full = [first, first + 1, first + 2, *range(first + case.tree.num_leaves, len(own))]  # q, k, v; out, lse
    places = [first + n for n, is_chosen in enumerate(chosen) if is_chosen]
    if of is BACKWARD:  # each example has its own gradients
        full += [0, 1, *places]
    for place in full:
        own[place] = True
    if of is TANGENT:  # an operand and its tangent have one shape
        for tangent, place in enumerate(places):
            own[tangent] = own[place] = own[tangent] or own[place]
    return own


def _folds(of: Map, case: Case, chosen: Flags, own: list[bool], shapes: list[tuple[int, ...]]) -> bool:
    """Whether every mapped example can be a batch row like any other, and nothing of Sq x Sk is copied for it."""
    if case.numbered:
        return False
    first, rows = len(of.linear(case, chosen)), case.problem.batch
    pairs = {first + n for n in case.of_pairs}
    summed = {first + n for n, is_chosen in enumerate(chosen) if is_chosen} if of is BACKWARD else set()
    for n, (letters, shape) in enumerate(zip(of.operands(case, chosen), shapes, strict=True)):
        if letters[0] != "b":
            if own[n]:
                return False
        elif own[n]:
            if shape[0] != rows and (n in pairs or n in summed or n < first):
                return False
        elif shape[0] != 1 and n in pairs:
            return False
    return True


def _folded(x: Array, mapped: bool, size: int, rows: int) -> Array:
    """(size * rows, …) from (size, rows or 1, …) where mapped, or from (rows or 1, …)."""
    x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
    return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(size * rows, *x.shape[2:])
