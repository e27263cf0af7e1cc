"""The online softmax, stated once: what is kept of the keys seen so far, and how two parts of the keys are joined.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), extended by the weighted values.
A row that has seen nothing has peak -inf and weight 0; it ends as out 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log
from typing import Any

from .._arrays import Array, Family, dtype_name, family_of
from ..problem import AttentionProblem

_MINUS_INF = float("-inf")

# Where a row's lse is farther from 0 than this, exp(score - lse) of its keys is summed up again by backward passes: lse
# has lost too many places of the logarithm of that sum to make it 1.
FAR = 177.0


def far_from(dropout: float, dtype: str) -> float:
    """How far from 0 lse must be for a row to be taken for far: all rows are where dropout keeps a quarter or fewer.

    There out has been multiplied by 4 and more before it was rounded to a half type, and what backward passes take from
    it, d_out . out, would be wrong by as much. Of far rows that is summed anew.
    """
    return -1.0 if dropout >= 0.75 and dtype in ("float16", "bfloat16") else FAR


def is_far(lse: Array, least: float = FAR) -> Array:
    """Booleans, which rows' lse is: not that of a row that sees nothing, nor what is no number. Of any framework."""
    return (abs(lse) > least) & (abs(lse) < float("inf"))


def may_be_far(problem: AttentionProblem) -> bool:
    """Whether a row's lse can be far from 0, and it can be mended: of a part of the keys it cannot.

    A soft cap bounds the scores, and so lse, unless biases or sinks are added.
    """
    if problem.part:
        return False
    if far_from(problem.dropout, problem.dtype) < 0:
        return True
    bound = inf if problem.softcap is None else problem.softcap + log(max(1, problem.k_len))
    return bool(problem.bias.dense) or problem.bias.table or problem.sinks or bound > FAR


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Partial softmax of some rows, in the accumulator's dtype; an empty state is neutral in `merge`.

    The peak is kept apart from the total, not folded into one lse: scores minus peak are exact where scores are large.

    Attributes:
        peak: (…, rows) largest score so far, -inf where none.
        total: (…, rows) sum of exp(score - peak).
        weighted: (…, rows, Dv) sum of exp(score - peak) * value.
    """

    peak: Array
    total: Array
    weighted: Array

    @classmethod
    def empty(cls, zeros: Callable[..., Array], shape: tuple[int, ...], width: int) -> State:
        """Nothing seen yet. `zeros(shape)` makes arrays of the accumulator's dtype."""
        return cls(zeros(shape) + _MINUS_INF, zeros(shape), zeros((*shape, width)))

    def absorb(self, xp: Any, scores: Array, weigh: Callable[[Array], Array]) -> State:
        """The state after a tile of keys.

        Args:
            xp: namespace with `amax`, `maximum`, `where` and `exp`: numpy, torch or jax.numpy.
            scores: (…, rows, keys), -inf where a key is not seen; at least one key.
            weigh: turns weights (…, rows, keys) into the sum of weighted values (…, rows, Dv).
        """
        peak = xp.maximum(self.peak, xp.amax(scores, -1))
        base = _finite_base(xp, peak)
        fade, weights = xp.exp(self.peak - base), xp.exp(scores - base[..., None])
        return State(peak, self.total * fade + weights.sum(-1), self.weighted * fade[..., None] + weigh(weights))

    def merge(self, xp: Any, other: State) -> State:
        """The state after the keys of both."""
        peak = xp.maximum(self.peak, other.peak)
        base = _finite_base(xp, peak)
        a, b = xp.exp(self.peak - base), xp.exp(other.peak - base)
        weighted = self.weighted * a[..., None] + other.weighted * b[..., None]
        return State(peak, self.total * a + other.total * b, weighted)

    def finish(self, xp: Any, sinks: Array | None = None) -> tuple[Array, Array]:
        """(out (…, rows, Dv), lse (…, rows)); `sinks` (broadcasting to rows) add exponents to the denominator alone."""
        # Not by the peak: XLA's maximum may lose a NaN on the CPU, which the total keeps. A row that has seen a key has
        # a total of at least 1.
        nothing = self.total == 0
        peak, total, weighted = self.peak, self.total, self.weighted
        if sinks is not None:
            # A row that sees nothing keeps lse -inf in spite of its sink.
            peak = xp.where(nothing, peak, xp.maximum(peak, sinks))
            base = _finite_base(xp, peak)
            fade = xp.exp(self.peak - base)
            total, weighted = total * fade + xp.exp(sinks - base), weighted * fade[..., None]
        total = xp.where(nothing, 1.0, total)
        return weighted / total[..., None], peak + xp.log(total)


