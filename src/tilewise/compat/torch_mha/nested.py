"""Nested inputs of `nn.MultiheadAttention` as padded ones, and the results back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import ShapeError
from .ragged import Ragged


@dataclass(frozen=True, eq=False)
class NestedCall:
    """Queries (B, ragged, E), and keys and values of one raggedness, which may be another, padded to the longest.

    Attributes:
        queries, keys: as they were given.
        padded: query (B, L, E), key (B, S, Ek), value (B, S, Ev); the same object where the same was given.
    """

    queries: Ragged
    keys: Ragged
    padded: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> NestedCall:
        """Take apart.

        Raises:
            ValueError (also an AssertionError): inputs that are not 3-D or not nested all three, or values of other
                lengths than keys.
        """
        named = {"query": query, "key": key, "value": value}
        for name, array in named.items():
            if array.dim() != 3:
                raise ShapeError(
                    f"{name}: query should be unbatched 2D or batched 3D tensor but received {array.dim()}-D {name} "
                    "tensor"
                )
            if not array.is_nested:
                raise ShapeError(
                    f"{name}: is dense, expected query, key and value to be nested all three or not at all"
                )
        taken = {id(array): Ragged.of(array) for array in named.values()}
        queries, keys, values = (taken[id(array)] for array in named.values())
        if values.lengths != keys.lengths:
            raise ShapeError(f"value: has lengths {values.lengths}, expected those of key, {keys.lengths}")
        filled = {place: ragged.padded(ragged.rows, ragged.longest) for place, ragged in taken.items()}
        return cls(queries, keys, (filled[id(query)], filled[id(key)], filled[id(value)]))

    def key_padding(self, mask: Tensor | None) -> Tensor:
        """(B, S), the mask given, booleans (True = ignore) or floats, and the keys past each sequence's end ignored."""
        missing = _missing(self.keys)
        if mask is None:
            return missing
        return mask | missing if mask.dtype == torch.bool else mask.masked_fill(missing, -torch.inf)

    def restored(self, out: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """out (B, L, E) nested as the queries; weights (B, L, S) or (B, H, L, S), 0 past each sequence's end."""
        if weights is not None:
            missing = _missing(self.queries)
            weights = weights.masked_fill(missing[..., None] if weights.dim() == 3 else missing[:, None, :, None], 0.0)
        return self.queries.nested(self.queries.unpadded(out)), weights


def _missing(ragged: Ragged) -> Tensor:
    """(B, longest) booleans, True past the end of a sequence."""
    lengths = torch.tensor(ragged.lengths, device=ragged.rows.device)
    return torch.arange(ragged.longest, device=ragged.rows.device) >= lengths[:, None]
