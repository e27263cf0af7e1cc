"""A second definition of every mask, pair by pair in Python's own integers, that shares no code with the library."""

from __future__ import annotations

import numpy as np

from tilewise.masks.algebra import And, Mask, Not, Or
from tilewise.masks.primitives import Predicate
from tilewise.masks.primitives.blocks import Blocks
from tilewise.masks.primitives.causal import Causal
from tilewise.masks.primitives.dense import Dense
from tilewise.masks.primitives.documents import Documents
from tilewise.masks.primitives.intervals import Intervals
from tilewise.masks.primitives.lengths import Lengths
from tilewise.masks.primitives.prefix import Prefix
from tilewise.masks.primitives.window import Window

Sizes = tuple[int, int, int, int]


def expected(mask: Mask, sizes: Sizes) -> np.ndarray:
    """(B, H, Sq, Sk) booleans."""
    match mask:
        case And():
            return np.logical_and.reduce([expected(part, sizes) for part in mask.parts])
        case Or():
            return np.logical_or.reduce([expected(part, sizes) for part in mask.parts])
        case Not():
            return ~expected(mask.part, sizes)
    answer = np.zeros(sizes, bool)
    for pair in np.ndindex(*sizes):
        answer[pair] = _sees(mask, sizes, *pair)
    return answer


def _sees(mask: Mask, sizes: Sizes, b: int, h: int, i: int, j: int) -> bool:
    match mask:
        case Causal():
            return j <= i + _offset(mask, sizes, b)
        case Window():
            distance = j - (i + _offset(mask, sizes, b))
            return (mask.left is None or distance >= -mask.left) and (mask.right is None or distance <= mask.right)
        case Prefix():
            return j < _per_batch(mask.n, b)
        case Lengths():
            return (mask.q is None or i < _per_batch(mask.q, b)) and (mask.k is None or j < _per_batch(mask.k, b))
        case Documents():
            return _at(mask.q_ids, b, i) == _at(mask.k_ids, b, j)
        case Intervals():
            spans = zip(_row(mask.starts, b, h, i), _row(mask.stops, b, h, i), strict=True)
            return any(start <= j < stop for start, stop in spans)
        case Dense():
            array = np.asarray(mask.array)
            place = (b, h, i, j)[4 - array.ndim :]
            return bool(array[tuple(at if size > 1 else 0 for at, size in zip(place, array.shape, strict=True))])
        case Blocks():
            table = np.asarray(mask.map)
            table = table.reshape((1,) * (4 - table.ndim) + table.shape)
            return bool(table[b % table.shape[0], h % table.shape[1], i // mask.size[0], j // mask.size[1]])
        case Predicate():
            at = (np.full((1, 1, 1, 1), place) for place in (b, h, i, j))
            return bool(np.asarray(mask.function(*at)).reshape(-1)[0])
    raise AssertionError(f"no second definition of {type(mask).__name__}")


def _offset(mask: Causal | Window, sizes: Sizes, b: int) -> int:
    if mask.offset is not None:
        return _per_batch(mask.offset, b)
    return sizes[3] - sizes[2] if mask.align == "end" else 0


def _per_batch(value: object, b: int) -> int:
    flat = np.asarray(value, dtype=object).reshape(-1)
    return int(flat[b if flat.size > 1 else 0])


def _at(ids: object, b: int, place: int) -> int:
    rows = np.atleast_2d(np.asarray(ids))
    return int(rows[b if len(rows) > 1 else 0, place])


def _row(bounds: object, b: int, h: int, i: int) -> list[int]:
    array = np.asarray(bounds)
    if array.ndim == 1:
        return [int(array[i])]
    if array.ndim == 3:
        array = array[:, None]
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return [int(value) for value in array[b % array.shape[0], h % array.shape[1], i]]
