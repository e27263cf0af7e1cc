"""A lowered mask, biases and options as the tuples that `tilewise._native` takes.

Each function returns numbers for the core and appends what must stay alive during the call to `alive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._arrays import Array, dtype_name, to_numpy
from ...contract import Dropout, Operands
from ...masks.lower import LoweredMask, TileBits
from .buffers import DTYPE_CODES, broadcast_strides, cast, memory, packed, rows

Alive = list[Any]


def call_facts(operands: Operands, accumulator: str, alive: Alive) -> dict[str, Any]:
    """Every keyword of the core that says what pairs are visible and what is added; tile bits apart."""
    mask = operands.mask
    sizes = (operands.q.shape[1], operands.q.shape[2], operands.k.shape[2])
    return {
        "ranges": _ranges(mask, alive),
        "labels": _labels(mask, alive),
        "mask": _dense_mask(mask, alive),
        "biases": dense_biases(operands.dense, alive),
        "table": table_place(operands.table, accumulator, alive),
        "sinks": sinks_place(operands.sinks, accumulator, alive),
        "dropout": dropout_words(operands.dropout, sizes),
    }


def tile_bits(bits: TileBits, alive: Alive) -> tuple[int, ...]:
    """The tiles of some query rows."""
    index, words = packed(bits.index, 2), packed(bits.words, 2)
    alive += [index, words]
    return (index.address, words.address, *broadcast_strides(index, 2), *bits.index.shape[2:], bits.q_start)


def _ranges(mask: LoweredMask, alive: Alive) -> tuple[int, ...] | None:
    if mask.ranges is None:
        return None
    wide = any(dtype_name(side) != "int32" for side in (mask.ranges.starts, mask.ranges.stops))
    sides = [packed(cast(side, "int64" if wide else "int32"), 2) for side in (mask.ranges.starts, mask.ranges.stops)]
    alive += sides
    starts, stops = sides
    if broadcast_strides(starts, 2) != broadcast_strides(stops, 2):
        starts, stops = (packed(np.ascontiguousarray(to_numpy(side.array)), 2) for side in sides)
        alive += [starts, stops]
    return (starts.address, stops.address, int(wide), mask.ranges.count, *broadcast_strides(starts, 2))


def _labels(mask: LoweredMask, alive: Alive) -> tuple[int, ...] | None:
    if mask.q_labels is None or mask.k_labels is None:
        return None
    sides = [packed(side, 1) for side in _as_int32(mask.q_labels, mask.k_labels)]
    alive += sides
    return (*(side.address for side in sides), *(stride for side in sides for stride in broadcast_strides(side, 2)))


def _as_int32(q_labels: Array, k_labels: Array) -> tuple[Array, Array]:
    """The labels in 32 bits; wider ones that do not fit are numbered anew, since only equality matters."""
    if dtype_name(q_labels) == dtype_name(k_labels) == "int32":
        return q_labels, k_labels
    q, k = to_numpy(q_labels), to_numpy(k_labels)
    info = np.iinfo(np.int32)
    if all(not side.size or (side.min() >= info.min and side.max() <= info.max) for side in (q, k)):
        return q.astype(np.int32), k.astype(np.int32)
    numbers = np.unique(np.concatenate([q.ravel(), k.ravel()]), return_inverse=True)[1].astype(np.int32).ravel()
    return numbers[: q.size].reshape(q.shape), numbers[q.size :].reshape(k.shape)


def _dense_mask(mask: LoweredMask, alive: Alive) -> tuple[int, ...] | None:
    if mask.dense is None:
        return None
    alive.append(memory(mask.dense))
    return mask_place(mask.dense)


def mask_place(dense: Array) -> tuple[int, ...]:
    """Address and four strides of booleans read in place, 0 along axes of size 1 and along leading axes not there."""
    found = memory(dense)
    strides = broadcast_strides(found, 4)
    return (found.address, *(0,) * (4 - len(strides)), *strides)


def dense_biases(biases: Sequence[Array], alive: Alive) -> tuple[tuple[int, ...], ...]:
    """Address, dtype and four strides of each bias, 0 along axes of size 1."""
    found = [memory(bias) for bias in biases]
    alive += found
    return tuple((own.address, DTYPE_CODES[dtype_name(own.array)], *broadcast_strides(own, 4)) for own in found)


def table_place(table: Array | None, accumulator: str, alive: Alive) -> tuple[int, ...] | None:
    """Address and two strides of a table over j - i."""
    if table is None:
        return None
    found = rows(cast(table, accumulator))
    alive.append(found)
    return (found.address, *broadcast_strides(found, 2))


def sinks_place(sinks: Array | None, accumulator: str, alive: Alive) -> int:
    """Address of (Hq,) numbers, 0 for none."""
    if sinks is None:
        return 0
    found = rows(cast(sinks, accumulator))
    alive.append(found)
    return found.address


def dropout_words(dropout: Dropout | None, sizes: tuple[int, int, int] | None) -> tuple[int | float, ...] | None:
    """Threshold, factor of what is kept, seed, stream and numbering; None for none.

    Args:
        sizes: Hq, Sq and Sk; None lets the core number the pairs of each sequence by the sequence's own.
    """
    if dropout is None:
        return None
    first, strides = dropout.numbering(*sizes or (0, 0, 0))
    if sizes is None and dropout.strides is None:
        strides = (0, 0, 0, 0)
    numbers = (dropout.stream, _joined(first), *strides)
    return (dropout.threshold, dropout.inverse_keep, _joined(dropout.seed), *(number % 2**64 for number in numbers))


def _joined(words: Any) -> int:
    """A 64-bit number from its words (low, high)."""
    low, high = (int(word) & 0xFFFFFFFF for word in words)
    return high << 32 | low
