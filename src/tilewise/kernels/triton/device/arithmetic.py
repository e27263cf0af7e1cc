"""Products, rounding and the functions that Triton lacks or that its interpreter gets wrong."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
MOST = tl.constexpr(2.0**126)  # in units of log 2: beside it all scores vanish, and twice as much is still finite

# Triton's interpreter multiplies, compares and selects the bit patterns of bfloat16, so there bfloat16 is widened as it
# is loaded and rounded by hand as it is stored.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. "ieee" keeps float32 inputs float32, which tf32 would not."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b):
    """a @ b in float32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_tile(
    array, b, h, first, size, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows [first, first + ROWS) of array[b, h], (ROWS, BLOCK), 0 beyond `size` rows and WIDTH columns.

    WHOLE promises that all rows are inside, which saves their check.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    corner = array.ptr + b.to(tl.int64) * array.b + h.to(tl.int64) * array.h + first.to(tl.int64) * array.row
    place = corner + (row[:, None] * array.row + column[None, :] * array.column)
    if WHOLE and WIDTH == BLOCK:
        tile = tl.load(place)
    elif WHOLE:
        tile = tl.load(place, mask=column[None, :] < WIDTH, other=0.0)
    elif WIDTH == BLOCK:
        tile = tl.load(place, mask=(first + row)[:, None] < size, other=0.0)
    else:
        tile = tl.load(place, mask=((first + row)[:, None] < size) & (column[None, :] < WIDTH), other=0.0)
    if INTERPRET and array.ptr.dtype.element_ty == tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(array, b, h, first, size, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_tile`: a float32 tile, rounded once to the array's dtype."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    corner = array.ptr + b.to(tl.int64) * array.b + h.to(tl.int64) * array.h + first.to(tl.int64) * array.row
    place = corner + (row[:, None] * array.row + column[None, :] * array.column)
    inside = ((first + row)[:, None] < size) & (column[None, :] < WIDTH)
    tl.store(place, narrow(tile, array.ptr.dtype.element_ty), mask=inside)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        word = x.to(tl.int32, bitcast=True)
        rounded = ((word + 0x7FFF + ((word >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: a series near 0, where the quotient would cancel."""
    small = x * x
    series = x * (1 - small * (0.333333333 - small * (0.133333333 - small * (0.0539682540 - small * 0.0218694885))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def is_finite(x):
    """False for NaN and infinities."""
    return tl.abs(x) < INF


@triton.jit
def in_log2(x):
    """x log2(e) of a sink, where a finite number stays finite."""
    scaled = x * LOG2E
    return tl.where(is_finite(x), tl.minimum(tl.maximum(scaled, -MOST), MOST), scaled)
