"""Masks of which each query of packed sequences sees one run of keys: causal, window, prefix, lengths, and their `&`.

Written in tensors and without looking at values, so that a compiled program can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...masks.algebra import And, Mask
from ...masks.primitives.causal import Causal
from ...masks.primitives.lengths import Lengths
from ...masks.primitives.prefix import Prefix
from ...masks.primitives.window import Window


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """For each query row, (Tq,): its position in its sequence, that sequence's number, its queries and its keys."""

    position: Tensor
    sequence: Tensor
    queries: Tensor
    keys: Tensor

    def of(self, value: Any) -> Any:
        """A number, or each row's value of one per sequence, (B,)."""
        if isinstance(value, int):
            return value
        value = torch.as_tensor(value, device=self.sequence.device).long()
        return value[self.sequence] if value.dim() and value.shape[0] > 1 else value.reshape(-1)[:1]

    def key(self, mask: Causal | Window) -> Tensor:
        """Where the query stands on the key axis."""
        if mask.offset is not None:
            return self.position + self.of(mask.offset)
        return self.position + self.keys - self.queries if mask.align == "end" else self.position


# Written without `match`, which torch's compiler does not follow.
def is_run(mask: Mask) -> bool:
    """Whether the mask is one of these."""
    if isinstance(mask, And):
        return all(is_run(part) for part in mask.parts)
    return isinstance(mask, Causal | Window | Prefix | Lengths)


def run_of(mask: Mask, row: Row) -> tuple[Tensor, Tensor]:
    """First visible key of each row, and the one after the last; not clipped."""
    none, every = torch.zeros_like(row.keys), row.keys
    if isinstance(mask, And):
        starts, stops = zip(*[run_of(part, row) for part in mask.parts], strict=True)
        return reduce(torch.maximum, starts), reduce(torch.minimum, stops)
    if isinstance(mask, Causal):
        return none, row.key(mask) + 1
    if isinstance(mask, Window):
        place = row.key(mask)
        return (none if mask.left is None else place - mask.left), (
            every if mask.right is None else place + mask.right + 1
        )
    if isinstance(mask, Prefix):
        return none, none + row.of(mask.n)
    assert isinstance(mask, Lengths)
    stop = every if mask.k is None else none + row.of(mask.k)
    return none, stop if mask.q is None else torch.where(row.position < row.of(mask.q), stop, none)
