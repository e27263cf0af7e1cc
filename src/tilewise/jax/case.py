"""What is known of an attention before its arrays, and what each axis of those arrays is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..contract import Tiles
from ..kernels.portable.jax_scan import Facts, Smooth
from ..problem import AttentionProblem, BiasFacts

Array = Any
# A letter for each axis: "b" batch rows, "h" query heads, "k" kv heads, "." anything else.
# An axis of size 1 where the letter's own size is larger stands for all of them.
Axes = str

OUT, LSE = "bh..", "bh."
Flags = tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """The key under which jax keeps a compiled attention.

    Attributes:
        problem, tiles: what to compute, and in which tiles the portable kernel would.
        native: whether the native kernel runs where the program is for a CPU.
        out_dtype: of out, which is the kernel's own and not always q's.
        tree: how the flat operands form a `Smooth` and a `Facts`.
        precision: `jax.default_matmul_precision` where attention is called, for the portable kernel's products.
    """

    problem: AttentionProblem
    tiles: Tiles
    native: bool
    out_dtype: str
    tree: Any
    precision: str | None

    @property
    def movable(self) -> int:
        """How many operands have a derivative; they come first."""
        return 3 + len(self.problem.bias.dense) + self.problem.bias.table + self.problem.sinks

    def parts(self, operands: Sequence[Array]) -> tuple[Smooth, Facts]:
        return jax.tree.unflatten(self.tree, operands)

    def tangents(self, moving: tuple[bool, ...], given: Sequence[Array]) -> Smooth:
        """The tangents of the operands that move, None in the place of the others."""
        rest = iter(given)
        return jax.tree.unflatten(self.tree.children()[0], [next(rest) if moves else None for moves in moving])

    @property
    def axes(self) -> tuple[Axes, ...]:
        """What the axes of each operand are."""
        count = self.tree.num_leaves
        axes, (smooth, facts) = ["."] * count, self.parts(range(count))
        mask, bits = facts.mask, facts.bits or (None, None)
        ranges = (mask.ranges.starts, mask.ranges.stops) if mask.ranges is not None else ()
        known = {
            "bh..": (smooth.q, *smooth.dense, *ranges, mask.dense, bits[0]),
            "bk..": (smooth.k, smooth.v),
            "bh.": (smooth.table, mask.q_labels, mask.k_labels),
            "h": (smooth.sinks,),
        }
        for letters, places in known.items():
            for place in places:
                if place is not None:
                    axes[place] = letters
        return tuple(axes)

    @property
    def of_pairs(self) -> frozenset[int]:
        """Which operands may have an element for every pair of a query and a key."""
        smooth, facts = self.parts(range(self.tree.num_leaves))
        return frozenset(smooth.dense) | ({facts.mask.dense} if facts.mask.dense is not None else set())

    @property
    def numbered(self) -> bool:
        """Whether results depend on the numbers of batch rows and heads: a predicate may, and dropout does."""
        _, facts = self.parts(range(self.tree.num_leaves))
        return facts.dropout is not None or facts.mask.lazy is not None

    def resized(self, operands: Sequence[Array]) -> Case:
        """The same case for operands of other batch sizes and numbers of heads."""
        smooth, _ = self.parts(operands)
        problem = replace(
            self.problem,
            batch=smooth.q.shape[0],
            q_heads=smooth.q.shape[1],
            kv_heads=smooth.k.shape[1],
            bias=BiasFacts(tuple(bias.shape for bias in smooth.dense), smooth.table is not None),
        )
        return replace(self, problem=problem)

    def beginning_at(self, row: Array, head: Array, operands: Sequence[Array]) -> tuple[Case, list[Array]]:
        """The case and operands of a part of a larger problem, in which its first batch row and head are these."""
        smooth, facts = self.parts(operands)
        leaves, tree = jax.tree.flatten((smooth, facts._replace(corner=(row, head))))
        return replace(self, tree=tree), leaves
