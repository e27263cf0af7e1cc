"""Nested tensors taken apart into their rows, and put together again, with gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """A nested tensor (B, ragged, ...) of either layout as its rows.

    Attributes:
        rows: all rows of all sequences, (sum of lengths, ...).
        lengths: number of rows of each sequence.
        origin: the nested tensor.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    origin: Tensor

    @classmethod
    def of(cls, nested: Tensor) -> Ragged:
        """Take apart; gradients flow back to the nested tensor."""
        sequences = nested.unbind()
        rows = torch.cat(sequences) if sequences else nested.values()
        return cls(rows, tuple(sequence.shape[0] for sequence in sequences), nested)

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)

    def padded(self, rows: Tensor, length: int) -> Tensor:
        """rows (sum of lengths, ...) as (B, length, ...), zeros after the end of each sequence."""
        batch = len(self.lengths)
        flat = rows.new_zeros(batch * length, *rows.shape[1:])
        return flat.index_copy(0, self._places(length), rows).unflatten(0, (batch, length))

    def unpadded(self, padded: Tensor) -> Tensor:
        """The rows of (B, length, ...) that are no padding, (sum of lengths, ...)."""
        return padded.flatten(0, 1).index_select(0, self._places(padded.shape[1]))

    def nested(self, rows: Tensor) -> Tensor:
        """rows (sum of lengths, ...) as a nested tensor of the origin's layout, with a jagged one's very raggedness."""
        if self.origin.layout is torch.jagged and self.origin.lengths() is None:
            # The same offsets tensor stands for the same raggedness: only so can the result be added to the origin.
            return torch.nested.nested_tensor_from_jagged(rows, self.origin.offsets())
        return torch.nested.as_nested_tensor(list(rows.split(self.lengths)), layout=self.origin.layout)

    def _places(self, length: int) -> Tensor:
        """Where each row stands in (B * length) padded rows."""
        device = self.rows.device
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        gaps = (length - lengths).cumsum(0) - (length - lengths)  # padding in front of each sequence
        return torch.arange(self.rows.shape[0], device=device) + gaps.repeat_interleave(lengths)
