"""Sequences packed one after the other, told apart by cumulative lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.biases import Bias
from . import traced
from .packed import Options, attend, options_of
from .pages import attend_pages
from .sequences import Sequences, from_cumulative
from .tables import check_pages, check_table, numbers_of
from .uncompiled import uncompiled


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
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
    """Attention within each of B packed sequences, in memory linear in Tq + Tk: nothing is padded.

    Every mask, bias and option of `tilewise.attention` means what it means there for one sequence: query 0 is the
    sequence's first query, `causal("end")` lets its last query see its last key. Sequence n of the result has the bits
    of the call on its own, `tilewise.attention` of its rows; with dropout, of `Dropout(p, seed, stream + n * 2**32)`,
    modulo 2^64.

    Names and arrays are those of flash-attn's `flash_attn_varlen_func`. Lengths are read on the host; keep the
    cumulative lengths there when q is on a GPU, and nothing waits for it. A compiled program cannot read them: there
    all sequences share one call, whose last bits may differ, where the mask lets each query see one run of keys and
    there is neither bias nor dropout; all else is a break of its graph.

    Args:
        q: (Tq, Hq, D); k: (Tk, Hkv, D); v: (Tk, Hkv, Dv); Hq is a multiple of Hkv.
        cu_seqlens_q: (B + 1,) integers; the queries of sequence n are the rows [cu[n], cu[n + 1]). Lengths may be 0.
        cu_seqlens_k: likewise for keys and values; None is `cu_seqlens_q`.
        max_seqlen_q, max_seqlen_k: at least the longest lengths, which None stands for. They are the sizes for which
            a `relative` table was made; nothing else depends on them.
        seqused_q, seqused_k: (B,) integers; only so many rows of each sequence count. The others are never read, and
            are 0 in the result.
        block_table: (B, entries) integers; then k and v are pages (P, size, Hkv, D) and (P, size, Hkv, Dv), and key j
            of sequence n is row j % size of page block_table[n, j // size]; see `paged_attention`, which also appends,
            and whose word on a row's bits then holds.
        mask: any mask. Its operands have B or 1 batch rows, and query and key axes of 1 or at least the longest
            sequence, cut to each: a boolean array is (B or 1, Hq or 1, max_seqlen_q, max_seqlen_k).
        bias: any bias, its array cut likewise, its slopes (Hq,) or (B, Hq); all with gradients.
        scale, softcap, sinks, dropout, kernel, allow_quadratic: as of `tilewise.attention`.
        return_lse: also return lse.

    Returns:
        out (Tq, Hq, Dv), q's dtype; with `return_lse` the pair (out, lse), lse (Hq, Tq). Rows that no sequence holds
        have out 0 and lse -inf, as have those that see nothing.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
        KernelRefused, QuadraticMemory: as `tilewise.attention`.
    """
    for name, rows in (("q", q), ("k", k), ("v", v)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name}: got {type(rows).__name__}, expected a torch tensor")
        if rows.dim() != 3 and (name == "q" or block_table is None):
            raise ValueError(f"{name}: has shape {tuple(rows.shape)}, expected 3 axes (T, H, D)")
    if block_table is not None:
        check_pages("k", k, "v", v)
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v: has {v.shape[0]} rows, expected {k.shape[0]} as k has")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    options = options_of(
        mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, kernel=kernel,
        allow_quadratic=allow_quadratic,
    )  # fmt: skip
    if block_table is None and torch.compiler.is_compiling() and traced.is_traceable(options):
        q_bounds = traced.bounds_of(cu_seqlens_q, seqused_q, q.device)
        k_bounds = traced.bounds_of(cu_seqlens_k, seqused_k, k.device)
        out, lse = traced.attend(q, k, v, q_bounds, k_bounds, options)
    else:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
        out, lse = _of_known_lengths(q, k, v, lengths, block_table, options)
    return (out, lse.transpose(0, 1)) if return_lse else out


@uncompiled
def _of_known_lengths(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], block_table: Any, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, Dv) and lse (Tq, Hq), lengths read on the host."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k = lengths
    q_sequences = from_cumulative("cu_seqlens_q", cu_seqlens_q, "seqused_q", seqused_q, q.shape[0])
    k_rows = k.shape[0] if block_table is None else 2**62
    k_sequences = from_cumulative("cu_seqlens_k", cu_seqlens_k, "seqused_k", seqused_k, k_rows)
    if len(k_sequences) != len(q_sequences):
        raise ValueError(
            f"cu_seqlens_k: holds {len(k_sequences)} sequences, expected {len(q_sequences)} as cu_seqlens_q does"
        )
    max_q = _at_least("max_seqlen_q", max_seqlen_q, q_sequences)
    _at_least("max_seqlen_k", max_seqlen_k, k_sequences)
    if block_table is None:
        return attend(q, k, v, q_sequences, k_sequences, options, max_q)
    used = k_sequences.arrays()[1]
    table = numbers_of("block_table", block_table, (len(used), None))
    check_table(table, used, k.shape[1], k.shape[0], "cu_seqlens_k")
    out, lse = attend_pages(q, k, v, q_sequences, table, used, options, max_q)
    return out, lse.transpose(0, 1)


def _at_least(name: str, given: Any, sequences: Sequences) -> int:
    longest = sequences.longest
    if given is None:
        return longest
    try:
        most = int(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(given).__name__}, expected an int or None") from None
    if most < longest:
        raise ValueError(f"{name}: got {most}, but a sequence has {longest} rows")
    return most
