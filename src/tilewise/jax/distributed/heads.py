"""Sequences exchanged for heads (Ulysses; Jacobs et al., 2023): each device of a group attends with some heads.

With fewer kv heads than devices, each kv head goes to the devices whose query heads read it, and to no other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...distributed import HeadShare, Layout
from ...kernels.portable.jax_scan import Facts, Smooth
from ...masks.part import Run
from ...masks.ranges import Ranges
from .blocks import cut, moved, placed
from .exchange import all_rows, heads_for_rows, rows_for_heads

Array = Any


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that exchange sequences for heads.

    Attributes:
        names: the mesh axes along which they stand.
        shares: the heads of each.
        q, k: how queries and keys lie over all devices.
    """

    names: tuple[str, ...]
    shares: tuple[HeadShare, ...]
    q: Layout
    k: Layout

    @property
    def size(self) -> int:
        return len(self.shares)

    def to_heads(self, smooth: Smooth, facts: Facts) -> tuple[Smooth, Facts]:
        """The operands of this device's heads and all of the group's rows."""
        heads, kv_heads = smooth.q.shape[1], smooth.k.shape[1]
        q_order, k_order = _order(self.q, self.size), _order(self.k, self.size)
        # Each kv head once for every device that reads it: no byte more is sent than is read.
        times = max(1, self.size // kv_heads)
        k, v = (
            heads_for_rows(jnp.repeat(x, times, 1) if times > 1 else x, self.names, k_order)
            for x in (smooth.k, smooth.v)
        )
        mine = self._run()

        def rows(x: Array) -> Array:
            """(B', H' or 1, local rows or 1, …) of this device's heads and all rows."""
            if x.shape[2] == 1:
                return cut(mine, x, 1)
            return (heads_for_rows if x.shape[1] == heads else all_rows)(x, self.names, q_order)

        table, sinks = smooth.table, smooth.sinks
        smooth = Smooth(
            heads_for_rows(smooth.q, self.names, q_order),
            k,
            v,
            tuple(map(rows, smooth.dense)),
            None if table is None else cut(mine, table, 1),
            None if sinks is None else cut(mine, sinks, 0),
        )
        mask = facts.mask
        ranges = mask.ranges
        if ranges is not None:
            ranges = Ranges(cut(mine, ranges.starts, 1), cut(mine, ranges.stops, 1))
        everything = Run(0, mask.site.q_len), Run(0, mask.site.k_len)
        mask = replace(
            mask,
            ranges=ranges,
            q_labels=None if mask.q_labels is None else cut(mine, mask.q_labels, 1),
            k_labels=None if mask.k_labels is None else cut(mine, mask.k_labels, 1),
            dense=None if mask.dense is None else rows(mask.dense),
            lazy=None if mask.lazy is None else placed(mask.lazy, mask.site, mine.start, *everything),
            site=replace(mask.site, heads=mine.count),
        )
        dropout = None if facts.dropout is None else moved(facts.dropout, mine.start, *everything)
        return smooth, facts._replace(mask=mask, dropout=dropout)

    def to_rows(self, out: Array, lse: Array) -> tuple[Array, Array]:
        """out and lse of all heads and this device's rows, from those of its heads and all of the group's rows."""
        order = _order(self.q, self.size)
        return rows_for_heads(out, self.names, order), rows_for_heads(lse, self.names, order)

    def _run(self) -> Run:
        """This device's query heads."""
        firsts = jnp.asarray([share.first for share in self.shares], jnp.int32)
        return Run(firsts[jax.lax.axis_index(self.names)], self.shares[0].count)


def _order(layout: Layout, size: int) -> np.ndarray | None:
    """How a group's rows are put together; shards are of one size, so it is the same for every group."""
    order = layout.group_order(size, 0)
    return None if (np.diff(order) == 1).all() else order
