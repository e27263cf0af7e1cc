"""The mask functions of transformers as tilewise masks.

transformers writes a mask as a function of the positions (b, h, i, j), put together from a few closures of its module
`masking_utils`. Each of those is a primitive here, so the tree of closures becomes a tree of masks, in memory linear in
Sq + Sk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from transformers import masking_utils as theirs

from ....masks.algebra import Mask
from ....masks.primitives import causal, documents, lengths, window

Function = Callable[..., Any]


class NotUnderstood(LookupError):
    """A mask function that has no translation; its elements have to be asked for one by one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the queries and keys of a call stand: queries at q_offset + i, keys at kv_offset + j, in B rows."""

    batch: int
    q_len: int
    k_len: int
    q_offset: int = 0
    kv_offset: int = 0

    @property
    def offset(self) -> int:
        """The position of query 0 on the key axis."""
        return self.q_offset - self.kv_offset

    def queries(self) -> np.ndarray:
        """Positions of the queries, (Sq,)."""
        return self.q_offset + np.arange(self.q_len)

    def keys(self) -> np.ndarray:
        """Positions of the keys, (Sk,)."""
        return self.kv_offset + np.arange(self.k_len)


def translate(function: Function, place: Place) -> Mask | None:
    """A mask function as a mask; None where every query sees every key.

    Raises:
        NotUnderstood: the function, or a part of it, is not one of transformers' own.
    """
    rule = _RULES.get(function.__qualname__) if function.__module__ == theirs.__name__ else None
    if rule is None:
        raise NotUnderstood(getattr(function, "__qualname__", repr(function)))
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return rule(place, **dict(zip(function.__code__.co_freevars, cells, strict=True)))


def padding(real: torch.Tensor | None, place: Place) -> Mask | None:
    """Padding, booleans (B, L), as a mask on the keys; a key at a position from L on is padding.

    One run of real tokens in each row, the usual case, is two lengths; with gaps in between, it is labels on the keys.
    """
    if real is None:
        return None
    keys = place.keys()
    known = keys < real.shape[1]
    seen = np.zeros((real.shape[0], place.k_len), bool)
    seen[:, known] = _host(real)[:, keys[known]] != 0
    if seen.all():
        return None
    count = seen.sum(1)
    first = np.where(count > 0, seen.argmax(1), 0) if place.k_len else count
    last = np.where(count > 0, place.k_len - seen[:, ::-1].argmax(1), 0) if place.k_len else count
    if (last - first < count).any() or (last - first > count).any():
        return documents(np.zeros(place.q_len, np.int64), np.where(seen, 0, 1))
    after = lengths(k=last) if (last < place.k_len).any() else None
    before = ~lengths(k=first) if first.any() else None
    return both(after, before)


def both(*masks: Mask | None) -> Mask | None:
    """The intersection of masks, where None is the mask that shows everything."""
    given = [mask for mask in masks if mask is not None]
    return reduce(lambda a, b: a & b, given) if given else None


def _either(*masks: Mask | None) -> Mask | None:
    return None if None in masks else reduce(lambda a, b: a | b, (mask for mask in masks if mask is not None))


def _packed(place: Place, packed_sequence_mask: torch.Tensor) -> Mask:
    ids = _host(packed_sequence_mask)
    return documents(_at(ids, place.queries()), _at(ids, place.keys()))


def _within_sequence(place: Place, mask_function: Function, position_ids: torch.Tensor) -> Mask | None:
    """Positions counted from the start of each packed sequence.

    Two tokens of one sequence are as far apart in their own positions as on the axis, and tokens of two sequences are
    kept apart by `_packed`. So a mask that asks for distances alone is the same mask; of others we know too little.
    """
    if _needs_only_distances(mask_function):
        return translate(mask_function, place)
    raise NotUnderstood(mask_function.__qualname__)


def _needs_only_distances(function: Function) -> bool:
    if function.__module__ != theirs.__name__:
        return False
    if function.__qualname__ in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
        return all(map(_needs_only_distances, function.__closure__[0].cell_contents))
    return function.__qualname__ in _BY_DISTANCE


def _sliding(place: Place, sliding_window: int) -> Mask:
    """Keys j > i - sliding_window. Models that have switched their windows off still ask, with a window of 0."""
    if sliding_window > 0:
        return window(sliding_window - 1, None, offset=place.offset)
    return ~causal(offset=place.offset - sliding_window)


def _chunks(place: Place, chunk_size: int, left_padding: torch.Tensor) -> Mask:
    starts = _host(left_padding).reshape(-1, 1)
    return documents((place.queries() - starts) // chunk_size, (place.keys() - starts) // chunk_size)


def _groups(place: Place, block_sequence_ids: torch.Tensor) -> Mask:
    """Tokens of one group see each other; a negative group is no group, even to itself."""
    ids = _host(block_sequence_ids)
    queries, keys = _at(ids, place.queries()), _at(ids, place.keys())
    return documents(np.where(queries < 0, -1, queries), np.where(keys < 0, -2, keys))


_RULES: dict[str, Callable[..., Mask | None]] = {
    "causal_mask_function": lambda place: causal(offset=place.offset),
    "bidirectional_mask_function": lambda place: None,
    "sliding_window_overlay.<locals>.inner_mask": _sliding,
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda place, sliding_window: window(
        sliding_window, sliding_window, offset=place.offset
    ),
    "chunked_overlay.<locals>.inner_mask": _chunks,
    "blockwise_overlay.<locals>.inner_mask": _groups,
    "padding_mask_function.<locals>.inner_mask": lambda place, padding_mask: padding(padding_mask, place),
    "packed_sequence_mask_function.<locals>.inner_mask": _packed,
    "remap_positions_for_packed_sequence.<locals>.inner_mask": _within_sequence,
    "and_masks.<locals>.and_mask": lambda place, mask_functions: both(*_each(place, mask_functions)),
    "or_masks.<locals>.or_mask": lambda place, mask_functions: _either(*_each(place, mask_functions)),
}

_BY_DISTANCE = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
}


def _each(place: Place, functions: Iterable[Function]) -> list[Mask | None]:
    return [translate(function, place) for function in functions]


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _at(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """ids (B, L) at positions, (B, n)."""
    return ids[:, positions]
