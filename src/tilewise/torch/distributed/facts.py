"""What a call knows besides q, k and v, in the whole sequence's coordinates, and as a part of the call has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..._arrays import Array
from ...contract import Dropout, Gradients, Operands, Plan
from ...distributed.layout import Layout
from ...distributed.schedule import Block
from ...kernels import backward_of, forward_of
from ...masks.algebra import Mask, Not, _Combination
from ...masks.heads import Heads, mask_heads
from ...masks.lower import LoweredMask, lower
from ...masks.part import Run, dropout_part, mask_part, table_part, table_slice
from ...masks.primitives.dense import Dense
from ...masks.site import Site, site_for
from ...plan.choose import choose
from ...problem import ACCUMULATOR, Gradient
from ..options import Options
from ..spelling import has_predicate, read


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Mask, biases and options of some heads of a call.

    Attributes:
        told: the options; scale: as of the call.
        mask: lowered for the whole sequence and all heads.
        dense: biases (B', H', Sq', Sk') for all heads; Sq' is 1, the whole, or this rank's own rows.
        table: (B', H', Sq + Sk - 1) or None; sinks: (Hq,) or None; both for all heads.
        heads: which query heads these are.
        q_len, k_len: of the whole sequence; own: number of this rank's rows.
    """

    told: Options
    scale: float | None
    mask: LoweredMask
    dense: tuple[Tensor, ...]
    table: Tensor | None
    sinks: Tensor | None
    dropout: Dropout | None
    heads: Heads
    q_len: int
    k_len: int
    own: int

    def part(self, q: Tensor, k: Tensor, v: Tensor, block: Block, sinks: bool = False) -> Operands:
        """The operands of a block's rows and keys, given as (B, H, rows, D) and (B, Hkv, keys, D)."""
        rows, keys, heads = block.rows, block.keys, self.heads
        own_rows = Run(block.q_begin, rows.count)
        mask, dropout, table = mask_heads(self.mask, heads), self.dropout, self.table
        if isinstance(mask.lazy, OwnRows):  # nothing else is to be evaluated, so the array is read in place
            array = keys.of(own_rows.of(mask.lazy.four(mask.site), 2, mask.site.xp), 3, mask.site.xp)
            mask = replace(mask_part(replace(mask, lazy=None), rows, keys), dense=array)
        else:
            mask = mask_part(mask, rows, keys)
        if dropout is not None:
            dropout = dropout_part(dropout, rows, keys, heads.whole, self.q_len, self.k_len, heads.first)
        if table is not None:
            table = table_part(heads.of(table, 1), rows, keys, self.q_len, torch)
        dense = tuple(
            keys.of(self.rows_in(bias, block).of(heads.of(bias, 1), 2, torch), 3, torch) for bias in self.dense
        )
        return Operands(q, k, v, mask, dense, table, heads.of(self.sinks, 0) if sinks else None, dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: bool = False) -> tuple[Tensor, Tensor]:
        """out and lse of the block's rows as seen by its keys: all their keys and sinks if `whole`, else in the
        accumulator's dtype and without sinks, to be merged."""
        operands = self.part(q, k, v, block, whole)
        plan = self._plan(operands, frozenset(), whole)
        return forward_of(plan.kernel).forward(plan, operands)

    def pull(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[Tensor], block: Block, wanted: frozenset[Gradient],
        whole: bool = False, rounded: bool = False,
    ) -> Gradients:  # fmt: skip
        """The block's part of the wanted gradients; those to q, k and v in the accumulator's dtype unless `rounded`.

        Args:
            rows: out, lse, d_out and d_lse of the block's rows; whole: as in `attend`.
        """
        operands = self.part(q, k, v, block, whole)
        plan = self._plan(operands, wanted, rounded)
        assert plan.backward is not None
        return backward_of(plan.backward).backward(plan, operands, *(x.contiguous() for x in rows))

    def _plan(self, operands: Operands, gradients: frozenset[Gradient], rounded: bool) -> Plan:
        problem = replace(self.told.problem(operands, self.scale, gradients), layout="bhsd", part=not rounded)
        return choose(problem, self.told.kernel, self.told.allow_quadratic)

    def rows_in(self, bias: Tensor, block: Block) -> Run:
        """The block's rows in a bias."""
        return Run(block.q_begin, block.rows.count) if bias.shape[2] == self.own != self.q_len else block.rows


