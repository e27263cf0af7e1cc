"""Attention of packed queries to keys and values in pages: where they lie, or gathered first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import pages_on_gpu, together
from .facts import Lengths
from .packed import Options, attend
from .sequences import Sequences
from .tables import gathered, slots_of


def attend_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, queries: Sequences, table: np.ndarray, lengths: np.ndarray,
    options: Options, max_q: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (Tq, Hq, Dv) and lse (Hq, Tq).

    Args:
        q: (Tq, Hq, D), of the dtype and device of the pages.
        k_pages: (P, size, Hkv, D); v_pages: (P, size, Hkv, Dv).
        table: (B, entries), checked for lengths (B,).
        max_q: the number of queries for which relative tables were made.
    """
    nowhere = np.zeros_like(lengths)
    pages = together.Pages(torch.from_numpy(np.ascontiguousarray(table, np.int32)), k_pages.shape[1])
    places = Lengths(*queries.arrays(), nowhere, lengths, q.shape[0])
    found = together.attend(q, k_pages, v_pages, places, options, max_q, pages=pages)
    if found is None:
        found = pages_on_gpu.attend(q, k_pages, v_pages, table, places, options, max_q)
    if found is not None:
        return found
    slots = slots_of(table, nowhere, lengths, k_pages.shape[1])
    keys = Sequences(tuple((lengths.cumsum() - lengths).tolist()), tuple(lengths.tolist()))
    k, v = gathered(k_pages, slots), gathered(v_pages, slots)
    with torch.autocast(q.device.type, enabled=False):  # the dtype is that of the pages, in one call or many
        out, lse = attend(q, k, v, queries, keys, options, max_q)
    return out, lse.transpose(0, 1)