def merge(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, *more: Array, layout: str = "bhsd"
) -> tuple[Array, Array]:
    """Attention over the union of disjoint sets of keys, from attention over each.

    Differentiable in the arrays' own framework. A sink must have been given to one of the parts only.

    Args:
        out_a, out_b: (B, H, Sq, Dv), results of `attention(…, return_lse=True)` for the same queries.
        lse_a, lse_b: (B, H, Sq), their log-sum-exp; -inf where a row saw nothing.
        more: further pairs out, lse.
        layout: that of the outputs, as in `attention`: "bshd" takes out (B, Sq, H, Dv), "thd" out (T, H, Dv) with
            lse (H, T).

    Returns:
        (out, lse) in the shapes and dtypes of out_a and lse_a; out 0 and lse -inf where no part saw anything.

    Raises:
        TypeError: an argument is no array, or of another framework than out_a.
        ValueError: shapes do not belong together, or `more` has an out without its lse.
    """
    if len(more) % 2:
        raise ValueError(f"more: got {len(more)} arrays, expected pairs of out and lse")
    if layout not in ("bhsd", "bshd", "thd"):
        raise ValueError(f"layout: got {layout!r}, expected 'bhsd', 'bshd' or 'thd'")
    family = _check(out_a, lse_a, out_b, lse_b, *more, layout=layout)
    xp, out, lse = _module(family), out_a, lse_a
    rest = (out_b, lse_b, *more)
    for other_out, other_lse in zip(rest[::2], rest[1::2], strict=True):
        out, lse = _merge_pair(xp, out, lse, other_out, other_lse, layout)
    return out, lse


def _merge_pair(xp: Any, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, layout: str) -> tuple[Array, Array]:
    # Every -inf is replaced before it meets an exp or a subtraction, and its weight is set afterwards, so that neither
    # values nor derivatives of any order ever see inf - inf.
    empty_a, empty_b = lse_a == _MINUS_INF, lse_b == _MINUS_INF
    nothing = empty_a & empty_b
    held_a, held_b = xp.where(empty_a, 0.0, lse_a), xp.where(empty_b, 0.0, lse_b)
    held_a, held_b = xp.where(empty_a, held_b, held_a), xp.where(empty_b, held_a, held_b)
    base = xp.maximum(held_a, held_b)
    a = xp.where(empty_a, 0.0, xp.exp(held_a - base))
    b = xp.where(empty_b, 0.0, xp.exp(held_b - base))
    total = xp.where(nothing, 1.0, a + b)
    parts = []
    for out, weight, empty in ((out_a, a, empty_a), (out_b, b, empty_b)):
        seen = xp.where(_beside(empty, layout), 0.0, _like(out, lse_a))
        parts.append(_beside(weight / total, layout) * seen)
    lse = xp.where(nothing, _MINUS_INF, base + xp.log(total))
    return _like(parts[0] + parts[1], out_a), lse


def _finite_base(xp: Any, peak: Array) -> Array:
    """The peak, or 0 where nothing was seen: -inf minus -inf would be NaN."""
    return xp.where(peak == _MINUS_INF, 0.0, peak)


def _beside(row: Array, layout: str) -> Array:
    """One value per row, (…, H, S), shaped to stand beside outputs of the layout."""
    return (row if layout == "bhsd" else row.swapaxes(-1, -2))[..., None]


def _like(value: Array, example: Array) -> Array:
    return value.to(example.dtype) if family_of(value) == "torch" else value.astype(example.dtype)


def _module(family: Family) -> Any:
    if family == "torch":
        import torch

        return torch
    if family == "jax":
        import jax.numpy

        return jax.numpy
    import numpy

    return numpy


def _check(*arrays: Array, layout: str) -> Family:
    names = ["out_a", "lse_a", "out_b", "lse_b", *(f"more[{n}]" for n in range(len(arrays) - 4))]
    family = family_of(arrays[0])
    if family is None:
        raise TypeError(f"out_a: got {type(arrays[0]).__name__}, expected a NumPy array, a torch tensor or a jax array")
    out_shape = tuple(arrays[0].shape)
    rows = out_shape[:-1] if layout == "bhsd" else (*out_shape[:-3], *out_shape[-3:-1][::-1])
    for n, (name, array) in enumerate(zip(names, arrays, strict=True)):
        if family_of(array) != family:
            raise TypeError(f"{name}: got {type(array).__name__}, expected a {family} array as out_a is")
        if "float" not in dtype_name(array):
            raise TypeError(f"{name}: got dtype {dtype_name(array)}, expected floats")
        expected = rows if n % 2 else out_shape
        if tuple(array.shape) != expected:
            raise ValueError(
                f"{name}: has shape {tuple(array.shape)}, expected {expected} "
                f"beside out_a {out_shape}, layout={layout!r}"
            )
    return family
