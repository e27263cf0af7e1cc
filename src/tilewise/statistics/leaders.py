"""The largest scores of each row and where they stand, kept from tile to tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._arrays import Array
from ..kernels.portable.verbs import Verbs

_MINUS_INF = float("-inf")
# Up to so many leaders are found one after another, which passes over the scores once each; more of them by sorting.
_FEW = 24


@dataclass(frozen=True, slots=True, eq=False)
class Leaders:
    """The largest scores so far of some rows, in descending order; of equal ones that of the lower key comes first.

    Attributes:
        scores: (…, rows, K), -inf where fewer than K keys are seen.
        keys: (…, rows, K) int64 positions, -1 where there is none.
    """

    scores: Array
    keys: Array

    @classmethod
    def none(cls, verbs: Verbs, shape: tuple[int, ...]) -> Leaders:
        """Nothing seen yet; `shape` is (…, rows, K)."""
        scores = verbs.zeros(shape) + _MINUS_INF
        return cls(scores, verbs.xp.broadcast_to(verbs.arange(-1, 0), shape))

    def absorb(self, verbs: Verbs, scores: Array, first: int) -> Leaders:
        """The leaders after a tile: scores (…, rows, keys), -inf where not seen; `first` is the position of its keys.

        Tiles must come in ascending order of their keys.
        """
        xp, last = verbs.xp, self.scores[..., -1]
        # Nothing gets in by a tie; a NaN compares false, and does get in.
        if verbs.known and bool((xp.amax(scores, -1) <= last).all()):
            return self
        found, places = _largest(verbs, scores, min(self.scores.shape[-1], scores.shape[-1]))
        scores = xp.concatenate([self.scores, found], -1)
        # A hidden key is no key, however few others there are.
        keys = xp.concatenate([self.keys, xp.where(found == _MINUS_INF, -1, places + first)], -1)
        order = _descending(verbs, scores)[..., : self.scores.shape[-1]]
        return Leaders(_take(verbs, scores, order), _take(verbs, keys, order))


def _largest(verbs: Verbs, scores: Array, count: int) -> tuple[Array, Array]:
    """The largest elements along the last axis (…, count), descending, ties by the lower place; and their places."""
    if count > _FEW:
        places = _descending(verbs, scores)[..., :count]
        return _take(verbs, scores, places), places
    xp, found, places = verbs.xp, [], []
    column = verbs.arange(0, scores.shape[-1])
    for _ in range(count):
        place = xp.argmax(scores, -1)[..., None]  # the first of several, in NumPy and torch alike
        places.append(place)
        found.append(_take(verbs, scores, place))
        scores = xp.where(column == place, _MINUS_INF, scores)
    return xp.concatenate(found, -1), xp.concatenate(places, -1)


def _descending(verbs: Verbs, scores: Array) -> Array:
    """The order of the last axis from the largest element to the smallest, NaN first, ties by the lower place."""
    if verbs.xp is np:
        return np.argsort(np.where(np.isnan(scores), _MINUS_INF, -scores), axis=-1, kind="stable")
    return verbs.xp.argsort(scores, dim=-1, descending=True, stable=True)


def _take(verbs: Verbs, array: Array, places: Array) -> Array:
    """Elements of the last axis, one list of places per row."""
    return np.take_along_axis(array, places, -1) if verbs.xp is np else verbs.xp.take_along_dim(array, places, -1)
