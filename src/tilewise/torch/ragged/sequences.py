"""Where each sequence of a batch stands in packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequence n is the rows [starts[n], starts[n] + lengths[n])."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths, (B,) int64."""
        return np.array(self.starts, np.int64), np.array(self.lengths, np.int64)

    def rows(self, order: Sequence[int]) -> np.ndarray:
        """The numbers of all rows, sequence by sequence in this order, int64."""
        lengths = np.array([self.lengths[n] for n in order], dtype=np.int64)
        starts = np.array([self.starts[n] for n in order], dtype=np.int64)
        firsts = lengths.cumsum() - lengths
        return np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)


def from_cumulative(name: str, cumulative: Any, used_name: str, used: Any, tokens: int) -> Sequences:
    """The sequences of cumulative lengths (B + 1,), each shortened to `used` (B,) where that is given.

    Raises:
        TypeError, ValueError: not integers of that shape, lengths that shrink, or rows that are not there.
    """
    bounds = _integers(name, cumulative)
    if not bounds:
        raise ValueError(f"{name}: is empty, expected (B + 1,) integers")
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"{name}: falls from one entry to the next, expected cumulative lengths")
    if bounds[0] < 0 or bounds[-1] > tokens:
        raise ValueError(f"{name}: spans the rows {bounds[0]} to {bounds[-1]}, but there are {tokens}")
    if used is not None:
        taken = _integers(used_name, used)
        if len(taken) != len(lengths):
            raise ValueError(f"{used_name}: has {len(taken)} entries, expected one per sequence, ({len(lengths)},)")
        for count, length in zip(taken, lengths, strict=True):
            if not 0 <= count <= length:
                raise ValueError(f"{used_name}: got {count} for a sequence of {length}, expected 0 to {length}")
        lengths = taken
    return Sequences(tuple(bounds[:-1]), tuple(lengths))


def take(x: Tensor, rows: np.ndarray) -> Tensor:
    """The rows of x, (N, …); a view where they follow one another."""
    if _is_run(rows):
        return x.narrow(0, int(rows[0]), len(rows)) if len(rows) < x.shape[0] else x
    return x.index_select(0, torch.from_numpy(rows).to(x.device))


def put(x: Tensor, rows: np.ndarray, tokens: int, fill: float) -> Tensor:
    """The inverse of `take`: (tokens, …) with `fill` in all other rows."""
    if len(rows) == tokens and _is_run(rows):
        return x
    full = x.new_full((tokens, *x.shape[1:]), fill)
    return full.index_copy(0, torch.from_numpy(rows).to(x.device), x)


def _is_run(rows: np.ndarray) -> bool:
    return len(rows) > 0 and bool(np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))))


def _integers(name: str, values: Any) -> list[int]:
    """A 1-D array, tensor or list of integers as a list."""
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {type(values).__name__}, expected integers (B + 1,) or (B,)") from None
    integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not integral and tensor.numel():
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected integers")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, expected one axis")
    return [int(value) for value in tensor.tolist()]
