"""Which probabilities dropout keeps; see `contract.Dropout` for the rule, Salmon et al. (2011) for the generator."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(dropout, b, h, i, j):
    """Whether the pair (b, h, i, j) is kept: a function of its place and of the seed alone, whatever the tile."""
    # Its number in the larger call of which this one may be a part.
    n = tl.load(dropout.words + 4) + b.to(tl.int64) * tl.load(dropout.words + 5) + h * tl.load(dropout.words + 6)
    n = n + i.to(tl.int64) * tl.load(dropout.words + 7) + j.to(tl.int64) * tl.load(dropout.words + 8)
    seed = (tl.load(dropout.words + 1) << 32) | tl.load(dropout.words)
    low, high = n.to(tl.uint32), (n >> 32).to(tl.uint32)
    stream_low = tl.load(dropout.words + 2).to(tl.uint32) + low * 0
    stream_high = tl.load(dropout.words + 3).to(tl.uint32) + low * 0
    word, _, _, _ = tl.philox(seed, low, high, stream_low, stream_high, n_rounds=10)
    return word.to(tl.int64) >= dropout.threshold
