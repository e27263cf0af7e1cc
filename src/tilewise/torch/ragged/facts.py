"""Masks and biases of all sequences as the facts that one call of the compiled kernel takes; None where it takes none.

What is refused here is served, or found to be wrong, sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._arrays import namespace, torch_of
from ..._remembered import Remembered
from ...kernels.native.buffers import broadcast_strides, memory
from ...kernels.native.call import LARGEST
from ...masks.algebra import And, Mask
from ...masks.biases import Alibi, Bias, DenseBias, Relative, lower_bias
from ...masks.primitives.causal import Causal
from ...masks.primitives.dense import Dense
from ...masks.primitives.window import Window
from ...masks.site import Site
from .runs import Row, is_run, run_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FAR = 2**60  # sums of two numbers below it stay in 64 bits

# The intervals of the last few batches, since the layers of a model share their lengths; none above LARGEST.
_known: Remembered[Hashable, tuple[tuple[np.ndarray, np.ndarray] | None]] = Remembered(8)


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Where each sequence's rows stand among all queries and keys, int64 (B,) each.

    Attributes:
        q_begin, q_len, k_begin, k_len: first rows and counts.
        rows: of the array of queries, which may hold more than the sequences do.
    """

    q_begin: np.ndarray
    q_len: np.ndarray
    k_begin: np.ndarray
    k_len: np.ndarray
    rows: int

    @property
    def batch(self) -> int:
        """B."""
        return len(self.q_len)

    @property
    def longest(self) -> tuple[int, int]:
        """The longest q_len and k_len."""
        return int(self.q_len.max(initial=0)), int(self.k_len.max(initial=0))

    def told(self) -> tuple[Hashable, ...]:
        """All of it, to be compared."""
        return (self.rows, *(x.tobytes() for x in (self.q_begin, self.q_len, self.k_begin, self.k_len)))

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        """For the queries of all sequences, one after another: the sequence, and the place in it."""
        sequence = np.repeat(np.arange(self.batch), self.q_len)
        first = self.q_len.cumsum() - self.q_len
        return sequence, np.arange(len(sequence)) - first[sequence]


class Sights(NamedTuple):
    """Who sees whom: intervals (rows,) of keys, or None where every key is seen; and a boolean array (…, i, j)."""

    ranges: tuple[np.ndarray, np.ndarray] | None = None
    dense: Tensor | None = None


class Tables(NamedTuple):
    """What is added: arrays (B', H', i, j); and a table (B', H', distances) that begins at `first` in each sequence."""

    dense: tuple[Tensor, ...] = ()
    table: Tensor | None = None
    first: np.ndarray | None = None


def sights_of(mask: Mask | None, lengths: Lengths, heads: int) -> Sights | None:
    """A mask of which each query sees one run of keys, joined with at most one boolean array."""
    parts = mask.parts if isinstance(mask, And) else () if mask is None else (mask,)
    if lengths.longest[0] <= 1:  # a step of decoding: a single query at the end sees every key
        parts = tuple(part for part in parts if not (isinstance(part, Causal) and part.align == "end"))
    arrays = [part for part in parts if isinstance(part, Dense)]
    runs = [part for part in parts if not isinstance(part, Dense)]
    if len(arrays) > 1 or not all(is_run(part) and _fits(part, lengths) for part in runs):
        return None
    dense = _tensor(arrays[0].array) if arrays else None
    if dense is not None and not _covers(dense.shape, lengths, heads):
        return None
    return Sights(_ranges(And(tuple(runs)), lengths) if runs else None, dense)


