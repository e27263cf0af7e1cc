"""Which slots the queries of a call see: one run of slots, or two once tokens behind the kept ones were dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...masks.algebra import Mask
from ...masks.biases import T5, Alibi, Bias, t5_buckets
from ...masks.primitives import lengths, prefix, window
from .slots import Slots, same

Distances = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of slots whose positions ascend one by one.

    Attributes:
        slots: the run.
        offset: (B,) where each row's query 0 stands on the axis of these slots.
        mask: who sees whom.
    """

    slots: slice
    offset: np.ndarray
    mask: Mask | None

    def table(self, distances: Distances, queries: int, device: torch.device) -> Tensor:
        """The bias as a table (Hq, n + Sk - 1), or (B, Hq, n + Sk - 1) where rows stand differently.

        Args:
            distances: gives (Hq, m) or (B, Hq, m) for distances (m,) from a query to a key.
        """
        width = queries + self.slots.stop - self.slots.start - 1
        first = 1 - queries - self.offset
        low, high = int(first.min()), int(first.max())
        values = distances(torch.arange(low, high + width, device=device))
        if low == high:
            return values
        values = values if values.ndim == 3 else values[None].expand(len(first), -1, -1)
        return torch.stack([values[b, :, start : start + width] for b, start in enumerate((first - low).tolist())])


def segments(slots: Slots, queries: int, counts: np.ndarray, width: int | None, causal: bool) -> list[Segment]:
    """The segments that the last counts[b] tokens of each row, standing in `queries` rows, may see.

    Args:
        width: how many tokens a query sees, its own included; None is all.
        causal: False lets every query see every token.
    """
    kept, stop = slots.kept, int(slots.ends.max(initial=0))
    first = slots.length - counts  # the position of each row's query 0
    if not causal:
        found = [Segment(slice(0, stop), first, None if (slots.ends == stop).all() else lengths(k=slots.ends))]
    elif kept and (slots.base > 0).any():
        found = [
            Segment(slice(0, kept), first, _past(None, first)),
            _near(kept, max(kept, stop), first - slots.base - kept, width, queries),
        ]
    elif kept:
        found = [Segment(slice(0, stop), first, _past(width, first) | (prefix(kept) & _past(None, first)))]
    else:
        found = [_near(0, stop, first - slots.base, width, queries)]
    if (counts == queries).all():
        return found
    padding = lengths(q=counts)
    return [replace(part, mask=padding if part.mask is None else part.mask & padding) for part in found]


def _near(start: int, stop: int, offset: np.ndarray, width: int | None, queries: int) -> Segment:
    """What lies in the window of some query, of the slots [start, stop)."""
    unseen = 0 if width is None else min(max(0, int(offset.min(initial=stop)) - width + 1), stop - start)
    offset, start = offset - unseen, start + unseen
    # A single query that stands at the end sees all that is left.
    alone = queries == 1 and (offset == stop - start - 1).all()
    return Segment(slice(start, stop), offset, None if alone else _past(width, offset))


def _past(width: int | None, offset: np.ndarray) -> Mask:
    """A query's own token and those before it, `width` in all."""
    # An int where all rows stand alike: a mask without arrays is lowered once for all layers.
    return window(None if width is None else width - 1, 0, offset=int(offset[0]) if same(offset) else offset)


def by_distance(bias: Bias | Distances | None) -> Distances | None:
    """A bias as a function of distances.

    Raises:
        TypeError: a bias that is none of the distance alone.
    """
    if bias is None:
        return None
    if isinstance(bias, Bias):
        terms = [_term(part) for part in bias.parts()]
        return lambda distance: sum((term(distance) for term in terms[1:]), terms[0](distance))
    if callable(bias):
        return bias
    raise TypeError(f"bias: got {type(bias).__name__}, expected alibi, t5 or a function of distances (m,)")


def _term(part: Bias) -> Distances:
    if isinstance(part, Alibi):
        return lambda distance: -torch.as_tensor(part.slopes, device=distance.device)[..., None] * distance.abs()
    if isinstance(part, T5) and not part.offset:
        return lambda distance: _t5(part, distance)
    raise TypeError(
        f"bias: got {type(part).__name__}, expected alibi, t5 without offset= or a function of distances (m,): "
        "a cache knows positions, not the keys of one call"
    )


def _t5(part: T5, distance: Tensor) -> Tensor:
    buckets = t5_buckets(distance.cpu().numpy(), part.weight.shape[0], part.bidirectional, part.max_distance)
    weight = torch.as_tensor(part.weight, device=distance.device)
    return weight[torch.from_numpy(buckets).to(distance.device)].mT
