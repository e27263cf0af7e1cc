"""Keys and values in one piece or in pages, which a table names (Kwon et al., PagedAttention, 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRET, load_tile


@triton.jit
def load_keys(
    array, pages, b, kv_head, first, size, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """`load_tile` of keys or values, `first` a multiple of ROWS; `pages` is None where they lie in one piece."""
    if pages is None:
        tile = load_tile(array, b, kv_head, first, size, ROWS, WIDTH, BLOCK, WHOLE)
    elif pages.size % ROWS == 0:
        # Such a tile lies in one page, so it is read as any other.
        page = tl.load(pages.table + b.to(tl.int64) * pages.row + first // pages.size)
        place = first % pages.size
        tile = load_tile(array, page, kv_head, place, place + size - first, ROWS, WIDTH, BLOCK, WHOLE)
    else:
        key, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        page = tl.load(pages.table + b.to(tl.int64) * pages.row + key // pages.size, mask=key < size, other=0)
        row = page.to(tl.int64) * array.b + kv_head.to(tl.int64) * array.h + (key % pages.size).to(tl.int64) * array.row
        tile = tl.load(
            array.ptr + row[:, None] + column[None, :] * array.column,
            mask=(key < size)[:, None] & (column[None, :] < WIDTH),
            other=0.0,
        )
        if INTERPRET and array.ptr.dtype.element_ty == tl.bfloat16:
            tile = tile.to(tl.float32)
    return tile
