"""All sequences of a batch in one call of the compiled kernel, which gives each the bits it has alone.

A sequence is a problem of its own there: its blocks are counted from its first key, and splits of long keys as always.
Keys and values may lie in pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import validate
from ...kernels.native.buffers import DTYPE_CODES, in_large_pages, memory
from ...kernels.native.card import CARD
from ...kernels.native.facts import Alive, dropout_words
from ..watch import nobody_else, recording
from .facts import Lengths, dense_place, sights_of, tables_of

Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Keys and values in pages of `size` rows: table (B, pages of a sequence) int32, contiguous."""

    table: Tensor
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of the core without its tensors.

    Attributes:
        keywords: of `_native.forward` and `_native.backward`; alive: what they point into.
        lengths: where the sequences stand.
        gaps: whether the arrays of queries, and of keys, have rows that no sequence holds.
        formula: the same results as a function of q, k and v that can be differentiated again.
    """

    keywords: dict[str, Any]
    alive: Alive
    lengths: Lengths
    gaps: tuple[bool, bool]
    formula: Formula | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out (Tq, Hq, Dv) and lse (Hq, Tq) of q (Tq, Hq, D), k (Tk, Hkv, D) and v, or of pages (P, size, Hkv, D)."""
        from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # the card found it

        rows, heads = q.shape[:2]
        out = in_large_pages(q.new_empty((rows, heads, v.shape[-1])))
        lse = in_large_pages(q.new_empty((heads, rows), dtype=_accumulator(q)))
        if self.gaps[0]:
            out.zero_()
            lse.fill_(-torch.inf)
        q, k, v = (_with_rows(x) for x in (q, k, v))
        _native.forward(
            **self.keywords,
            threads=torch.get_num_threads(),
            q=_place(q),
            k=_place(k),
            v=_place(v),
            out=_place(out),
            lse=lse.data_ptr(),
        )
        return out, lse

    def backward(
        self, tensors: Sequence[Tensor], out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The wanted gradients of q, k and v."""
        from ... import _native  # pyright: ignore[reportAttributeAccessIssue]

        q, k, v = (_with_rows(x) for x in tensors)
        found: list[Tensor | None] = []
        for x, gaps, want in zip((q, k, v), (self.gaps[0], self.gaps[1], self.gaps[1]), wanted, strict=True):
            like = in_large_pages(x.new_empty(x.shape)) if want else None
            found.append(like.zero_() if like is not None and gaps else like)
        d_out, d_lse = d_out.contiguous(), d_lse.to(_accumulator(q)).contiguous()
        given = [(0, 0, 0, 0) if x is None else _place(x) for x in found]
        places = dict(zip(("d_q", "d_k", "d_v"), given, strict=True))
        _native.backward(
            **self.keywords, threads=torch.get_num_threads(), q=_place(q), k=_place(k), v=_place(v), out=_place(out),
            lse=lse.data_ptr(), d_out=_place(d_out), d_lse=d_lse.data_ptr(), gather=(), d_sinks=0,
            **places,
        )  # fmt: skip
        return found


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call.forward(q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return (None, *ctx.call.backward(tensors, out, lse, d_out, d_lse, wanted))
        # Gradients of gradients are asked for: those of the formula can be differentiated again.
        differentiated = [x for x, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(ctx.call.formula(*tensors), differentiated, (d_out, d_lse), create_graph=True))
        return (None, *(next(found) if want else None for want in wanted))


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: Any, max_q: int, formula: Formula | None = None,
    pages: Pages | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """out (Tq, Hq, Dv) and lse (Hq, Tq), or None where one call cannot serve these arguments.

    Args:
        q: (Tq, Hq, D); k: (Tk, Hkv, D) and v: (Tk, Hkv, Dv), or with `pages` (P, size, Hkv, D) and (P, size, Hkv, Dv).
        options: `packed.Options`; max_q: the number of queries for which relative tables were made.
        formula: out and lse as a function of q, k, v, for derivatives of higher order. None: no derivatives.

    Raises:
        ValueError, TypeError: arrays or options that are wrong for any kernel; the message begins with the name.
    """
    if not _runs(options.kernel) or not all(isinstance(x, Tensor) for x in (q, k, v)):
        return None
    extras = [x for x in _operands(options) if isinstance(x, Tensor)]
    if not nobody_else((q, k, v, *extras)) or recording(extras) or (formula is None and recording((q, k, v))):
        return None
    rows = (k, v) if pages is None else (k[:, 0], v[:, 0])
    arrays = validate.check_arrays(q, *rows, "thd")
    checked = validate.check_options(arrays, None, None, options.scale, options.softcap, options.sinks, options.dropout)
    heads, accumulator = q.shape[1], _accumulator(q)
    sights = sights_of(options.mask, lengths, heads)
    tables = tables_of(options.bias, lengths, heads, max_q, accumulator)
    dropout = checked.dropout
    if (
        sights is None
        or tables is None
        or (dropout and any(isinstance(x, Tensor) for x in (dropout.seed, dropout.first)))
    ):
        return None

    first = np.zeros(0, np.int64) if tables.first is None else tables.first
    place = [lengths.q_begin, lengths.q_len, lengths.k_begin, lengths.k_len, np.ascontiguousarray(first, np.int64)]
    table = None if tables.table is None else tables.table.contiguous()
    sinks = None if checked.sinks is None else checked.sinks.contiguous()
    ranges = None
    if sights.ranges is not None:
        starts, stops = sights.ranges
        ranges = (memory(starts).address, memory(stops).address, int(starts.itemsize == 8), 1, 0, 0)
    keywords = {
        "dtype": DTYPE_CODES[str(q.dtype).removeprefix("torch.")],
        "sizes": (lengths.batch, heads, k.shape[-2], *lengths.longest, q.shape[-1], v.shape[-1]),
        "rows": (0, lengths.longest[0]),
        "scale": 1.0 / math.sqrt(q.shape[-1]) if checked.scale is None else checked.scale,
        "softcap": checked.softcap or 0.0,
        "ranges": ranges,
        "labels": None,
        "mask": None if sights.dense is None else dense_place(sights.dense),
        "bits": None,
        "biases": tuple(_bias(array) for array in tables.dense),
        "table": None if table is None else (table.data_ptr(), *_outer(table)),
        "sinks": 0 if sinks is None else sinks.data_ptr(),
        "dropout": dropout_words(dropout, None),
        "part": False,
        "pages": None if pages is None else (pages.table.data_ptr(), pages.table.stride(0), pages.size),
        "sequences": (*(memory(x).address if x.size else 0 for x in place), 0, q.shape[0]),
    }
    alive = [place, table, sinks, sights, tables, pages]
    gaps = int(lengths.q_len.sum()) < q.shape[0], int(lengths.k_len.sum()) < k.shape[0]
    call = Call(keywords, alive, lengths, gaps, formula)
    return _Together.apply(call, q, k, v) if recording((q, k, v)) else call.forward(q, k, v)


def _runs(kernel: str | None) -> bool:
    return kernel in (None, "native") and (CARD.available is None or CARD.available() is None)


def _operands(options: Any) -> list[Any]:
    mask = [] if options.mask is None else options.mask.operands()
    bias = [] if options.bias is None else list(options.bias.operands())
    return [*mask, *bias, options.sinks]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _with_rows(x: Tensor) -> Tensor:
    """With a last axis of stride 1, copied where it has another."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over (batch or page, head, row) of (T, H, D) or (P, size, H, D)."""
    *outer, row, head, _ = x.stride()
    return (x.data_ptr(), outer[0] if outer else 0, head, row)


def _outer(table: Tensor) -> tuple[int, int]:
    batch, heads = table.shape[:2]
    return (table.stride(0) if batch > 1 else 0, table.stride(1) if heads > 1 else 0)


def _bias(array: Tensor) -> tuple[int, ...]:
    address, *strides = dense_place(array)
    return (address, DTYPE_CODES[str(array.dtype).removeprefix("torch.")], *strides)
