"""The masks of `torch.nn`, where True means "ignore" and floats are added, as tilewise's masks and biases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add, and_

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...masks.algebra import Mask
from ...masks.biases import Bias, as_bias
from ...masks.primitives import dense, documents
from ...masks.site import Site

# Elements up to which a mask is inverted in a copy. Kernels read arrays in place, while a negation is asked tile by
# tile, three times as slow; beyond this size the memory counts more.
SMALL = 2**24


@dataclass(frozen=True, eq=False)
class Masking:
    """What one call masks and adds.

    Attributes:
        symbols: masks of tilewise's own language.
        masks: masks out of tensors. ignored: the same as booleans (B or 1, H or 1, L or 1, S), True = ignore.
        added: floats added to the scores, of the same shapes.
    """

    symbols: tuple[Mask, ...] = ()
    masks: tuple[Mask, ...] = ()
    ignored: tuple[Tensor, ...] = ()
    added: tuple[Tensor, ...] = ()

    def __add__(self, other: Masking) -> Masking:
        return Masking(
            self.symbols + other.symbols,
            self.masks + other.masks,
            self.ignored + other.ignored,
            self.added + other.added,
        )

    @property
    def mask(self) -> Mask | None:
        """All masks as one."""
        masks = self.symbols + self.masks
        return reduce(and_, masks) if masks else None

    @property
    def bias(self) -> Bias | None:
        """All biases as one."""
        return reduce(add, map(as_bias, self.added)) if self.added else None

    def hidden(self, batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> Tensor | None:
        """Booleans that broadcast to (B, H, L, S), True where key j does not exist for query i; None where all do."""
        parts = [*self.ignored, *(array == -torch.inf for array in self.added)]
        parts += [~seen_by(mask, batch, heads, q_len, k_len, device) for mask in self.symbols]
        return reduce(torch.logical_or, parts) if parts else None


def of_symbol(mask: Mask) -> Masking:
    """A mask of tilewise's own language."""
    return Masking(symbols=(mask,))


def of_scores(mask: Tensor) -> Masking:
    """A mask per pair, (B or 1, H or 1, L, S): booleans (True = ignore), or floats that are added."""
    if mask.is_floating_point():
        return Masking(added=(mask,))
    visible = dense(~mask) if mask.numel() <= SMALL else ~dense(mask)
    return Masking(masks=(visible,), ignored=(mask,))


def of_keys(mask: Tensor, q_len: int) -> Masking:
    """A mask per key, (B, S): booleans (True = ignore), or floats that are added."""
    if mask.is_floating_point():
        return Masking(added=(mask[:, None, None],))
    # Keys to keep are one document and keys to ignore another; all queries belong to the first. Padding at an end thus
    # becomes ranges, any other pattern labels, and both are linear.
    queries = torch.zeros(q_len, dtype=torch.int32, device=mask.device)
    keys = documents(queries, mask.to(torch.int32))
    return Masking(masks=(keys,), ignored=(mask[:, None, None],))


def with_more_keys(mask: Tensor, count: int) -> Tensor:
    """The mask of S + count keys, of which all see the last."""
    return pad(mask, (0, count)) if count else mask


def seen_by(mask: Mask, batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> Tensor:
    """Booleans that broadcast to (B, H, L, S), from the mask's definition element by element; quadratic."""
    site = Site(batch, heads, q_len, k_len, family="torch", concrete=False, device=device)
    mask.check(site)
    b, h, i, j = (
        torch.arange(size, device=device).reshape([-1 if axis == n else 1 for axis in range(4)])
        for n, size in enumerate((batch, heads, q_len, k_len))
    )
    seen: Tensor = mask.visible(site, b, h, i, j)
    return seen
