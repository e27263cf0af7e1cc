"""Attention to keys and values in pages, found through a block table (Kwon et al., PagedAttention, 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.biases import Bias
from ..ragged.packed import Options, options_of
from ..ragged.pages import attend_pages
from ..ragged.sequences import Sequences, from_cumulative
from ..ragged.tables import check_pages, check_table, numbers_of, slots_of, write
from ..ragged.uncompiled import uncompiled


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    block_table: Tensor,
    lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
    kernel: str | None = None,
    allow_quadratic: bool = False,
) -> Any:
    """Attention of B sequences to keys and values in pages; with `k` and `v`, new tokens are appended first.

    Key j of sequence n is row j % size of page block_table[n, j // size]. On a CPU the compiled kernel reads the pages
    where they lie, and each row has the bits of the same keys in one piece, whatever the size of a page. The Triton
    kernel reads them there too, asked for by name or where the GPU's measured table holds it (not yet run on a GPU);
    the bits of a row then depend neither on the size of a page nor on the other sequences, but may differ from those of
    a call on its own. By other kernels, and for what one call of these two does not take (masks of several intervals,
    labels or predicates, biases that mix corners), the tokens are gathered first, in memory linear in their number.
    Pages, rows of pages and entries of the table beyond a sequence's length are never read.

    Args:
        q: (B, n, Hq, D), or packed (Tq, Hq, D) with `cu_seqlens_q`.
        k_pages: (P, size, Hkv, D); v_pages: (P, size, Hkv, Dv), any size of page. Any strides: pages that hold
            (P, Hkv, size, D) are given as `k_pages.transpose(1, 2)`.
        block_table: (B, entries) integers; several sequences may share pages.
        lengths: (B,) integers, tokens that each sequence has in its pages before this call.
        k, v: (B, m, Hkv, D) and (B, m, Hkv, Dv), or packed as q is: tokens that are written behind those, in place, and
            attended to. The table must hold room for them. The caller adds their number to `lengths`.
        cu_seqlens_q: (B + 1,) integers; the queries of sequence n are the rows [cu[n], cu[n + 1]).
        cu_seqlens_k: likewise for packed k and v; None is `cu_seqlens_q`.
        mask: any mask in each sequence's own coordinates, key 0 its first token: `causal("end")` lets the last query
            see the last token, new ones included. None lets every query see every token.
        bias, scale, softcap, sinks, dropout, kernel, allow_quadratic: as of `tilewise.torch.varlen_attention`.
        return_lse: also return lse.

    Returns:
        out (B, n, Hq, Dv) or (Tq, Hq, Dv), q's dtype; with `return_lse` the pair (out, lse), lse (B, Hq, n) or
        (Hq, Tq).

    Raises:
        ValueError, TypeError: an argument is wrong, or asks for a gradient; the message begins with its name, and the
            pages are as before.
        KernelRefused, QuadraticMemory: as `tilewise.attention`.
    """
    options = options_of(
        mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, kernel=kernel,
        allow_quadratic=allow_quadratic,
    )  # fmt: skip
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, and pages have none; use torch.no_grad()")
    new, cumulative = (k, v), (cu_seqlens_q, cu_seqlens_k)
    out, lse = _checked(q, k_pages, v_pages, block_table, lengths, new, cumulative, options)
    return (out, lse) if return_lse else out


@uncompiled
def _checked(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Any, lengths: Any,
    new: tuple[Tensor | None, Tensor | None], cumulative: tuple[Any, Any], options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_pages("k_pages", k_pages, "v_pages", v_pages)
    cu_q, cu_k = cumulative
    packed = cu_q is not None
    _check_queries(q, packed, k_pages)
    rows = q if packed else q.flatten(0, 1)
    queries = from_cumulative("cu_seqlens_q", cu_q, "", None, len(rows)) if packed else _even(q)
    batch = len(queries)
    table = numbers_of("block_table", block_table, (batch, None))
    counts = numbers_of("lengths", lengths, (batch,))
    size, pages = k_pages.shape[1], k_pages.shape[0]
    added = _new_rows(new, packed, queries, cu_q if cu_k is None else cu_k, (k_pages, v_pages))
    total = counts if added is None else counts + added[1].arrays()[1]
    check_table(table, total, size, pages)
    if added is not None:
        (k, v), sequences = added
        order = sequences.rows(range(batch))
        slots = slots_of(table, counts, sequences.arrays()[1], size)
        for target, source in ((k_pages, k), (v_pages, v)):
            write(target, source if len(order) == len(source) else source[torch.from_numpy(order)], slots)
    out, lse = attend_pages(rows, k_pages, v_pages, queries, table, total, options, queries.longest)
    if packed:
        return out, lse
    return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _check_queries(q: Tensor, packed: bool, k_pages: Tensor) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q: got {type(q).__name__}, expected a torch tensor")
    if q.dim() != (3 if packed else 4):
        expected = "(Tq, Hq, D) beside cu_seqlens_q" if packed else "(B, n, Hq, D)"
        raise ValueError(f"q: has shape {tuple(q.shape)}, expected {expected}")
    if (q.dtype, q.device) != (k_pages.dtype, k_pages.device):
        raise TypeError(f"q: has {q.dtype} on {q.device}, expected {k_pages.dtype} on {k_pages.device} as k_pages has")
    heads, width = k_pages.shape[2:]
    if q.shape[-1] != width or (q.shape[-2] % heads if heads else q.shape[-2]):
        raise ValueError(
            f"q: has shape {tuple(q.shape)}, expected a multiple of {heads} heads of width {width} as k_pages has"
        )


def _even(x: Tensor) -> Sequences:
    batch, length = x.shape[:2]
    return Sequences(tuple(n * length for n in range(batch)), (length,) * batch)


def _new_rows(
    new: tuple[Tensor | None, Tensor | None], packed: bool, queries: Sequences, cu_k: Any, pages: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], Sequences] | None:
    """New keys and values as (T, Hkv, D) and (T, Hkv, Dv), and where each sequence's stand; None where none are given.

    Raises:
        ValueError, TypeError: beginning with "k:", "v:" or "cu_seqlens_k:".
    """
    k, v = new
    if k is None and v is None:
        return None
    if k is None or v is None:
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing}: got None beside {given}, expected both or neither")
    for name, x, page in (("k", k, pages[0]), ("v", v, pages[1])):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch tensor")
        leading = 1 if packed else 2
        fits = x.dim() == leading + 2 and x.shape[leading:] == page.shape[2:] and (packed or len(x) == len(queries))
        if not fits or x.shape[:leading] != k.shape[:leading]:
            expected = ("T",) if packed else (len(queries), "m")
            raise ValueError(
                f"{name}: has shape {tuple(x.shape)}, expected {(*expected, *page.shape[2:])} as {name}_pages has"
            )
        if (x.dtype, x.device) != (page.dtype, page.device):
            raise TypeError(
                f"{name}: has {x.dtype} on {x.device}, expected {page.dtype} on {page.device} as {name}_pages has"
            )
    if not packed:
        return (k.flatten(0, 1), v.flatten(0, 1)), _even(k)
    sequences = from_cumulative("cu_seqlens_k", cu_k, "", None, len(k))
    if len(sequences) != len(queries):
        raise ValueError(
            f"cu_seqlens_k: holds {len(sequences)} sequences, expected {len(queries)} as cu_seqlens_q does"
        )
    return (k, v), sequences
