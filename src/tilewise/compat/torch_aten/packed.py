"""Attention of sequences packed one after another: at once where one mask says it, else sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...contract import Dropout
from .calls import Attend, Dense
from .positions import Band, Packed, alibi_bias, dense_mask


def packed_attend(
    packed: Packed,
    band: Band,
    tokens: int,
    *,
    dropout: Dropout | None,
    scale: float | None,
    slopes: Tensor | None = None,
    biased: bool = False,
) -> Attend:
    """Attention of q (1, H, T, D) with `tokens` queries, k and v likewise, and, if `biased`, a bias (B, H, Sq, Sk)."""
    if slopes is None and not biased:
        return Dense(packed.mask(band, tokens), dropout, scale)
    if slopes is not None and slopes.dim() == 1 and packed.aligned:
        return Dense(packed.mask(band, tokens), dropout, scale, alibi_bias(slopes, 0, tokens, tokens))
    return _EachSequence(packed, band, dropout, scale, slopes)


@dataclass(frozen=True, eq=False)
class _EachSequence:
    """A bias is counted within each sequence, which one call over all of them cannot express in linear memory."""

    packed: Packed
    band: Band
    dropout: Dropout | None
    scale: float | None
    slopes: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
        q_starts, k_starts = self.packed.q_starts.tolist(), self.packed.k_starts.tolist()
        used = self.packed.k_lengths.tolist()
        found = []
        for n in range(self.packed.count):
            q_len, k_len = q_starts[n + 1] - q_starts[n], used[n]
            rows, keys = slice(q_starts[n], q_starts[n + 1]), slice(k_starts[n], k_starts[n] + k_len)
            own = [_of_sequence(bias, n)[..., :q_len, :k_len] for bias in biases]
            found.append(self._call(n, q_len, k_len)(q[:, :, rows], k[:, :, keys], v[:, :, keys], *own))
        outs, lses = [list(part) for part in zip(*found, strict=True)] if found else ([], [])
        rest = q.shape[2] - q_starts[-1]
        outs.append(q.new_zeros(*q.shape[:2], rest, v.shape[3]))
        lses.append(torch.full((*q.shape[:2], rest), -torch.inf, dtype=_lse_dtype(q), device=q.device))
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _call(self, n: int, q_len: int, k_len: int) -> Dense:
        fixed = None
        if self.slopes is not None:
            slopes = self.slopes[n] if self.slopes.dim() == 2 else self.slopes
            fixed = alibi_bias(slopes, k_len - q_len if self.band.end else 0, q_len, k_len)
        # One stream of random numbers per sequence, since positions start anew in each.
        dropout = replace(self.dropout, stream=n) if self.dropout else None
        return Dense(dense_mask(self.band, q_len, k_len, None), dropout, self.scale, fixed)


def _of_sequence(bias: Tensor, n: int) -> Tensor:
    """(1, H, Sq, Sk) of (B or 1, H, Sq, Sk), or what has fewer axes as it is."""
    return bias[n : n + 1] if bias.dim() == 4 and bias.shape[0] > 1 else bias


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
