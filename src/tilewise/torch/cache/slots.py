"""Where tokens lie: a buffer each for keys and values, a batch row's tokens in slots in the order of their positions.

The first `kept` positions of a row stay in the slots of the same number. Behind them position p lies in slot
p - base[row], where base counts the tokens of the row that were dropped; dropping is a matter of moving what is left to
the front, once in as many tokens as there is room for, so that what is attended to is always one view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class Slots:
    """Buffers (B, Hkv, C, D) and (B, Hkv, C, Dv), and for each batch row how many tokens it has and has dropped.

    Attributes:
        buffers: keys and values.
        kept: number of first tokens that are never dropped.
        length, base: (B,) int64, on the host: tokens appended, tokens dropped.
    """

    buffers: tuple[Tensor, Tensor]
    kept: int
    length: np.ndarray = field(init=False)
    base: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        batch = self.buffers[0].shape[0]
        self.length, self.base = np.zeros(batch, np.int64), np.zeros(batch, np.int64)

    @classmethod
    def like(cls, k: Tensor, v: Tensor, capacity: int, kept: int) -> Slots:
        """Empty slots for tokens as k (B, Hkv, n, D) and v (B, Hkv, n, Dv) hold them."""
        return cls((_buffer(k, capacity), _buffer(v, capacity)), kept)

    @property
    def capacity(self) -> int:
        """C."""
        return self.buffers[0].shape[2]

    @property
    def ends(self) -> np.ndarray:
        """The slot after each row's last token, (B,)."""
        return self.length - self.base

    def base_retaining(self, tokens: int | None) -> np.ndarray:
        """What `base` becomes when of each row only the first `kept` and the last `tokens` tokens are retained."""
        if tokens is None:
            return self.base
        return np.maximum(self.base, self.length - tokens - self.kept)

    def move(self, base: np.ndarray, capacity: int) -> None:
        """Drop tokens until `base`, moving the others to the front, in buffers of that capacity."""
        shift, count = base - self.base, self.length - base - self.kept
        alike = same(shift) and same(count)
        rows = [slice(None)] if alike else [slice(b, b + 1) for b in range(len(base))]
        moved = []
        for buffer in self.buffers:
            target = buffer if capacity == buffer.shape[2] else _buffer(buffer, capacity)
            if target is not buffer:
                both = min(self.kept, capacity, buffer.shape[2])  # either may hold fewer than are kept in the end
                target[:, :, :both] = buffer[:, :, :both]
            for n, row in enumerate(rows):
                first, tokens = self.kept + int(shift[n]), max(0, int(count[n]))
                part = buffer[row, :, first : first + tokens]
                # Source and target may overlap in one buffer.
                target[row, :, self.kept : self.kept + tokens] = part.clone() if target is buffer else part
            moved.append(target)
        self.buffers, self.base = (moved[0], moved[1]), base

    def write(self, k: Tensor, v: Tensor, counts: np.ndarray) -> None:
        """Append the first counts[b] tokens of each row; there must be room."""
        ends, width = self.ends, k.shape[2]
        if same(ends) and (counts == width).all():
            for buffer, new in zip(self.buffers, (k, v), strict=True):
                buffer[:, :, int(ends[0]) : int(ends[0]) + width] = new
        else:
            real = np.nonzero(np.arange(width) < counts[:, None])
            row, place = (torch.from_numpy(index).to(k.device) for index in real)
            slot = torch.from_numpy(ends[real[0]] + real[1]).to(k.device)
            for buffer, new in zip(self.buffers, (k, v), strict=True):
                buffer[row, :, slot] = new[row, :, place]
        self.length = self.length + counts

    def select(self, index: Tensor) -> None:
        """Row n becomes a copy of what row index[n] is."""
        there = index.to(self.buffers[0].device)
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (buffer.index_select(0, there) for buffer in self.buffers)
        here = index.cpu().numpy()
        self.buffers, self.length, self.base = (keys, values), self.length[here], self.base[here]


def same(numbers: np.ndarray) -> bool:
    """Whether there are numbers and all are equal."""
    return len(set(numbers.tolist())) == 1


def _buffer(like: Tensor, capacity: int) -> Tensor:
    """Memory for `capacity` tokens: an ordinary tensor, so that it can be written within and without inference mode."""
    with torch.inference_mode(False):
        batch, heads, _, width = like.shape
        return torch.empty((batch, heads, capacity, width), dtype=like.dtype, device=like.device)