def tables_of(bias: Bias | None, lengths: Lengths, heads: int, max_q: int, accumulator: torch.dtype) -> Tables | None:
    """Biases of any kinds that measure distances from one corner; `max_q` is that of relative tables."""
    dense: list[Tensor] = []
    distances: list[Bias] = []
    at_end = 0
    q_longest, k_longest = lengths.longest
    for part in bias.parts() if bias is not None else ():
        if isinstance(part, DenseBias):
            array = _tensor(part.array)
            if not _covers(array.shape, lengths, heads):
                return None
            dense.append(array.reshape((1,) * (4 - array.ndim) + tuple(array.shape)) if array.ndim < 4 else array)
            continue
        if isinstance(part, Alibi) and part.align is None and (lengths.q_len != lengths.k_len).any():
            return None
        if isinstance(part, Alibi) and part.align == "end":
            at_end += 1
            part = Alibi(part.slopes, "start")
        if isinstance(part, Relative):
            size = max(max_q + k_longest - 1, 0)
            if part.values.shape[-1] < size:
                return None
            part = Relative(part.values[..., :size])
        distances.append(part)
    if at_end not in (0, len(distances)) or len(dense) > 4:
        return None
    if not distances:
        return Tables(tuple(dense))
    # From the end, a key's distance from the last query is what a table holds: as if queries and keys changed places.
    sizes, own, longest = ((max_q, k_longest), lengths.q_len, max_q)
    if at_end:
        sizes, own, longest = (k_longest, q_longest), lengths.k_len, k_longest
    try:
        lowered = lower_bias(
            _sum(distances), Site(lengths.batch, heads, *sizes, "torch"), namespace("torch"), accumulator
        )
    except ValueError:
        return None
    return Tables(tuple(dense), lowered.table, longest - own)


def dense_place(array: Tensor) -> tuple[int, ...]:
    """Address and strides over (b, h, i, j) of an array that broadcasts to them."""
    found = memory(array)
    strides = broadcast_strides(found, 4)
    return (found.address, *(0,) * (4 - len(strides)), *strides)


def _tensor(array: Any) -> Tensor:
    """An operand, a tensor or a NumPy array, as a tensor of the same memory."""
    return array if isinstance(array, Tensor) else torch_of(array)


def _sum(parts: list[Bias]) -> Bias:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _covers(shape: tuple[int, ...], lengths: Lengths, heads: int) -> bool:
    """Whether an array is (B or 1, H or 1, i, j), with leading axes left out, i and j 1 or at least the longest."""
    sizes = (1,) * (4 - len(shape)) + tuple(shape)
    q_longest, k_longest = lengths.longest
    return (
        len(sizes) == 4
        and sizes[0] in (1, lengths.batch)
        and sizes[1] in (1, heads)
        and (sizes[2] == 1 or sizes[2] >= q_longest)
        and (sizes[3] == 1 or sizes[3] >= k_longest)
    )


def _fits(mask: Mask, lengths: Lengths) -> bool:
    """Whether a run's numbers are one or one per sequence, small, and its diagonal named where it must be."""
    if isinstance(mask, And):
        return all(_fits(part, lengths) for part in mask.parts)
    unnamed = isinstance(mask, Causal | Window) and mask.align is None and mask.offset is None
    if unnamed and (lengths.q_len != lengths.k_len).any():
        return False
    for value in (getattr(mask, field.name) for field in fields(mask)):
        if isinstance(value, str | None):
            continue
        if isinstance(value, int):
            if abs(value) > _FAR:
                return False
            continue
        numbers = _tensor(value)
        if tuple(numbers.shape) not in ((), (1,), (lengths.batch,)) or numbers.device.type != "cpu":
            return False
        large = numbers.dtype == torch.int64 and bool(((numbers > _FAR) | (numbers < -_FAR)).any())
        if numbers.dtype not in _INTEGERS or large:
            return False
    return True


def _ranges(mask: Mask, lengths: Lengths) -> tuple[np.ndarray, np.ndarray] | None:
    """Starts and stops of all rows of the array of queries, in each sequence's own coordinates."""
    if mask.fixed is None:
        return _found_ranges(mask, lengths)
    key = (mask.fixed, *lengths.told())
    known = _known.get(key)
    if known is None:
        known = (_found_ranges(mask, lengths),)
        if known[0] is None or sum(side.nbytes for side in known[0]) <= LARGEST:
            _known.keep(key, known)
    return known[0]


def _found_ranges(mask: Mask, lengths: Lengths) -> tuple[np.ndarray, np.ndarray] | None:
    sequence, place = lengths.queries()
    numbers = [torch.from_numpy(x) for x in (place, sequence, lengths.q_len[sequence], lengths.k_len[sequence])]
    keys = lengths.k_len[sequence]
    start, stop = (np.clip(side.numpy(), 0, keys) for side in run_of(mask, Row(*numbers)))
    if not start.any() and (stop == keys).all():
        return None
    at = place + lengths.q_begin[sequence]
    sides = np.zeros((2, lengths.rows), np.int64 if lengths.longest[1] >= 2**31 else np.int32)
    sides[0, at], sides[1, at] = start, np.maximum(start, stop)
    return sides[0], sides[1]
