"""What is computed in one tile: scores, weighted values, and their gradients.

With the log-sum-exp L of a row given, P = exp(S - L) are probabilities, and attention is a sum over tiles of
    F(q, k, v, biases; L) = (sum_j z P v, sum_j P).
Its derivatives follow from those of F alone. Reverse, for gradients (dO, dL): out = F_1 and L itself depends on S, so
the pair (dO, pull) goes back through F with L held, where pull = dL - dO . out. Forward, for tangents of F (A, N):
    tangent of L = N (plus the sink's part),  tangent of out = A - out * (tangent of L).
Source for the backward pass by recomputation: Dao et al., FlashAttention (2022).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..._arrays import Array
from .axes import Axes, Tile
from .verbs import Verbs
from .walk import gather_band, spread_band

_MINUS_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class Local:
    """The functions of one tile; all arrays in the accumulator's dtype, cut to the tile.

    Shapes: q (b, h, G, R, D), k (b, h, C, D), v (b, h, C, Dv), biases as their `axes` say, lse and pull (b, h, G, R),
    d_out (b, h, G, R, Dv).

    Attributes:
        verbs: the framework's verbs.
        scale, softcap: of the scores.
        biases: layout of each bias.
        wanted: which gradients to make: of q, k, v and then of each bias.
    """

    verbs: Verbs
    scale: float
    softcap: float | None
    biases: tuple[Axes, ...]
    wanted: tuple[bool, ...] = ()

    def scores(self, tile: Tile, q: Array, k: Array, biases: tuple[Array, ...]) -> tuple[Array, Array | None]:
        """Scores (b, h, G, R, C), -inf where not visible, and the slope of the soft cap there, None without a cap."""
        xp, slope = self.verbs.xp, None
        s = self._pairs(tile, q * self.scale, k)
        if self.softcap is not None:
            t = xp.tanh(s / self.softcap)
            s, slope = t * self.softcap, 1 - t * t
        for axes, bias in zip(self.biases, biases, strict=True):
            s = s + (spread_band(self.verbs, bias, s.shape[-1]) if axes is Axes.BAND else bias)
        if tile.visible is not None:
            s = xp.where(tile.visible, s, _MINUS_INF)
        return s, slope

    def weigh(self, tile: Tile, weights: Array, v: Array) -> Array:
        """Weights (b, h, G, R, C), 0 where not visible, after dropout: the weighted values (b, h, G, R, Dv)."""
        return self._spread(tile, weights if tile.factor is None else weights * tile.factor, v)

    def sums(self, tile: Tile, q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, Array]:
        """F of the module's text; `rest` is the biases and lse."""
        *biases, lse = rest
        s, _ = self.scores(tile, q, k, tuple(biases))
        p = self.verbs.xp.exp(s - lse[..., None])
        return self.weigh(tile, p, v), p.sum(-1)

    def row_sums(self, tile: Tile, q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, Array]:
        """Sums over keys of P and of P with its gradient, before dropout; `rest` is the biases, L and d_out."""
        *biases, lse, d_out = rest
        s, _ = self.scores(tile, q, k, tuple(biases))
        p = self.verbs.xp.exp(s - lse[..., None])
        d_p = self._pairs(tile, d_out, v)
        if tile.factor is not None:
            d_p = d_p * tile.factor
        pull = p * d_p
        if tile.visible is not None:
            # Hidden pairs have p = 0, but 0 * NaN is NaN.
            pull = self.verbs.xp.where(tile.visible, pull, 0.0)
        return p.sum(-1), pull.sum(-1)

    def gradients(self, tile: Tile, q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, ...]:
        """The wanted gradients of F, in order; `rest` is the biases, lse, d_out and pull."""
        *biases, lse, d_out, pull = rest
        xp = self.verbs.xp
        s, slope = self.scores(tile, q, k, tuple(biases))
        p = xp.exp(s - lse[..., None])
        d_p = self._pairs(tile, d_out, v)
        if tile.factor is not None:
            d_p = d_p * tile.factor
        d_s = p * (d_p + pull[..., None])
        if tile.visible is not None:
            # Hidden pairs have p = 0, but 0 * NaN is NaN.
            d_s = xp.where(tile.visible, d_s, 0.0)
        raw = d_s if slope is None else d_s * slope
        if slope is not None and tile.visible is not None:
            raw = xp.where(tile.visible, raw, 0.0)
        want_q, want_k, want_v, *want_biases = self.wanted
        done = []
        if want_q:
            done.append(self._spread(tile, raw, k) * self.scale)
        if want_k:
            done.append(self._gather(tile, raw, q) * self.scale)
        if want_v:
            done.append(self._gather(tile, p if tile.factor is None else p * tile.factor, d_out))
        for axes, bias, want in zip(self.biases, biases, want_biases, strict=True):
            if want:
                done.append(self._bias_gradient(axes, d_s, tuple(bias.shape)))
        return tuple(done)

    def _bias_gradient(self, axes: Axes, d_s: Array, shape: tuple[int, ...]) -> Array:
        full = gather_band(self.verbs, _sum_to(d_s, (*shape[:3], *d_s.shape[3:]))) if axes is Axes.BAND else d_s
        return _sum_to(full, shape)

    def _pairs(self, tile: Tile, x: Array, y: Array) -> Array:
        """x (b, h, G, R, D), y (b, h, C, D): (b, h, G, R, C). The group joins the rows, so that y is read once."""
        batch, heads, group, rows, _ = x.shape
        flat = _rows(x)
        s = self.verbs.pairs(flat, y, self._seen(tile, x)) if tile.careful else flat @ y.swapaxes(-1, -2)
        return s.reshape(batch, heads, group, rows, y.shape[-2])

    def _spread(self, tile: Tile, a: Array, y: Array) -> Array:
        """a (b, h, G, R, C), y (b, h, C, D): the sum over keys (b, h, G, R, D)."""
        batch, heads, group, rows, _ = a.shape
        total = self.verbs.spread(_rows(a), y, self._seen(tile, a)) if tile.careful else _rows(a) @ y
        return total.reshape(batch, heads, group, rows, y.shape[-1])

    def _gather(self, tile: Tile, a: Array, x: Array) -> Array:
        """a (b, h, G, R, C), x (b, h, G, R, D): the sum over rows and group (b, h, C, D)."""
        down, flat = _rows(a).swapaxes(-1, -2), _rows(x)
        return self.verbs.spread(down, flat, self._seen(tile, a).swapaxes(-1, -2)) if tile.careful else down @ flat

    def _seen(self, tile: Tile, example: Array) -> Array:
        """Visibility for the products, (b, h, G R, C)."""
        assert tile.visible is not None
        keys = tile.keys.stop - tile.keys.start
        return _rows(self.verbs.xp.broadcast_to(tile.visible, (*example.shape[:4], keys)))


def _rows(array: Array) -> Array:
    """(b, h, G, R, …) as (b, h, G R, …)."""
    batch, heads, group, rows, last = array.shape
    return array.reshape(batch, heads, group * rows, last)


def _sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that `shape` has as 1."""
    axes = tuple(axis for axis, (size, full) in enumerate(zip(shape, array.shape, strict=True)) if size != full)
    return array.sum(axes, keepdims=True) if axes else array
