"""From a product of q and k to a score: scale, soft cap, biases, mask, in that order."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INF, LOG2E, MOST, tanh
from .mask import visible


@triton.jit
def score(product, call, b, h, i, j, MIXED: tl.constexpr):
    """Scores of queries i and keys j, which are (n, 1) and (1, m) or the other way round, as `product` has them.

    Returns:
        scores in units of log 2, -inf where unseen; seen, booleans; and the tanh of the soft cap, for its derivative.
        Without MIXED, which asks the mask, a pair is unseen only where a bias is -inf.
    """
    seen = tl.full(product.shape, True, tl.int1)
    bend = product
    if call.softcap is None and len(call.dense) == 0 and call.table is None:
        s = product * (call.scale * LOG2E)
    else:
        s = product * call.scale
        if call.softcap is not None:
            bend = tanh(s / call.softcap)
            s = call.softcap * bend
        inside = (i < call.shape.q_len) & (j < call.shape.k_len)
        for n in tl.static_range(len(call.dense)):
            array = call.dense[n]
            row = b.to(tl.int64) * array.b + h.to(tl.int64) * array.h + i.to(tl.int64) * array.row
            added = tl.load(array.ptr + row + j.to(tl.int64) * array.column, mask=inside, other=0.0).to(tl.float32)
            seen, s = seen & (added != -INF), s + added
        if call.table is not None:
            table = call.table
            row = b.to(tl.int64) * table.b + h.to(tl.int64) * table.h
            added = tl.load(
                table.ptr + row + (j - i + call.shape.q_len - 1).to(tl.int64) * table.row, mask=inside, other=0.0
            )
            seen, s = seen & (added != -INF), s + added
        # The smallest number of a type is often written for "unseen", and is not -inf: here it stays finite.
        s = tl.maximum(s * LOG2E, -MOST, propagate_nan=tl.PropagateNan.ALL)
    if MIXED:
        seen = seen & visible(call.mask, b, h, i, j, call.shape.q_len, call.shape.k_len)
    if MIXED or len(call.dense) > 0 or call.table is not None:
        # A selection, not a sum: what is not seen may be NaN.
        s = tl.where(seen, s, -INF)
    return s, seen, bend
