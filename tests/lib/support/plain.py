"""Plain attention, the yardstick of accuracy: the lines of every textbook, in the caller's dtype and framework."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from tilewise._arrays import family_of
from tilewise.contract import Gradients, Operands
from tilewise.kernels.reference.arrays import float64
from tilewise.kernels.reference.dense import Dense
from tilewise.problem import AttentionProblem

Leaves = tuple[Any, ...]  # q, k, v, the dense biases, the table, the sinks; the last two may be None


def leaves(operands: Operands) -> Leaves:
    """The operands that have gradients."""
    return (operands.q, operands.k, operands.v, *operands.dense, operands.table, operands.sinks)


def plain(problem: AttentionProblem, oracle: Dense, values: Leaves) -> tuple[Any, Any]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), all in q's dtype; mask and dropout are the oracle's, as arrays."""
    q, k, v, *dense, table, sinks = values
    xp = {"numpy": np, "torch": sys.modules.get("torch")}.get(family_of(q)) or sys.modules["jax"].numpy
    dtype = q.dtype

    def cast(array: Any) -> Any:
        return array.to(dtype) if xp is sys.modules.get("torch") else xp.asarray(array, dtype=dtype)

    def constant(array: np.ndarray) -> Any:
        return xp.asarray(np.array(array))

    repeat = xp.repeat_interleave if hasattr(xp, "repeat_interleave") else xp.repeat
    k, v = repeat(k, problem.group, 1), repeat(v, problem.group, 1)
    s = problem.scale * (q @ k.swapaxes(-1, -2))
    if problem.softcap is not None:
        s = problem.softcap * xp.tanh(s / problem.softcap)
    for bias in dense:
        s = s + cast(bias)
    if table is not None:
        i, j = np.ix_(range(problem.q_len), range(problem.k_len))
        s = s + cast(table)[:, :, constant(j - i + problem.q_len - 1)]
    s = xp.where(constant(oracle.visible), s, -np.inf)
    peak = xp.amax(s, -1)[..., None]
    peak = xp.where(peak == -np.inf, 0.0, peak)
    weights = xp.exp(s - peak)
    total = weights.sum(-1)[..., None]
    if sinks is not None:
        total = total + xp.exp(cast(sinks)[:, None, None] - peak)
    total = xp.where(constant(oracle.lse == -np.inf)[..., None], 1.0, total)
    out = (weights / total * cast(constant(np.broadcast_to(oracle.z, s.shape)))) @ v
    return out, (peak + xp.log(total))[..., 0]


def plain_out(problem: AttentionProblem, oracle: Dense, operands: Operands) -> Any:
    """The yardstick's forward, or None where there are no scores at all or NumPy lacks the dtype."""
    if not problem.scores:
        return None
    values = leaves(operands)
    if problem.family == "numpy" and problem.dtype == "bfloat16":
        return None
    with np.errstate(all="ignore"):
        return plain(problem, oracle, values)[0]


def plain_gradients(
    problem: AttentionProblem, oracle: Dense, operands: Operands, d_out: Any, d_lse: Any
) -> Gradients | None:
    """The yardstick's gradients by the framework's own differentiation; NumPy has none and borrows torch's."""
    if not problem.scores:
        return None
    values = leaves(operands)
    if problem.family == "jax":
        return _by_jax(problem, oracle, values, d_out, d_lse)
    if find_spec("torch") is None:
        return None
    torch = import_module("torch")
    dtype = getattr(torch, problem.dtype)
    tensors = [_leaf(torch, value, dtype if n < 3 else None) for n, value in enumerate(values)]
    out, lse = plain(problem, oracle, tuple(tensors))
    wanted = [tensor for tensor in tensors if tensor is not None]
    pulled = [_tensor(torch, given).to(dtype) for given in (d_out, d_lse)]
    found = iter(torch.autograd.grad((out, lse), wanted, pulled))
    return _gradients([None if tensor is None else next(found) for tensor in tensors])


def _tensor(torch: Any, value: Any) -> Any:
    return value.detach() if family_of(value) == "torch" else torch.tensor(float64(value))


def _leaf(torch: Any, value: Any, dtype: Any) -> Any:
    if value is None:
        return None
    tensor = _tensor(torch, value)
    return tensor.to(dtype or tensor.dtype).clone().requires_grad_()


def _by_jax(problem: AttentionProblem, oracle: Dense, values: Leaves, d_out: Any, d_lse: Any) -> Gradients:
    jax = sys.modules["jax"]
    (out, lse), pull = jax.vjp(lambda *leaves: plain(problem, oracle, leaves), *values)
    return _gradients(list(pull((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))))


def _gradients(found: list[Any]) -> Gradients:
    return Gradients(found[0], found[1], found[2], tuple(found[3:-2]), found[-2], found[-1])
