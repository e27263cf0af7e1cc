"""The three maps of attention on flat operands: values, tangents, gradients; by the native kernel or the portable one.

    attend    operands -> out, lse
    tangent   tangents of operands -> tangents of out, lse        linear; at given operands, out and lse
    backward  gradients of out, lse -> gradients of operands      linear; its transpose

Operands stand in the order of a `Case`'s tree, those that have a derivative first. What a map is linear in comes before
them, out and lse after them. `chosen` flags the operands that have a derivative: whose tangents are given, or whose
gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from ..errors import KernelRefused
from ..kernels.portable import jax_scan
from ..kernels.portable.jax_far import levels
from ..kernels.portable.jax_scan import Facts, Smooth
from . import ffi
from .case import LSE, OUT, Axes, Case, Flags

Array = Any

# The first jax whose scans can be transposed in whatever is linear.
_SCANS_TRANSPOSE = (0, 10)


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """One of the three.

    Attributes:
        primitive: what jax sees of it.
        body: its formula, (case, cpu, chosen, *operands) -> results; `cpu` where the program is for one.
        linear: the axes of the operands that it is linear in.
        rest: the axes of out and lse where it takes them.
        results: the axes of its results.
        types: (case, chosen, operands) -> their shapes and dtypes.
    """

    primitive: Primitive
    body: Callable[..., list[Array]]
    linear: Callable[[Case, Flags], tuple[Axes, ...]]
    rest: tuple[Axes, ...]
    results: Callable[[Case, Flags], tuple[Axes, ...]]
    types: Callable[[Case, Flags, Any], list[tuple[tuple[int, ...], str]]]

    def operands(self, case: Case, chosen: Flags) -> tuple[Axes, ...]:
        """The axes of all operands, in order."""
        return (*self.linear(case, chosen), *case.axes, *self.rest)

    def compute(self, case: Case, cpu: bool, chosen: Flags, *operands: Array) -> list[Array]:
        """The body's results, at the precision of the call, which need not be in force any more."""
        with jax.default_matmul_precision(case.precision):
            return self.body(case, cpu, chosen, *operands)

    def bind(self, *operands: Array, case: Case, chosen: Flags = (), local: bool = False) -> list[Array]:
        """The results, as jax's transformations see them.

        Args:
            local: whether the operands are those of one device, so that nothing is left to partition.
        """
        return self.primitive.bind(*operands, case=case, chosen=chosen, local=local)


def _attend(case: Case, cpu: bool, chosen: Flags, *operands: Array) -> list[Array]:
    """out (B, Hq, Sq, Dv) in the case's dtype, lse (B, Hq, Sq) in the accumulator's."""
    smooth, facts = case.parts(operands)
    if case.native and cpu and case.problem.scores:
        return list(ffi.forward(case.problem, smooth, facts))
    if case.problem.invariance == "row" and case.problem.scores:
        raise KernelRefused("portable", ["with it, a row's bits depend on how many rows are computed together"])
    out, lse = jax_scan.attend(case.problem, case.tiles, smooth, facts)
    return [out.astype(case.out_dtype), lse]


def _tangent(case: Case, cpu: bool, chosen: Flags, *operands: Array) -> list[Array]:
    """Tangents of out and lse, in their shapes and dtypes."""
    count = sum(chosen)
    moving, rest = case.tangents(chosen, operands[:count]), operands[count:]
    if case.native and cpu and case.problem.scores:
        *primal, out, lse = rest
        return list(ffi.tangent(case.problem, *case.parts(primal), out, lse, moving))
    d_out, d_lse = _along(case, moving, rest)
    return [d_out.astype(case.out_dtype), d_lse]


