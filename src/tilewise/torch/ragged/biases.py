"""A bias written once, in each sequence's own coordinates, as the bias of some of the sequences.

Everything is a view of the caller's tensors, so gradients find their way back.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from ...masks.biases import T5, Alibi, Bias, DenseBias, Relative
from .masks import Members

Array = Any


def told_apart(bias: Bias | None) -> bool:
    """Whether the bias has a batch axis, so that sequences of equal lengths still differ."""
    return bias is not None and any(_rows(part) > 1 for part in bias.parts())


def per_sequence(bias: Bias, batch: int) -> list[Bias]:
    """The bias of each sequence.

    Batch axes are taken apart once for all: the gradient of one row taken alone would be as large as all rows.

    Raises:
        ValueError: beginning with "bias:", a batch axis of another size.
    """
    columns = [_taken_apart(part, batch) for part in bias.parts()]
    return [reduce(lambda a, b: a + b, parts) for parts in zip(*columns, strict=True)]


def bias_of(bias: Bias, members: Members, max_q: int) -> Bias:
    """The bias of sequences of these lengths; `max_q` is that for which relative tables were made."""
    return reduce(lambda a, b: a + b, (_cut(part, members, max_q) for part in bias.parts()))


def _rows(part: Bias) -> int:
    """Size of the batch axis, 1 where there is none."""
    match part:
        case DenseBias(array):
            return array.shape[0] if array.ndim == 4 else 1
        case Alibi(slopes):
            return slopes.shape[0] if slopes.ndim == 2 else 1
        case Relative(values):
            return values.shape[0] if values.ndim == 3 else 1
    return 1


def _taken_apart(part: Bias, batch: int) -> list[Bias]:
    rows = _rows(part)
    if rows == 1:
        return [part] * batch
    if rows != batch:
        raise ValueError(f"bias: has {rows} batch rows, expected 1 or {batch}, one per sequence")
    match part:
        case DenseBias(array):
            return [DenseBias(row) for row in _unbound(array)]
        case Alibi(slopes, align):
            return [Alibi(row, align) for row in _unbound(slopes)]
        case Relative(values):
            return [Relative(row) for row in _unbound(values)]
    raise AssertionError(f"{type(part).__name__} has no batch axis")


def _unbound(array: Array) -> list[Array]:
    return list(array.unbind(0)) if hasattr(array, "unbind") else list(array)


def _cut(part: Bias, members: Members, max_q: int) -> Bias:
    match part:
        case DenseBias(array):
            if array.ndim > 1:
                array = members.cut("bias: the array", array, -2, members.q_len)
            return DenseBias(members.cut("bias: the array", array, -1, members.k_len) if array.ndim else array)
        case Relative(values):
            # The value at j - i = d stands at d + max_q - 1; the sequence's own distances start at 1 - q_len.
            first, count = max_q - members.q_len, max(members.q_len + members.k_len - 1, 0)
            if values.shape[-1] < first + count:
                raise ValueError(
                    f"bias: relative(table) has {values.shape[-1]} distances, expected "
                    f"max_seqlen_q + max_seqlen_k - 1, at least {first + count}"
                )
            return Relative(values[..., first : first + count])
        case Alibi() | T5():
            return part
    raise TypeError(f"bias: {type(part).__name__} is not known to sequences of different lengths")
