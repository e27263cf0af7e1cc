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
from ...masks.primitives import intervals
from .packed import Options
from .runs import Row, is_run, run_of


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
    return options.bias is None and options.dropout is None and (options.mask is None or is_run(options.mask))


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Bounds, k_bounds: Bounds, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, Dv) and lse (Tq, Hq) of q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv)."""
    rows = torch.arange(q.shape[0], device=q.device)
    place = torch.searchsorted(q_bounds.starts.contiguous(), rows, right=True) - 1
    sequence = place.clamp(min=0)
    queries, keys = q_bounds.lengths[sequence], k_bounds.lengths[sequence]
    row = Row(rows - q_bounds.starts[sequence], sequence, queries, keys)
    start, stop = torch.zeros_like(rows), keys
    if options.mask is not None:
        first, last = run_of(options.mask, row)
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
