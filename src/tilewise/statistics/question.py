"""What is asked about one call, and what one tile contributes to the answer.

With the log-sum-exp L of each row given, P = exp(S - L) are the probabilities, and everything but the choice of the
largest scores is a sum over tiles: of P itself (weights), of P over the rows (column sums), of P (L - S) over the keys
(entropy), and, once chosen, of the largest scores, which each lie in one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .._arrays import Array
from ..kernels.portable.axes import Axes, Tile
from ..kernels.portable.call import Call

_MINUS_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class Output:
    """Layout and shape of a sum over tiles; `first` is the query row that its first row belongs to."""

    axes: Axes
    shape: tuple[int, ...]
    first: int = 0

    def part(self, tile: Tile) -> tuple[slice, ...]:
        """Where a tile's contribution is added."""
        if not self.first:
            return tile.part(self.axes, self.shape)
        # Asked as if all rows were there: a single row would be taken for one that stands for all.
        full = (*self.shape[:3], tile.q_len, *self.shape[4:])
        *leading, rows, keys = tile.part(self.axes, full)
        return (*leading, slice(rows.start - self.first, rows.stop - self.first), keys)


@dataclass(frozen=True, eq=False)
class Question:
    """What is wanted of a call.

    Attributes:
        call: the call in the shapes of its tiles.
        rows: the query rows that are asked about.
        column_sums, entropy: whether these are wanted.
        weights: "each" head's, their "mean", or None.
        top: how many of the largest scores of each row are wanted.
    """

    call: Call
    rows: slice
    column_sums: bool = False
    entropy: bool = False
    weights: str | None = None
    top: int = 0

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """The sums over tiles, in the order of `sums`; heads grouped."""
        batch, kv_heads, group, q_len, _ = self.call.q.shape
        k_len, rows = self.call.problem.k_len, self.rows
        heads = (kv_heads, group) if self.weights == "each" else (1, 1)
        wanted = (
            (self.column_sums, Output(Axes.PAIRS, (batch, kv_heads, group, 1, k_len))),
            (self.entropy, Output(Axes.ROWS, (batch, kv_heads, group, q_len))),
            (self.weights, Output(Axes.PAIRS, (batch, *heads, rows.stop - rows.start, k_len), rows.start)),
        )
        return tuple(output for want, output in wanted if want)

    def sums(self, tile: Tile, scores: Array, lse: Array) -> list[Array]:
        """What a tile adds to each output, from its scores (b, h, G, R, C) and lse (b, h, G, R), finite."""
        xp, found = self.call.verbs.xp, list[Array]()
        if not self.outputs:
            return found
        p = xp.exp(scores - lse[..., None])
        if tile.visible is not None:
            # A row that sees a NaN has one as its lse, which must not reach the keys that it does not see.
            p = xp.where(tile.visible, p, 0.0)
        if self.column_sums:
            found.append(p.sum(3)[..., None, :])
        if self.entropy:
            # A score of -inf has p = 0 and counts for nothing, but 0 * inf is NaN, in derivatives too.
            hidden = scores == _MINUS_INF
            surprise = lse[..., None] - xp.where(hidden, 0.0, scores)
            found.append(xp.where(hidden, 0.0, p * surprise).sum(-1))
        if self.weights:
            weights = p if tile.factor is None else p * tile.factor
            mean = self.weights == "mean"
            found.append(weights.sum((1, 2))[:, None, None] / self.call.problem.q_heads if mean else weights)
        return found

    def chosen(self, tile: Tile, scores: Array, keys: Array) -> Array:
        """The scores (b, h, G, R, K) at given keys (b, h, G, R, K) where these lie in the tile, else 0."""
        xp, place = self.call.verbs.xp, keys - tile.keys.start
        inside = (place >= 0) & (place < scores.shape[-1])
        place = xp.where(inside, place, 0)
        take = np.take_along_axis if xp is np else xp.take_along_dim
        return xp.where(inside, take(scores, place, -1), 0.0)
