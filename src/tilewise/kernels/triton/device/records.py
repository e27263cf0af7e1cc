"""The records that kernels are handed. Triton passes nested named tuples through, and a None or an empty tuple in them
is known when the kernel is compiled, so that an option that is not there costs nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

Stride = int


class View(NamedTuple):
    """A 4-D array (B', H', rows, columns) through its strides; 0 where an axis is broadcast."""

    ptr: Any
    b: Stride
    h: Stride
    row: Stride
    column: Stride


class Rows(NamedTuple):
    """A 3-D array (B', H', positions) through its strides; 0 where an axis is broadcast."""

    ptr: Any
    b: Stride
    h: Stride
    row: Stride


class Levels(NamedTuple):
    """`Rows` with level and, as far apart, shares: probabilities are share * 2^(score - level), in units of log 2.

    share: (B, Hq, Sq) float32; far: one int32, not 0 where some share is not 1. Both are None where no row's lse can be
    far from 0 (see `shares_kernel`).
    """

    ptr: Any
    b: Stride
    h: Stride
    row: Stride
    share: Any
    far: Any


class Bits(NamedTuple):
    """A view of booleans, 0 or 1 in bytes, whose element [0, 0] is query `query` and key `key`."""

    ptr: Any
    b: Stride
    h: Stride
    row: Stride
    column: Stride
    query: int
    key: int


class Mask(NamedTuple):
    """The facts of a mask on the device; those that it does not have are None.

    starts, stops: (B', H', Sq, R) int32, with R known to the compiler as `ranges`.
    """

    starts: View | None
    stops: View | None
    q_labels: Rows | None
    k_labels: Rows | None
    bits: Bits | None
    ranges: Any  # last: Triton 3.6 forgets a constant in a nested record unless one of the outer record follows it


class Dropout(NamedTuple):
    """words: int64 (9,), the low and high words of the seed and of the stream, the number of the first pair, and what
    the next batch row, head, query and key add to it."""

    words: Any
    threshold: int
    inverse_keep: float


class Pages(NamedTuple):
    """Keys and values in pages: key j of sequence b is row j % size of page table[b, j // size].

    table: (B, entries) int32, `row` apart, of which entries beyond a sequence's keys are never read. size: rows of a
    page, known to the compiler.
    """

    table: Any
    row: Stride
    size: Any


class Packed(NamedTuple):
    """Sequences of different lengths whose queries stand one after another, and the work on them.

    sequences: (B, 4) int32, for each its first query's place, its queries, its keys, and where its part of a relative
    table begins. items: (n, 4) int32, one for each program of a kv head; see the kernels.
    """

    sequences: Any
    items: Any


class Shape(NamedTuple):
    """Sizes of a call. The widths are known to the compiler: `d` and `dv` as they are, `block_*` as powers of two."""

    q_heads: int
    group: int
    q_len: int
    k_len: int
    d: Any
    dv: Any
    block_d: Any
    block_dv: Any


class Call(NamedTuple):
    """All that decides a score, apart from q and k; `rising` says whether scale is positive.

    pages: where keys and values lie in pages, which are then (P, Hkv, size, D); their batch axis is that of the table.
    """

    shape: Shape
    mask: Mask
    dense: tuple[View, ...]
    table: Rows | None
    dropout: Dropout | None
    pages: Pages | None
    scale: float
    rising: Any
    softcap: float | None


# In-tile offsets are 32-bit; rows further apart than this would overflow them.
_FARTHEST_ROWS = 2**31 // 512


def view(array: torch.Tensor) -> View:
    """A 4-D tensor as an argument."""
    if array.stride(2) >= _FARTHEST_ROWS:
        array = array.contiguous()
    return View(array, *_strides(array))


def rows(array: torch.Tensor) -> Rows:
    """A 3-D tensor as an argument."""
    return Rows(array, *_strides(array))


def levels(level: torch.Tensor, share: torch.Tensor | None, far: torch.Tensor | None) -> Levels:
    """Levels and shares, contiguous both, as an argument."""
    return Levels(level, *_strides(level), share, far)


def _strides(array: torch.Tensor) -> list[int]:
    """Strides, 0 for axes of size 1: those are broadcast, for whatever batch and heads a record is used again."""
    return [0 if size == 1 else stride for size, stride in zip(array.shape, array.stride(), strict=True)]


def shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Shape:
    """Sizes of q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv)."""
    d, dv = q.shape[3], v.shape[3]
    return Shape(
        q.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        k.shape[2],
        tl.constexpr(d),
        tl.constexpr(dv),
        tl.constexpr(block_width(d)),
        tl.constexpr(block_width(dv)),
    )


def block_width(width: int) -> int:
    """The power of two that a row of `width` elements is padded to by masks; matrix instructions want at least 16."""
    return max(16, triton.next_power_of_2(width))
