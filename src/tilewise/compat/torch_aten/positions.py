"""Causality, windows, lengths and ALiBi as flash-attention counts them, for dense and for packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...masks.algebra import Mask
from ...masks.biases import Bias, relative
from ...masks.primitives import causal, intervals, lengths, window


@dataclass(frozen=True)
class Band:
    """The keys near a query: p - left … p + right around its position p, both inclusive, None for unbounded.

    Attributes:
        end: whether the last query stands at the last key (bottom-right); else query 0 stands at key 0 (top-left).
    """

    left: int | None = None
    right: int | None = None
    end: bool = True

    @classmethod
    def of(cls, is_causal: bool, left: int | None, right: int | None, end: bool = True) -> Band:
        """From aten's arguments, in which -1 means unbounded, too, and causal means nothing on the right."""
        left, right = (None if width is None or width < 0 else width for width in (left, right))
        return cls(left, 0 if is_causal else right, end)

    @property
    def everything(self) -> bool:
        """Whether it leaves nothing out."""
        return self.left is None and self.right is None


def dense_mask(band: Band, q_len: int, k_len: int, used: Tensor | None) -> Mask | None:
    """The band in (B, H, Sq, Sk), for keys of which only the first `used` (B,) exist."""
    offset = offset_of(band, q_len, k_len, used)
    mask = None
    if not band.everything:
        mask = (
            causal(offset=offset)
            if band.left is None and band.right == 0
            else window(band.left, band.right, offset=offset)
        )
    if used is None:
        return mask
    kept = lengths(k=used)
    return kept if mask is None else mask & kept


def offset_of(band: Band, q_len: int, k_len: int, used: Tensor | None) -> Tensor | int:
    """Position of query 0 on the key axis: an int, or (B,)."""
    if not band.end:
        return 0
    return k_len - q_len if used is None else used - q_len


def alibi_bias(slopes: Tensor, offset: Tensor | int, q_len: int, k_len: int) -> Bias:
    """-slope * |i + offset - j|, linear in memory. slopes: (H,) or (B, H), floats; offset: an int or (B,)."""
    distance = torch.arange(max(q_len + k_len - 1, 0), device=slopes.device) + (1 - q_len)
    if isinstance(offset, Tensor):
        distance = distance - offset[:, None, None]  # (B, 1, Sq + Sk - 1)
    else:
        distance = distance - offset
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    return relative(-slopes[..., None] * distance.abs())


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences one after another: which tokens belong to which.

    Attributes:
        q_starts, k_starts: (B + 1,) integers, where each begins and the last ends.
        used: (B,), how many keys of each exist, or None for all.
    """

    q_starts: Tensor
    k_starts: Tensor
    used: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of sequences."""
        return self.q_starts.shape[0] - 1

    @property
    def k_lengths(self) -> Tensor:
        """(B,), keys that exist."""
        return self.k_starts.diff() if self.used is None else self.used

    @property
    def aligned(self) -> bool:
        """Whether queries and keys are known to lie alike, as in self-attention: by identity, which needs no look."""
        return self.q_starts is self.k_starts and self.used is None

    def places(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Sequence of each query and its position within, (tokens,) each; B for a query after the last sequence."""
        rows = torch.arange(tokens, device=self.q_starts.device, dtype=self.q_starts.dtype)
        sequence = torch.searchsorted(self.q_starts[1:].contiguous(), rows, right=True)
        return sequence, rows - self.q_starts[sequence.clamp(max=self.count)]

    def mask(self, band: Band, tokens: int) -> Mask:
        """The band of each sequence, in packed coordinates: one interval of keys for each query."""
        sequence, row = self.places(tokens)
        outside = sequence >= self.count
        sequence = sequence.clamp(max=max(self.count - 1, 0))
        used, first = self.k_lengths[sequence], self.k_starts[:-1][sequence]
        position = row + used - self.q_starts.diff()[sequence] if band.end else row
        start = torch.zeros_like(row) if band.left is None else (position - band.left).clamp(min=0)
        stop = used if band.right is None else torch.minimum(used, position + band.right + 1)
        return intervals(first + start, (first + stop).masked_fill(outside, 0))

    def padded(self, rows: Tensor, longest: int) -> Tensor:
        """rows (H, T) as (B, H, longest), -inf where there is no query."""
        sequence, row = self.places(rows.shape[1])
        # One place more takes queries behind the last sequence: no size depends on values, for which a GPU would wait.
        full = rows.new_full((self.count + 1, longest, rows.shape[0]), -torch.inf)
        places = sequence, row.clamp(max=max(longest - 1, 0)).long()
        return full.index_put(places, rows.transpose(0, 1))[:-1].transpose(1, 2)

    def unpadded(self, array: Tensor, tokens: int) -> Tensor:
        """(B, H, longest) as (H, T), -inf for queries after the last sequence."""
        sequence, row = self.places(tokens)
        last = max(self.count - 1, 0), max(array.shape[2] - 1, 0)
        rows = array[sequence.clamp(max=last[0]), :, row.clamp(max=last[1]).long()]
        return rows.masked_fill((sequence >= self.count)[:, None], -torch.inf).transpose(0, 1)
