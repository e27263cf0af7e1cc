"""Attention as it is defined, one line per step, over whole (B, Hq, Sq, Sk) float64 arrays.

Nothing here is clever on purpose: the other kernels are held against it. Queries, keys and values of masked pairs may
hold anything, so every product over pairs goes through `visible_sum` or is masked element by element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..._arrays import Array
from ...contract import Gradients, Operands, Tangents
from ...masks.materialize import picture
from ...philox import keep_mask
from ...problem import AttentionProblem
from .arrays import float64

_IGNORED = np.errstate(all="ignore")  # NaN, inf and underflow are data here, not mistakes


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """One attention with all its intermediate arrays, float64.

    Attributes:
        q (B, Hq, Sq, D), k (B, Hq, Sk, D), v (B, Hq, Sk, Dv): k and v repeated for every query head.
        visible: (B, Hq, Sq, Sk) booleans; slope: derivative of the capped score by the score, or 1.
        p: probabilities before dropout; z: dropout's factor of each, 0 or 1 / (1 - p).
        p_sink: the sink's probabilities, (B, Hq, Sq), 0 without one.
        out: (B, Hq, Sq, Dv); lse: (B, Hq, Sq).
    """

    problem: AttentionProblem
    operands: Operands
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray
    slope: np.ndarray
    p: np.ndarray
    p_sink: np.ndarray
    z: np.ndarray
    out: np.ndarray
    lse: np.ndarray


@_IGNORED
def attention(problem: AttentionProblem, operands: Operands) -> Dense:
    """The forward pass in float64, whatever the dtype of the operands (rounded inputs are taken as exact)."""
    q, k, v = (float64(array) for array in (operands.q, operands.k, operands.v))
    k, v = (np.repeat(array, problem.group, axis=1) for array in (k, v))
    seen = np.array(picture(operands.mask))

    s = problem.scale * (q @ k.swapaxes(-1, -2))
    slope = np.ones_like(s)
    if problem.softcap is not None:
        t = np.tanh(s / problem.softcap)
        s, slope = problem.softcap * t, 1 - t * t
    bias = _bias(problem, operands)
    if bias is not None:
        s = s + bias
        seen &= bias != -np.inf  # NaN is not -inf: it is visible, and shows
    s = np.where(seen, s, -np.inf)

    peak = s.max(-1, initial=-np.inf)
    nothing = peak == -np.inf
    sinks = -np.inf if operands.sinks is None else float64(operands.sinks)[:, None]
    peak = np.where(nothing, 0.0, np.maximum(peak, sinks))
    weights = np.exp(s - peak[..., None])
    of_sink = np.where(nothing, 0.0, np.exp(sinks - peak))
    total = weights.sum(-1) + of_sink
    total = np.where(nothing, 1.0, total)
    lse = np.where(nothing, -np.inf, peak + np.log(total))
    p = weights / total[..., None]
    z = _dropout(problem, operands)
    return Dense(problem, operands, q, k, v, seen, slope, p, of_sink / total, z, visible_sum(p * z, v, seen), lse)


@_IGNORED
def gradients(dense: Dense, d_out: np.ndarray, d_lse: np.ndarray | None = None) -> Gradients:
    """The backward pass in float64.

    With g the gradient by the weighted probability and w that by the (capped, biased) score:
    g = z * (d_out . v),  w = p * (g - sum_j p g + d_lse).
    """
    problem, operands, d_out = dense.problem, dense.operands, float64(d_out)
    d_lse = np.zeros(dense.lse.shape) if d_lse is None else float64(d_lse)
    g = np.where(dense.visible, dense.z * (d_out @ dense.v.swapaxes(-1, -2)), 0.0)
    pull = np.where(dense.visible.any(-1), d_lse - (dense.p * g).sum(-1), 0.0)
    w = np.where(dense.visible, dense.p * (g + pull[..., None]), 0.0)
    raw = np.where(dense.visible, problem.scale * w * dense.slope, 0.0)
    down = dense.visible.swapaxes(-1, -2)
    return Gradients(
        q=visible_sum(raw, dense.k, dense.visible),
        k=_per_kv_head(problem, visible_sum(raw.swapaxes(-1, -2), dense.q, down)),
        v=_per_kv_head(problem, visible_sum((dense.p * dense.z).swapaxes(-1, -2), d_out, down)),
        dense=tuple(_sum_to(w, tuple(array.shape)) for array in operands.dense),
        table=_along_diagonals(w, operands.table) if operands.table is not None else None,
        sinks=_sink_gradient(dense, pull) if operands.sinks is not None else None,
    )


@_IGNORED
def tangents(dense: Dense, moving: Tangents) -> tuple[np.ndarray, np.ndarray]:
    """How out and lse move with the operands, in float64.

    With w the tangent of the (capped, biased) score: d_lse = sum_j p w, and the sink's probability times its tangent;
    d_out = sum_j z p (w v + d_v) - d_lse out.
    """
    problem, operands, seen = dense.problem, dense.operands, dense.visible
    w = np.zeros(seen.shape)
    if moving.q is not None:
        w = w + float64(moving.q) @ dense.k.swapaxes(-1, -2)
    if moving.k is not None:
        w = w + dense.q @ np.repeat(float64(moving.k), problem.group, axis=1).swapaxes(-1, -2)
    w = problem.scale * w * dense.slope
    biases = tuple(array for array in moving.dense if array is not None)
    bias = _bias(problem, replace(operands, dense=biases, table=moving.table))
    w = np.where(seen, dense.p * (w if bias is None else w + bias), 0.0)
    d_lse, d_out = w.sum(-1), visible_sum(w * dense.z, dense.v, seen)
    if moving.v is not None:
        d_v = np.repeat(float64(moving.v), problem.group, axis=1)
        d_out = d_out + visible_sum(np.where(seen, dense.p, 0.0) * dense.z, d_v, seen)
    empty = dense.lse == -np.inf
    if moving.sinks is not None:
        d_lse = d_lse + dense.p_sink * float64(moving.sinks)[:, None]
    return np.where(empty[..., None], 0.0, d_out - d_lse[..., None] * dense.out), np.where(empty, 0.0, d_lse)


def visible_sum(weights: np.ndarray, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Sum over visible j of weights[…, i, j] * values[…, j, :]. What is not visible is not touched, be it NaN."""
    finite = np.isfinite(values)
    total = np.where(visible, weights, 0.0) @ np.where(finite, values, 0.0)
    for j in np.flatnonzero((~finite).any(axis=(0, 1, 3))):
        rest = np.where(finite[:, :, j], 0.0, values[:, :, j])[:, :, None, :]
        total = total + np.where(visible[..., j, None], weights[..., j, None] * rest, 0.0)
    return total


