"""Packed sequences: a query sees the keys of its own document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..._arrays import Array, as_array
from ..algebra import Mask, told_apart
from ..ranges import Ranges, from_bounds
from ..site import Site
from .positions import check_integers


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """See `documents`."""

    q_ids: Array
    k_ids: Array
    arrays: ClassVar[tuple[str, ...]] = ("q_ids", "k_ids")

    def check(self, site: Site) -> None:
        for name, ids, length in (("q_ids", self.q_ids, site.q_len), ("k_ids", self.k_ids, site.k_len)):
            shape = tuple(ids.shape)
            if shape not in ((length,), (1, length), (site.batch, length)):
                raise ValueError(
                    f"mask: documents({name}) has shape {shape}, expected ({length},) or ({site.batch}, {length})"
                )

    def extent(self) -> tuple[int, int]:
        return told_apart(*(ids.shape[0] if ids.ndim == 2 else 1 for ids in (self.q_ids, self.k_ids))), 1

    def ranges(self, site: Site) -> Ranges | None:
        """Where each document is one run of keys; needs to look at the ids."""
        if not site.concrete or not site.batch:
            return None
        q_ids, k_ids = _rows(site, self.q_ids), _rows(site, self.k_ids)
        bounds = []
        for b in range(max(len(q_ids), len(k_ids))):
            run = _run_per_query(site, q_ids[min(b, len(q_ids) - 1)], k_ids[min(b, len(k_ids) - 1)])
            if run is None:
                return None
            bounds.append(run)
        starts, stops = (np.stack(side)[:, None, :, None] for side in zip(*bounds, strict=True))
        return from_bounds(site, starts, stops)

    def labels(self, site: Site) -> tuple[Array, Array]:
        q_ids, k_ids = _rows(site, self.q_ids), _rows(site, self.k_ids)
        if site.concrete:
            # Small consecutive numbers, so that any 64-bit ids fit the kernels' 32 bits.
            ids = np.concatenate([q_ids.ravel(), k_ids.ravel()])
            numbers = np.unique(ids, return_inverse=True)[1].astype(np.int32).ravel()
            q_ids, k_ids = numbers[: q_ids.size].reshape(q_ids.shape), numbers[q_ids.size :].reshape(k_ids.shape)
        return q_ids[:, None, :], k_ids[:, None, :]

    def visible(self, site: Site, b: Array, h: Array, i: Array, j: Array) -> Array:
        q_ids, k_ids = _rows(site, self.q_ids), _rows(site, self.k_ids)
        return q_ids[b if len(q_ids) > 1 else 0 * b, i] == k_ids[b if len(k_ids) > 1 else 0 * b, j]


def documents(q_ids: Array, k_ids: Array | None = None) -> Mask:
    """Query i sees key j iff q_ids[i] == k_ids[j]; ids are any integers and need not be contiguous.

    Args:
        q_ids: (Sq,) or (B, Sq), integers. k_ids: (Sk,) or (B, Sk); None is `q_ids`, for self-attention.

    Raises:
        TypeError: ids that are not integers. ValueError: lists of unequal lengths; at the call, a shape that does not
            fit.
    """
    k_ids = q_ids if k_ids is None else k_ids
    q_ids, k_ids = as_array("q_ids", q_ids), as_array("k_ids", k_ids)
    for argument, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
        if isinstance(ids, int):
            raise TypeError(f"{argument}: documents() got an int, expected an array of integers")
        check_integers(argument, "documents()", ids)
    return Documents(q_ids, k_ids)


def _rows(site: Site, ids: Array) -> Array:
    array = site.array(ids)
    return array.reshape(1, -1) if array.ndim == 1 else array


def _run_per_query(site: Site, q_ids: np.ndarray, k_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """For each query the run of keys with its id, or None if some id has more than one run. Shapes (Sq,), (Sk,)."""
    change = np.flatnonzero(k_ids[1:] != k_ids[:-1]) + 1
    starts = np.concatenate([[0], change]) if k_ids.size else change
    stops = np.concatenate([change, [k_ids.size]]) if k_ids.size else change
    order = np.argsort(k_ids[starts], kind="stable")
    starts, stops = starts[order].astype(site.index), stops[order].astype(site.index)
    ids = k_ids[starts]
    if np.any(ids[1:] == ids[:-1]):
        return None
    if not ids.size:
        return np.zeros_like(q_ids, site.index), np.zeros_like(q_ids, site.index)
    place = np.minimum(np.searchsorted(ids, q_ids), ids.size - 1)
    found = ids[place] == q_ids
    return np.where(found, starts[place], 0), np.where(found, stops[place], 0)
