"""The arguments of a spread call, checked and lowered for the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from ...contract import Dropout, Operands
from ...kernels.portable.jax_scan import Facts, Smooth
from ...masks.algebra import And, Mask
from ...masks.biases import Bias, DenseBias, Sum, as_bias
from ...masks.lower import LoweredMask, lower
from ...masks.primitives.dense import Dense, dense
from ...masks.site import Site, site_for
from ...problem import AttentionProblem
from ...validate import Arrays, check_options, problem_of
from ..call import seeded
from .blocks import traced

Array = Any


class Whole(NamedTuple):
    """A call over the whole sequence, as one device knows it.

    Attributes:
        smooth: this device's q, k and v; dense biases with a row for every query of the whole or for every local one.
        facts: of the whole; bits in place likewise.
        mask: the lowered mask as it can be looked at, for the schedule.
        problem: of the whole, with the mask and biases left out: each block has its own.
    """

    smooth: Smooth
    facts: Facts
    mask: LoweredMask
    problem: AttentionProblem


def whole_call(arrays: Arrays, local_rows: int, mask: Any, bias: Any, **options: Any) -> Whole:
    """Check and lower all arguments but q, k, v.

    Args:
        arrays: with the sizes of the whole.
        local_rows: Sq of this device, for masks and biases that are given as its rows.

    Raises:
        ValueError, TypeError: as `validate.check_options` and `masks.lower`.
    """
    site = site_for("jax", None, arrays.sizes, [])
    bias, own_biases = _bias(bias, site, local_rows)
    mask, own_bits = _mask(mask, site, local_rows)
    checked = check_options(arrays, mask, bias, **options)
    operands = [] if checked.mask is None else checked.mask.operands()
    lowered = lower(checked.mask, site_for("jax", None, arrays.sizes, operands))
    facts = traced(lowered)
    for bits in own_bits:
        facts = _with_bits(facts, bits)
    dropout = _numbered(checked.dropout, arrays.sizes)
    biases = checked.biases
    smooth = Smooth(arrays.q, arrays.k, arrays.v, (*biases.dense, *own_biases), biases.table, checked.sinks)
    problem = problem_of(
        "jax",
        Operands(arrays.q, arrays.k, arrays.v, LoweredMask(site), dropout=dropout),
        layout="bhsd",
        scale=checked.scale,
        softcap=checked.softcap,
        gradients=frozenset(),
        traced=True,
    )
    problem = replace(problem, q_len=site.q_len, k_len=site.k_len, part=True)
    return Whole(smooth, Facts(facts, dropout), lowered, problem)


def _numbered(dropout: Dropout | None, sizes: tuple[int, int, int, int]) -> Dropout | None:
    """Dropout with the strides of the whole, and words as arrays."""
    if dropout is None:
        return None
    _, heads, q_len, k_len = sizes
    first, strides = dropout.numbering(heads, q_len, k_len)
    return seeded(replace(dropout, first=first, strides=strides))


def _bias(bias: Bias | Array | None, site: Site, rows: int) -> tuple[Bias | None, list[Array]]:
    """The bias without the terms that are given as local rows, and those, (B', H', rows, Sk')."""
    if bias is None:
        return None, []
    parts = as_bias(bias).parts()
    own = [part for part in parts if isinstance(part, DenseBias) and _is_local(part.array, site, rows)]
    rest = tuple(part for part in parts if not any(part is x for x in own))
    for part in own:
        part.check(replace(site, q_len=rows))
    return (Sum(rest) if rest else None), [part.four(jnp) for part in own if isinstance(part, DenseBias)]


def _mask(mask: Mask | Array | None, site: Site, rows: int) -> tuple[Mask | None, list[Array]]:
    """The mask without the terms of a conjunction that are given as local rows, and those."""
    if mask is None:
        return None, []
    mask = mask if isinstance(mask, Mask) else dense(mask)
    parts = mask.parts if isinstance(mask, And) else (mask,)
    own = [part for part in parts if isinstance(part, Dense) and _is_local(part.array, site, rows)]
    if not own:
        return mask, []
    here = replace(site, q_len=rows, concrete=False)
    for part in own:
        part.check(here)
    rest = tuple(part for part in parts if not any(part is x for x in own))
    return (And(rest) if rest else None), [part.four(here) for part in own]


def _is_local(array: Array, site: Site, rows: int) -> bool:
    """Whether an array has a row for every local query, and not for every one of the whole."""
    return array.ndim >= 2 and array.shape[-2] == rows and rows not in (1, site.q_len)


def _with_bits(mask: LoweredMask, bits: Array) -> LoweredMask:
    """The facts and a boolean array of local rows.

    Raises:
        ValueError: there are other bits, which stand for other rows or are evaluated elsewhere.
    """
    if mask.dense is not None or mask.lazy is not None:
        raise ValueError(
            f"mask: got an array of this device's {bits.shape[2]} rows joined with another array or a predicate, "
            f"expected one of them, or the array for all {mask.site.q_len} rows"
        )
    return replace(mask, dense=bits, text=f"{mask.text} & dense" if mask.text != "none" else "dense")
