"""A layout made for a mask: pieces of unequal length and equal work."""

from __future__ import annotations

import numpy as np

from ..masks.lower import LoweredMask
from .layout import Layout
from .pairs import fold


def balanced(mask: LoweredMask | None, length: int, ranks: int, each: float = 0.0) -> Layout:
    """A contiguous layout of queries whose ranks see about as many pairs each.

    For masks that zigzag does not balance, documents above all, whose neighbours should stay neighbours. Ranks then
    hold unequal numbers of rows, so memory and all that is done row by row become unequal: `each` weighs that.

    Args:
        mask: the whole call's facts. Without known ranges rows count alike.
        length: Sq; ranks: as of `Layout`.
        each: what a row costs beside attention, in units of a visible key: its projections and feed-forward layer take
            about (parameters a layer) / (Hq * (D + Dv)) of them.

    Raises:
        ValueError: `each` is negative, the mask is of another length, or as `Layout`; beginning with the name.
    """
    if each < 0:
        raise ValueError(f"each: got {each}, expected 0 or more")
    if mask is not None and mask.site.q_len != length:
        raise ValueError(f"mask: made for {mask.site.q_len} queries, expected {length}")
    if mask is None or not mask.site.concrete or mask.ranges is None:
        return Layout("contiguous", length, ranks)
    seen = (mask.ranges.stops.astype(np.int64) - mask.ranges.starts).sum((0, 1, 3)) / fold(mask) + each
    upto = np.cumsum(seen)
    if not length or not upto[-1]:
        return Layout("contiguous", length, ranks)
    # A cut stands where it parts the work best: after the row whose middle the share passes.
    cuts = np.searchsorted(upto - seen / 2, upto[-1] * np.arange(1, ranks) / ranks)
    return Layout("contiguous", length, ranks, tuple(np.diff([0, *cuts.tolist(), length]).tolist()))
