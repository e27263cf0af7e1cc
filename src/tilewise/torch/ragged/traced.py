"""Sequences whose lengths cannot be looked at, as in a compiled program: one call, with an interval of keys per query.

This serves the masks of which each query sees one run of keys: causal, windows, prefixes, lengths, and what `&` joins
of them. A row's sum is cut into other tiles than that of its sequence alone, so its last bits may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _api
from ...masks.algebra import And, Mask
from ...masks.primitives import intervals
from ...masks.primitives.causal import Causal
from ...masks.primitives.lengths import Lengths
from ...masks.primitives.prefix import Prefix
from ...masks.primitives.window import Window
from .packed import Options


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Sequence n is the rows [starts[n], starts[n] + lengths[n]); both (B,) int64, starts ascending."""

    starts: Tensor
    lengths: Tensor


def bounds_of(cumulative: Any, used: Any, device: torch.device) -> Bounds:
    """The sequences of cumulative lengths (B + 1,), each shortened to `used` (B,) where that is given."""
    edges = torch.as_tensor(cumulative, device=device).long()
    lengths = edges.diff() if used is None else torch.as_tensor(used, device=device).long()
    return Bounds(edges[:-1], lengths)


def is_traceable(options: Options) -> bool:
    """Whether every query of a sequence sees one run of its keys, and nothing else tells keys apart."""
    return options.bias is None and options.dropout is None and (options.mask is None or _is_run(options.mask))


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Bounds, k_bounds: Bounds, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, Dv) and lse (Tq, Hq) of q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv)."""
    rows = torch.arange(q.shape[0], device=q.device)
    place = torch.searchsorted(q_bounds.starts.contiguous(), rows, right=True) - 1
    sequence = place.clamp(min=0)
    queries, keys = q_bounds.lengths[sequence], k_bounds.lengths[sequence]
    row = _Row(rows - q_bounds.starts[sequence], sequence, queries, keys)
    start, stop = torch.zeros_like(rows), keys
    if options.mask is not None:
        first, last = _run(options.mask, row)
        start, stop = torch.maximum(start, first), torch.minimum(stop, last)
    exists = (place >= 0) & (row.position < queries)
    stop = torch.where(exists, torch.maximum(start, stop), start)
    first_key = k_bounds.starts[sequence]
    out, lse = _api.attention(
        q[None], k[None], v[None], mask=intervals(first_key + start, first_key + stop), scale=options.scale,
        softcap=options.softcap, sinks=options.sinks, layout="bshd", return_lse=True, kernel=options.kernel,
        allow_quadratic=options.allow_quadratic,
    )  # fmt: skip
    # A row of no sequence has no denominator, not even of a sink.
    return out[0], torch.where(exists, lse[0], float("-inf")).transpose(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """For each query row, (Tq,): its position in its sequence, that sequence's number, its queries and its keys."""

    position: Tensor
    sequence: Tensor
    queries: Tensor
    keys: Tensor

    def of(self, value: Any) -> Any:
        """A number, or each row's value of one per sequence, (B,)."""
        if isinstance(value, int):
            return value
        value = torch.as_tensor(value, device=self.sequence.device).long()
        return value[self.sequence] if value.dim() and value.shape[0] > 1 else value.reshape(-1)[:1]

    def key(self, mask: Causal | Window) -> Tensor:
        """Where the query stands on the key axis."""
        if mask.offset is not None:
            return self.position + self.of(mask.offset)
        return self.position + self.keys - self.queries if mask.align == "end" else self.position


# Written without `match`, which torch's compiler does not follow.
def _is_run(mask: Mask) -> bool:
    if isinstance(mask, And):
        return all(_is_run(part) for part in mask.parts)
    return isinstance(mask, Causal | Window | Prefix | Lengths)


def _run(mask: Mask, row: _Row) -> tuple[Tensor, Tensor]:
    """First visible key of each row, and the one after the last; not clipped."""
    none, every = torch.zeros_like(row.keys), row.keys
    if isinstance(mask, And):
        starts, stops = zip(*[_run(part, row) for part in mask.parts], strict=True)
        return torch.stack(starts).amax(0), torch.stack(stops).amin(0)
    if isinstance(mask, Causal):
        return none, row.key(mask) + 1
    if isinstance(mask, Window):
        place = row.key(mask)
        return (none if mask.left is None else place - mask.left), (
            every if mask.right is None else place + mask.right + 1
        )
    if isinstance(mask, Prefix):
        return none, none + row.of(mask.n)
    assert isinstance(mask, Lengths)
    stop = every if mask.k is None else none + row.of(mask.k)
    return none, stop if mask.q is None else torch.where(row.position < row.of(mask.q), stop, none)
