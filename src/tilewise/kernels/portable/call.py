"""A call in the shapes that the tiles work on: heads grouped, biases listed with their layouts."""

from __future__ import annotations

from dataclasses import dataclass

from ..._arrays import Array
from ...contract import Operands, Plan, Tiles
from ...problem import AttentionProblem
from .axes import Axes, grouped
from .local import Local
from .tiles import default_tiles
from .verbs import Verbs, verbs_for
from .walk import Walk


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """q (B, Hkv, G, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), biases grouped; all views of the operands."""

    problem: AttentionProblem
    verbs: Verbs
    q: Array
    k: Array
    v: Array
    biases: tuple[tuple[Axes, Array], ...]
    walk: Walk

    @property
    def primals(self) -> tuple[tuple[Axes, Array], ...]:
        """The operands of the tiles, in the order of `Local`."""
        return (Axes.ROWS, self.q), (Axes.KEYS, self.k), (Axes.KEYS, self.v), *self.biases

    def local(self, wanted: tuple[bool, ...] = ()) -> Local:
        """The functions of one tile."""
        return Local(
            self.verbs, self.problem.scale, self.problem.softcap, tuple(axes for axes, _ in self.biases), wanted
        )

    def rows(self, array: Array) -> Array:
        """(B, Hq, Sq, …) as (B, Hkv, G, Sq, …)."""
        return grouped(array, self.problem.q_heads, self.problem.kv_heads)


def make_call(problem: AttentionProblem, operands: Operands, tiles: Tiles) -> Call:
    """The views and the walk of one call."""
    verbs = verbs_for(operands.q, problem.accumulator)

    def group(array: Array) -> Array:
        return grouped(array, problem.q_heads, problem.kv_heads)

    biases = tuple((Axes.PAIRS, group(bias)) for bias in operands.dense)
    if operands.table is not None:
        biases += ((Axes.BAND, group(operands.table)),)
    walk = Walk(problem, operands.mask, operands.dropout, verbs, tiles, biases)
    return Call(problem, verbs, group(operands.q), operands.k, operands.v, biases, walk)


def tiles_of(plan: Plan) -> Tiles:
    """The plan's tiles where they were chosen for this kernel, else its own."""
    return plan.tiles if plan.kernel == "portable" else default_tiles(plan.problem)
