"""One of many sequences, as if it were a call of its own.

Records are built where they are returned or handed on: assigned to a name, they would lose what the compiler knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .records import Call, Dropout, Mask, Rows, Shape, View


@triton.jit
def begin_of(packed, n):
    """The place of the first query of sequence n among all queries."""
    return tl.load(packed.sequences + n * 4).to(tl.int64)


@triton.jit
def sequence_of(call, packed, n):
    """The call of sequence n in its own coordinates, in which it is batch row n.

    Bounds of ranges (1, 1, Tq, R) stand as the queries do; words of dropout are those of each sequence, (B, 9).
    """
    return Call(
        _shape(call.shape, packed.sequences + n * 4),
        _mask(call.mask, begin_of(packed, n)),
        call.dense,
        _table(call.table, packed.sequences + n * 4),
        _dropout(call.dropout, n),
        call.pages,
        call.scale,
        call.rising,
        call.softcap,
    )


@triton.jit
def _shape(shape, sequence):
    q_len, k_len = tl.load(sequence + 1), tl.load(sequence + 2)
    return Shape(shape.q_heads, shape.group, q_len, k_len, shape.d, shape.dv, shape.block_d, shape.block_dv)


@triton.jit
def _mask(mask, begin):
    if mask.starts is None:
        return mask
    else:
        return Mask(
            _from(mask.starts, begin), _from(mask.stops, begin), mask.q_labels, mask.k_labels, mask.bits, mask.ranges
        )


@triton.jit
def _from(array, begin):
    """A view that begins at a row."""
    return View(array.ptr + begin * array.row, array.b, array.h, array.row, array.column)


@triton.jit
def _table(table, sequence):
    if table is None:
        return None
    else:
        return Rows(table.ptr + tl.load(sequence + 3) * table.row, table.b, table.h, table.row)


@triton.jit
def _dropout(dropout, n):
    if dropout is None:
        return None
    else:
        return Dropout(dropout.words + n * 9, dropout.threshold, dropout.inverse_keep)