class BiasSums:
    """The gradients of biases, added up block by block."""

    def __init__(self, facts: Facts, wanted: frozenset[Gradient]) -> None:
        self._facts = facts
        # Where a bias has one row or key for all, many numbers are added to one; else each is written once.
        self.dense: tuple[Tensor | None, ...] = tuple(
            torch.zeros(bias.shape, dtype=accumulator(bias) if 1 in bias.shape[2:] else bias.dtype, device=bias.device)
            if "bias" in wanted
            else None
            for bias in facts.dense
        )
        self.table = torch.zeros_like(facts.table) if "table" in wanted else None

    def add(self, block: Block, found: Gradients) -> None:
        """A block's part."""
        heads, keys = self._facts.heads, block.keys
        for bias, total, part in zip(self._facts.dense, self.dense, found.dense, strict=True):
            if total is None:
                continue
            rows = self._facts.rows_in(bias, block)
            keys.of(rows.of(heads.of(total, 1), 2, torch), 3, torch).add_(part)
        if self.table is not None:
            place = table_slice(block.rows, keys, self._facts.q_len)
            heads.of(self.table, 1)[..., place].add_(found.table)


def facts_of(
    operands: Sequence[Tensor], tensors: Sequence[Tensor], integers: Sequence[int], scale: float | None,
    told: Options, q: Layout, k: Layout, rank: int,
) -> Facts:  # fmt: skip
    """The facts of all heads, lowered for the whole sequence.

    Raises:
        ValueError, TypeError: beginning with "mask:", when an operand does not fit the sizes of the whole.
    """
    mask = read(told.mask, tensors[told.seeded :], integers[2 * bool(told.p and not told.seeded) :])
    if mask is not None:
        mask = with_own_rows(mask, q.positions(rank), q.length)
    sizes = (operands[0].shape[0], operands[0].shape[1], q.length, k.length)
    held = [] if mask is None else mask.operands()
    places = [operands[0], *held] if has_predicate(told.mask) else held
    lowered = lower(mask, site_for("torch", operands[0].device, sizes, places))
    named = dict(zip(told.names, operands, strict=True))
    dense = tuple(tensor for name, tensor in zip(told.names, operands, strict=True) if name == "bias")
    return Facts(
        told, scale, lowered, dense, named.get("table"), named.get("sinks"), told.dropout(tensors, integers),
        Heads(0, sizes[1], sizes[1]), q.length, k.length, q.local_length(rank),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class OwnRows(Mask):
    """A boolean array of which this rank has its own rows: (B', H', rows, Sk').

    Attributes:
        array: the rows in the order in which this rank has them; place: (Sq,) where each row of the whole stands.
    """

    array: Array
    place: np.ndarray
    arrays: ClassVar[tuple[str, ...]] = ("array",)

    def check(self, site: Site) -> None:
        batch, heads, _, keys = (1, 1, 1, 1, *self.array.shape)[-4:]
        if batch not in (1, site.batch) or heads not in (1, site.heads) or keys not in (1, site.k_len):
            raise ValueError(
                f"mask: the boolean array of this rank's rows has shape {tuple(self.array.shape)}, which does not "
                f"broadcast to (B, H, rows, Sk) = {(site.batch, site.heads, self.array.shape[-2], site.k_len)}"
            )

    def four(self, site: Site) -> Array:
        """The caller's array in place, (B', H', rows, Sk')."""
        return Dense(self.array).four(site)

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        array = self.four(site)
        places = zip((b, h, site.xp.asarray(self.place)[i], j), array.shape, strict=True)
        return array[tuple(place if size > 1 or axis == 2 else 0 * place for axis, (place, size) in enumerate(places))]

    def describe(self) -> str:
        return f"dense({'x'.join(map(str, self.array.shape))}, this rank's rows)"


def with_own_rows(mask: Mask, positions: np.ndarray, q_len: int) -> Mask:
    """The mask with boolean arrays that hold only the rows at some positions told apart from those of all rows."""
    match mask:
        case _Combination(parts):
            return type(mask)(tuple(with_own_rows(part, positions, q_len) for part in parts))
        case Not(part):
            return Not(with_own_rows(part, positions, q_len))
        case Dense(array) if array.ndim >= 2 and array.shape[-2] == len(positions) and len(positions) not in (1, q_len):
            place = np.zeros(q_len, np.int64)
            place[positions] = np.arange(len(positions))
            return OwnRows(array, place)
    return mask


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return getattr(torch, ACCUMULATOR[str(x.dtype).removeprefix("torch.")])


def has_own_rows(facts: Facts) -> bool:
    """Whether a mask or bias holds this rank's rows alone."""
    if any(bias.shape[2] == facts.own not in (1, facts.q_len) for bias in facts.dense):
        return True
    lazy = facts.mask.lazy
    return lazy is not None and any(isinstance(leaf, OwnRows) for leaf in lazy.primitives())
