"""A call as a problem and its operands."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from .._arrays import Array, Family, device_kind, device_model, dtype_name, is_abstract
from ..contract import Dropout, Operands
from ..environment import deterministic
from ..masks.algebra import Mask
from ..masks.biases import Bias
from ..masks.lower import LoweredMask, lower
from ..masks.primitives import Predicate
from ..masks.site import site_for
from ..problem import AttentionProblem, BiasFacts, Gradient, Invariance
from .arrays import check_arrays
from .options import Checked, check_invariance, check_options

# Whether equal inputs must give equal bits, read once: plans are remembered.
DETERMINISTIC = deterministic()


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A validated call: the problem, its operands in (B, H, S, D) views."""

    problem: AttentionProblem
    operands: Operands


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | Array | None,
    bias: Bias | Array | None,
    scale: float | None,
    softcap: float | None,
    sinks: Array | float | None,
    dropout: Dropout | None,
    layout: str,
    return_lse: bool,
    invariance: str = "batch",
) -> Call:
    """Check every argument of `tilewise.attention` and translate them.

    Raises:
        ValueError, TypeError: whose first word is the argument, with what was got and what was expected.
    """
    arrays = check_arrays(q, k, v, layout)
    checked = check_options(arrays, mask, bias, scale, softcap, sinks, dropout)
    same = check_invariance(invariance, checked.dropout)
    family, q, k, v, _ = arrays
    lowered = _lowered(checked)
    operands = Operands(q, k, v, lowered, checked.biases.dense, checked.biases.table, checked.sinks, checked.dropout)
    traced = any(is_abstract(array) for array in (q, k, v, *mask_operands(lowered)))
    problem = problem_of(
        family,
        operands,
        layout=layout,
        scale=checked.scale,
        softcap=checked.softcap,
        gradients=_wanted(family, operands, traced),
        return_lse=bool(return_lse),
        traced=traced,
        invariance=same,
    )
    return Call(problem, operands)


def problem_of(
    family: Family,
    operands: Operands,
    *,
    layout: str,
    scale: float | None,
    softcap: float | None,
    gradients: frozenset[Gradient],
    return_lse: bool = False,
    traced: bool = False,
    invariance: Invariance = "batch",
) -> AttentionProblem:
    """The question that validated operands ask."""
    q, k, v = operands.q, operands.k, operands.v
    model, architecture = device_model(q)
    return AttentionProblem(
        family=family,
        device=device_kind(q),
        dtype=dtype_name(q),
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        layout=layout,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        mask=operands.mask.facts,
        bias=BiasFacts(
            tuple(_four(array.shape) for array in operands.dense),
            operands.table is not None,
            tuple(dtype_name(array) for array in operands.dense),
        ),
        softcap=softcap,
        sinks=operands.sinks is not None,
        dropout=operands.dropout.p if operands.dropout is not None else 0.0,
        gradients=gradients,
        return_lse=return_lse,
        traced=traced,
        invariance=invariance,
        model=model,
        architecture=architecture,
        deterministic=DETERMINISTIC,
    )


def mask_operands(lowered: LoweredMask) -> list[Array]:
    """The arrays of a lowered mask."""
    bounds = (lowered.ranges.starts, lowered.ranges.stops) if lowered.ranges else ()
    return [array for array in (*bounds, lowered.q_labels, lowered.k_labels, lowered.dense) if array is not None]


def _lowered(checked: Checked) -> LoweredMask:
    mask, (family, q, _, _, sizes) = checked.mask, checked.arrays
    operands = [] if mask is None else mask.operands()
    if mask is not None and any(isinstance(leaf, Predicate) for leaf in mask.primitives()):
        operands.append(q)  # a function may close over tracers; it is asked in the call's own world
    return lower(mask, site_for(family, getattr(q, "device", None), sizes, operands))


def _wanted(family: Family, operands: Operands, traced: bool) -> frozenset[Gradient]:
    """The operands whose gradient will be asked: torch knows; jax may differentiate whatever it traces."""
    named: list[tuple[Gradient, Array | None]] = [("q", operands.q), ("k", operands.k), ("v", operands.v)]
    named += [("bias", array) for array in operands.dense]
    named += [("table", operands.table), ("sinks", operands.sinks)]
    if family == "jax":
        return frozenset(name for name, array in named if array is not None) if traced else frozenset()
    if family == "torch" and sys.modules["torch"].is_grad_enabled():
        return frozenset(name for name, array in named if array is not None and array.requires_grad)
    return frozenset()


def _four(shape: Any) -> tuple[int, int, int, int]:
    a, b, c, d = (int(size) for size in shape)
    return a, b, c, d