def _bias(problem: AttentionProblem, operands: Operands) -> np.ndarray | None:
    """The sum of all biases, broadcasting to (B, Hq, Sq, Sk), or None."""
    terms = [float64(array) for array in operands.dense]
    if operands.table is not None:
        i, j = np.ix_(range(problem.q_len), range(problem.k_len))
        terms.append(float64(operands.table)[:, :, j - i + problem.q_len - 1])
    return sum(terms[1:], terms[0]) if terms else None


def _dropout(problem: AttentionProblem, operands: Operands) -> np.ndarray:
    sizes = (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
    if operands.dropout is None:
        return np.ones((1, 1, 1, 1))
    b, h, i, j = np.ix_(*(np.arange(size) for size in sizes))
    dropout = operands.dropout
    first = _integers(dropout.first) if dropout.strides else 0
    dropout = replace(dropout, seed=_integers(dropout.seed), first=first)
    keep = keep_mask(dropout, b, h, i, j, *sizes[1:], np)
    return keep * dropout.inverse_keep


def _integers(words: Array) -> tuple[int, ...]:
    return tuple(int(word) for word in words)


def _per_kv_head(problem: AttentionProblem, array: np.ndarray) -> np.ndarray:
    """(B, Hq, Sk, D) summed over the query heads that share a kv head: (B, Hkv, Sk, D)."""
    batch, _, *rest = array.shape
    return array.reshape(batch, problem.kv_heads, problem.group, *rest).sum(2)


def _sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which `shape` was broadcast."""
    axes = tuple(axis for axis, (size, full) in enumerate(zip(shape, array.shape, strict=True)) if size != full)
    return array.sum(axes, keepdims=True)


def _along_diagonals(w: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Gradient of a table over j - i: sums along diagonals, then over broadcast axes."""
    q_len, k_len = w.shape[-2:]
    total = np.zeros((*w.shape[:2], table.shape[-1]))
    for i in range(q_len):
        start = q_len - 1 - i
        total[..., start : start + k_len] += w[..., i, :]
    return _sum_to(total, tuple(table.shape))


def _sink_gradient(dense: Dense, pull: np.ndarray) -> np.ndarray:
    """(Hq,): the sink is one more key with a probability and no value."""
    return (dense.p_sink * pull).sum((0, 2))