def _backward(case: Case, cpu: bool, chosen: Flags, *operands: Array) -> list[Array]:
    """Gradients of the chosen operands, in their shapes and the dtypes of `_like_chosen`."""
    d_out, d_lse, *rest = operands
    wanted = (x for x, is_wanted in zip(rest, chosen, strict=False) if is_wanted)
    dtypes = (dtype for _, dtype in _like_chosen(case, chosen, operands))
    like = [x if x.dtype == dtype else jnp.zeros_like(x, dtype=dtype) for x, dtype in zip(wanted, dtypes, strict=True)]
    if not case.problem.scores:
        return [jnp.zeros_like(x) for x in like]
    if case.native and cpu:
        *primal, out, lse = rest
        found = ffi.backward(case.problem, chosen, *case.parts(primal), out, lse, d_out, d_lse)
        return [gradient.astype(x.dtype) for gradient, x in zip(found, like, strict=True)]

    *primal, out, lse = rest
    smooth, facts = case.parts(primal)
    dtype = case.problem.accumulator
    d_out, d_lse, out = d_out.astype(dtype), d_lse.astype(dtype), out.astype(dtype)
    pull, level = d_lse - (d_out * out).sum(-1), lse
    rows = levels(case.problem, case.tiles, smooth, facts, lse, d_out)
    if rows is not None:
        # The derivative stays that of the formula, from which what was found again differs in rounding alone.
        more = jax.lax.stop_gradient(jnp.where(rows.far, d_lse - rows.pull - pull, 0))
        pull, level, d_out = (pull + more) * rows.share, rows.level, d_out * rows.share[..., None]

    def along(*given: Array) -> tuple[Array, Array]:
        return _sums_along(case, case.tangents(chosen, given), smooth, facts, level)

    return list(jax.linear_transpose(along, *like)((d_out, pull)))


def _along(case: Case, moving: Smooth, operands: Any) -> tuple[Array, Array]:
    """Tangents of out and lse in the accumulator's dtype, by the portable kernel."""
    *primal, out, lse = operands
    smooth, facts = case.parts(primal)
    rows = levels(case.problem, case.tiles, smooth, facts, lse)
    weighted, d_lse = _sums_along(case, moving, smooth, facts, lse if rows is None else rows.level)
    if rows is not None:
        weighted, d_lse = weighted * rows.share[..., None], d_lse * rows.share
    return weighted - out * d_lse[..., None], d_lse


def _sums_along(case: Case, moving: Smooth, smooth: Smooth, facts: Facts, level: Array) -> tuple[Array, Array]:
    function = partial(jax_scan.sums_along, case.problem, case.tiles, smooth, facts, level)
    if jax.__version_info__ >= _SCANS_TRANSPOSE:
        return function(moving)
    # Older ones transpose only scans that their own differentiation has marked as linear; the derivative of a linear
    # function is that function, and its value at zero is never used, so the compiler drops it.
    return jax.jvp(function, (jax.tree.map(jnp.zeros_like, moving),), (moving,))[1]


def _chosen(case: Case, chosen: Flags) -> tuple[Axes, ...]:
    return tuple(axes for axes, wanted in zip(case.axes, chosen, strict=False) if wanted)


def _like_out(case: Case, chosen: Flags, operands: Any) -> list[tuple[tuple[int, ...], str]]:
    p = case.problem
    rows = (p.batch, p.q_heads, p.q_len)
    return [((*rows, p.value_dim), case.out_dtype), (rows, p.accumulator)]


def _like_chosen(case: Case, chosen: Flags, operands: Any) -> list[tuple[tuple[int, ...], str]]:
    # Of a part, those of q, k and v are not rounded: they are added up.
    wide = case.problem.accumulator if case.problem.part else None
    return [
        (x.shape, wide if wide and n < 3 else x.dtype)
        for n, (x, wanted) in enumerate(zip(operands[2:], chosen, strict=False))
        if wanted
    ]


def _of_out(case: Case, chosen: Flags) -> tuple[Axes, ...]:
    return OUT, LSE


ATTEND = Map(Primitive("tilewise_attend"), _attend, lambda case, chosen: (), (), _of_out, _like_out)
TANGENT = Map(Primitive("tilewise_tangent"), _tangent, _chosen, (OUT, LSE), _of_out, _like_out)
BACKWARD = Map(Primitive("tilewise_backward"), _backward, _of_out, (OUT, LSE), _chosen, _like_chosen)
