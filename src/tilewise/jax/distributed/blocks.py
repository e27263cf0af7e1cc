"""One block of a spread call: some of a device's rows against some keys, with the facts that hold between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ...contract import Dropout
from ...kernels.portable.jax_scan import Facts, Smooth
from ...kernels.portable.tiles import default_tiles
from ...masks.algebra import Mask
from ...masks.lower import LoweredMask
from ...masks.part import Run, mask_part, table_part
from ...masks.ranges import Ranges
from ...masks.site import Site
from ...philox import number_of
from ...plan.choose import choose
from ...problem import AttentionProblem, BiasFacts
from ..case import Case
from ..predicates import capture
from ..pytrees import register_mask

Array = Any


@dataclass(frozen=True, eq=False)
class Placed(Mask):
    """A mask asked at a part's own positions.

    Attributes:
        whole: the sizes of the call that `part` was written for.
        first: (3,) int32, which may be traced: the part's first head, row and key there.
        steps: from one row, and from one key, to the next.
    """

    part: Mask
    whole: Site
    first: Array
    steps: tuple[int, int]
    arrays: ClassVar[tuple[str, ...]] = ("first",)

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        there = replace(site, heads=self.whole.heads, q_len=self.whole.q_len, k_len=self.whole.k_len)
        head, row, key = self.first
        return self.part.visible(there, b, h + head, row + self.steps[0] * i, key + self.steps[1] * j)


register_mask(Placed)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What is known of a spread call before its arrays.

    Attributes:
        problem: of the whole sequence and this device's heads; a part where results are added up.
        kernel: asked for by name, or None.
        precision: `jax.default_matmul_precision` where attention is called.
        local: whether arrays are one device's, so that nothing is left to partition.
    """

    problem: AttentionProblem
    kernel: str | None
    precision: str | None
    local: bool

    def block(self, smooth: Smooth, facts: Facts, rows: Run, keys: Run) -> tuple[Case, list[Array]]:
        """The case and the flat operands of a block.

        Args:
            smooth: with the block's own q, k and v; biases of its rows and all keys; the whole table.
            facts: of the whole call, but bits in place that are of the block's rows and all keys.
        """
        p = self.problem
        dense = tuple(cut(keys, bias, 3) for bias in smooth.dense)
        table = None if smooth.table is None else table_part(smooth.table, rows, keys, p.q_len, jnp)
        smooth = smooth._replace(dense=dense, table=table)
        mask = facts.mask
        part = mask_part(replace(mask, dense=None, lazy=None), rows, keys)
        bits = None if mask.dense is None else cut(keys, mask.dense, 3)
        part = replace(part, dense=bits)
        dropout = None
        if facts.dropout is not None:
            dropout = moved(facts.dropout, 0, rows, keys)
        problem = replace(
            p,
            q_len=rows.count,
            k_len=keys.count,
            mask=replace(part, lazy=mask.lazy).facts,
            bias=BiasFacts(tuple(bias.shape for bias in dense), table is not None),
        )
        plan = choose(problem, self.kernel)
        native = plan.kernel == "native"
        tiles = default_tiles(problem) if native else plan.tiles
        if mask.lazy is not None:
            lazy = capture(mask, problem, tiles).lazy
            part = replace(part, lazy=placed(lazy, mask.site, 0, rows, keys))
        leaves, tree = jax.tree.flatten((smooth, Facts(part, dropout)))
        out_dtype = problem.result if native else problem.accumulator
        return Case(problem, tiles, native, out_dtype, tree, self.precision), leaves


def placed(lazy: Mask, whole: Site, head: Array, rows: Run, keys: Run) -> Mask:
    """A mask as a part of the call sees it."""
    first = jnp.stack([jnp.asarray(place, jnp.int32) for place in (head, rows.start, keys.start)])
    return Placed(lazy, whole, first, (rows.step, keys.step))


def moved(dropout: Dropout, head: Array, rows: Run, keys: Run) -> Dropout:
    """Dropout that draws for a part what it draws for the whole; its numbers are strided, its words arrays."""
    _, strides = dropout.numbering(0, 0, 0)
    first = number_of(dropout, (0, head, rows.start, keys.start), 0, 0, 0, jnp, wide=False)
    steps = (strides[0], strides[1], rows.step * strides[2], keys.step * strides[3])
    return replace(dropout, first=jnp.concatenate(first), strides=steps)


def traced(mask: LoweredMask) -> LoweredMask:
    """The same facts as jax arrays, so that they may be cut where the place is traced."""
    ranges, known = mask.ranges, (mask.q_labels, mask.k_labels, mask.dense)
    q_labels, k_labels, dense = (None if x is None else jnp.asarray(x) for x in known)
    if ranges is not None:
        ranges = Ranges(jnp.asarray(ranges.starts), jnp.asarray(ranges.stops))
    site = replace(mask.site, family="jax", concrete=False)
    return replace(mask, site=site, ranges=ranges, q_labels=q_labels, k_labels=k_labels, dense=dense)


def cut(run: Run, x: Array, axis: int) -> Array:
    """The run's elements along an axis; one of size 1 stands for all. Where positions follow one another, a slice."""
    if x.shape[axis] == 1 or isinstance(run.start, int) or run.step != 1:
        return run.of(x, axis, jnp)
    return jax.lax.dynamic_slice_in_dim(x, run.start, run.count, axis)


def put(run: Run, total: Array, x: Array, axis: int) -> Array:
    """`total` with `x` added where `cut` takes it from."""
    if total.shape[axis] == 1:
        return total + x
    if run.step == 1:
        held = jax.lax.dynamic_slice_in_dim(total, run.start, run.count, axis)
        return jax.lax.dynamic_update_slice_in_dim(total, held + x, run.start, axis)
    places = run.start + run.step * jnp.arange(run.count)
    return total.at[(slice(None),) * axis + (places,)].add(x)
