"""A mask written once, in each sequence's own coordinates, as the mask of some of the sequences.

Operands with a batch axis keep the rows of those sequences, operands with a query or key axis are cut to their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...masks.algebra import And, Mask, Not, Or
from ...masks.primitives.blocks import Blocks
from ...masks.primitives.causal import Causal
from ...masks.primitives.dense import Dense
from ...masks.primitives.documents import Documents
from ...masks.primitives.intervals import Intervals
from ...masks.primitives.lengths import Lengths
from ...masks.primitives.predicate import Predicate
from ...masks.primitives.prefix import Prefix
from ...masks.primitives.window import Window

Array = Any


@dataclass(frozen=True, slots=True)
class Members:
    """Some sequences of a batch, all with the same lengths.

    Attributes:
        numbers: which they are; batch: of how many.
        q_len, k_len: their lengths.
    """

    numbers: Sequence[int]
    batch: int
    q_len: int
    k_len: int

    def rows(self, what: str, array: Array) -> Array:
        """Their part of an array (B or 1, …), a view where they stand together."""
        size = array.shape[0]
        if size not in (1, self.batch):
            raise ValueError(f"{what} has {size} batch rows, expected 1 or {self.batch}, one per sequence")
        if size == 1:
            return array
        first, count = self.numbers[0], len(self.numbers)
        together = self.numbers[-1] - first == count - 1
        return array[first : first + count] if together else array[list(self.numbers)]

    def cut(self, what: str, array: Array, axis: int, length: int) -> Array:
        """The array cut to a length along a (negative) axis, which may be 1 to stand for all."""
        size = array.shape[axis]
        if size == length or (size == 1 and length):  # of no rows, what stands for all is no rows either
            return array
        if size < length:
            raise ValueError(f"{what} has shape {tuple(array.shape)}, which is too short for a sequence of {length}")
        return array[(..., slice(length), *(slice(None),) * (-1 - axis))]


def mask_of(mask: Mask, members: Members) -> Mask:
    """The mask of these sequences.

    Raises:
        ValueError: beginning with "mask:", an operand that does not fit the sequences.
    """
    match mask:
        case And(parts) | Or(parts):
            return type(mask)(tuple(mask_of(part, members) for part in parts))
        case Not(part):
            return Not(mask_of(part, members))
        case Causal() | Window():
            return replace(mask, offset=_per_sequence(members, mask.offset))
        case Prefix(n):
            return Prefix(_per_sequence(members, n))
        case Lengths(q, k):
            return Lengths(_per_sequence(members, q), _per_sequence(members, k))
        case Documents(q_ids, k_ids):
            return Documents(_ids(members, q_ids, members.q_len), _ids(members, k_ids, members.k_len))
        case Intervals(starts, stops):
            return Intervals(_bounds(members, starts), _bounds(members, stops))
        case Dense(array):
            return Dense(_pairs(members, "mask: dense(array)", array, (members.q_len, members.k_len)))
        case Blocks(map, size):
            blocks = (-(-members.q_len // size[0]), -(-members.k_len // size[1]))
            return Blocks(_pairs(members, "mask: blocks(map)", map, blocks), size)
        case Predicate(function):
            return _renumbered(function, members)
    raise TypeError(f"mask: {mask} is not known to sequences of different lengths")


def _per_sequence(members: Members, value: Array | int | None) -> Array | int | None:
    return members.rows("mask: an operand", value) if getattr(value, "shape", ()) else value


def _ids(members: Members, ids: Array, length: int) -> Array:
    ids = members.rows("mask: documents(ids)", ids) if len(ids.shape) == 2 else ids
    return members.cut("mask: documents(ids)", ids, -1, length)


def _bounds(members: Members, bounds: Array) -> Array:
    if len(bounds.shape) > 2:
        bounds = members.rows("mask: intervals()", bounds)
    return members.cut("mask: intervals()", bounds, -1 if len(bounds.shape) == 1 else -2, members.q_len)


def _pairs(members: Members, what: str, array: Array, sizes: tuple[int, int]) -> Array:
    """An array whose last axes are queries and keys, and whose fourth last is the batch."""
    if len(array.shape) == 4:
        array = members.rows(what, array)
    if len(array.shape) > 1:
        array = members.cut(what, array, -2, sizes[0])
    return members.cut(what, array, -1, sizes[1]) if len(array.shape) else array


def _renumbered(function: Any, members: Members) -> Predicate:
    """The predicate, told the sequences' own numbers as b."""
    numbers = list(members.numbers)

    def of_members(b: Array, h: Array, i: Array, j: Array) -> Array:
        return function(torch.tensor(numbers, device=b.device)[b], h, i, j)

    return Predicate(of_members)
