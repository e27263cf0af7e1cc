"""The forward pass of many sequences of different lengths, whose keys and values lie in pages.

Each sequence has its own programs, whose tiles and splits depend on its own lengths alone: a row's bits depend neither
on the other sequences nor on the size of a page. Few queries split the keys as one call's decoding does; more of them
stand in tiles of which each walks over all its keys, so that what is kept stays linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl

from ...contract import Dropout as DropoutRule
from ...contract import Plan
from .arguments import NO_MASK, can_leak, dropout_of
from .decode import parts_of
from .decode_kernel import decode_kernel, merge_kernel
from .device.records import Bits, Call, Dropout, Mask, Packed, Pages, View, rows, shape_of, view
from .launch import blocks_of, launch, on_device_of, split_of
from .tiles import most_packed, rows_together


@dataclass(frozen=True, slots=True, eq=False)
class PagedOperands:
    """Sequences, their pages, and what else decides their scores, each in a sequence's own coordinates.

    Attributes:
        q: (Tq, Hq, D). k_pages: (P, size, Hkv, D). v_pages: (P, size, Hkv, Dv).
        q_begin, q_len, k_len: (B,) integers on the host; queries of sequence n are rows [q_begin[n], + q_len[n]) of q.
        block_table: (B, entries) integers on the host, of which the first ceil(k_len / size) of a row name pages.
        starts, stops: (Tq,) integers on the host, the keys that each query sees, or None where it sees all.
        dense_mask: booleans (B', H', i, j), or None. biases: arrays (B', H', i, j), added. Leading sizes 1 or full, the
            others 1 or at least the longest sequence's.
        table: (B', H', distances) float32, or None: sequence n adds table[first[n] + q_len[n] - 1 + j - i].
        first: (B,) integers on the host beside a table.
        sinks: (Hq,) float32, or None. dropout: None, or as in `Operands`; sequence n draws stream + n * 2^32.
    """

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    q_begin: np.ndarray
    q_len: np.ndarray
    k_len: np.ndarray
    block_table: np.ndarray
    starts: np.ndarray | None = None
    stops: np.ndarray | None = None
    dense_mask: torch.Tensor | None = None
    biases: tuple[torch.Tensor, ...] = ()
    table: torch.Tensor | None = None
    first: np.ndarray | None = None
    sinks: torch.Tensor | None = None
    dropout: DropoutRule | None = None


def paged_forward(plan: Plan, operands: PagedOperands) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all sequences.

    Args:
        plan: for a problem with the longest lengths.

    Returns:
        out (Tq, Hq, Dv) in q's dtype; lse (Hq, Tq) float32. Rows that no sequence holds have 0 and -inf.
    """
    q, device = operands.q, operands.q.device
    tokens, heads = q.shape[:2]
    out = q.new_empty((tokens, heads, operands.v_pages.shape[3]))
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=device)
    if int(operands.q_len.sum()) < tokens:
        out.zero_()
        lse.fill_(float("-inf"))
    works = list(_works(operands, plan.problem.group, most_packed(plan.problem), split_of(device)))
    sequences = [operands.q_begin, operands.q_len, operands.k_len]
    sequences.append(np.zeros_like(operands.k_len) if operands.first is None else operands.first)
    items_and_groups = (array for work in works for array in work[1:])
    numbers = _on_device([np.stack(sequences, 1), operands.block_table, *items_and_groups], device)
    call = _call_of(plan, operands, numbers[1])
    q_view, k_view, v_view = (view(x.transpose(-3, -2)) for x in (q[None], operands.k_pages, operands.v_pages))
    out_view, lse_view = view(out[None].transpose(1, 2)), rows(lse[None])
    kv_heads = plan.problem.kv_heads
    with on_device_of(q):
        for n, (queries, *_) in enumerate(works):
            items, groups = (Packed(numbers[0], numbers[at + 2 * n]) for at in (2, 3))
            blocks = blocks_of("decode", plan, device)._replace(queries=queries)
            programs = len(items.items) * kv_heads
            parts = parts_of(programs, queries, operands.v_pages.shape[3], device)
            launch(
                decode_kernel, (programs,),
                q_view, k_view, v_view, *parts, call, items, 1,
                SPLIT=1, CAN_LEAK=can_leak(plan), blocks=blocks,
            )  # fmt: skip
            launch(
                merge_kernel, (len(groups.items) * kv_heads,),
                *parts, out_view, lse_view, call, groups, operands.sinks, 1,
                BLOCK_Q=queries, num_warps=blocks.warps,
            )  # fmt: skip
    return out, lse


def _works(operands: PagedOperands, group: int, most: int, split: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each height of a tile, at most `most`: the height, and the items of `decode_kernel` and of `merge_kernel`."""
    packed = group * operands.q_len
    heights = np.array([rows_together(int(rows), most) for rows in packed])
    for height in np.unique(heights[packed > 0]):
        own = np.nonzero((heights == height) & (packed > 0))[0]
        tiles = -(-packed[own] // height)
        sequence, tile = np.repeat(own, tiles), _counted(tiles)
        keys = operands.k_len[sequence]
        # One split even where there is no key, so that what no one sees is written too.
        step = np.where(packed[sequence] <= most, split, np.maximum(keys, 1))
        splits = np.maximum(1, -(-keys // step))
        begin = splits.cumsum() - splits
        at = np.repeat(np.arange(len(sequence)), splits)
        low = _counted(splits) * step[at]
        high = np.minimum(low + step[at], keys[at])
        yield (
            int(height),
            np.stack([sequence[at], tile[at] * height, low, high], 1),
            np.stack([sequence, tile * height, begin, splits], 1),
        )


def _counted(counts: np.ndarray) -> np.ndarray:
    """0 … counts[0] - 1, then 0 … counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _on_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Integers as int32 tensors, taken there by one copy.

    Each begins at a multiple of 16 bytes: Triton compiles anew for those that do and those that do not.
    """
    sizes = [-(-array.size // 4) * 4 for array in arrays]
    joined = np.zeros(sum(sizes), np.int32)
    firsts = np.cumsum([0, *sizes])
    for array, first in zip(arrays, firsts, strict=False):
        joined[first : first + array.size] = array.ravel()
    there = torch.from_numpy(joined).to(device)
    return [there[first : first + x.size].view(x.shape) for x, first in zip(arrays, firsts, strict=False)]


def _call_of(plan: Plan, operands: PagedOperands, block_table: torch.Tensor) -> Call:
    problem, device = plan.problem, operands.q.device
    mask = NO_MASK
    if operands.starts is not None and operands.stops is not None:
        starts, stops = (_bounds(x, device) for x in (operands.starts, operands.stops))
        mask = Mask(starts, stops, None, None, None, tl.constexpr(1))
    if operands.dense_mask is not None:
        mask = mask._replace(bits=Bits(*view(operands.dense_mask.view(torch.uint8)), 0, 0))
    heads = (operands.q[None], operands.k_pages, operands.v_pages)
    return Call(
        shape=shape_of(*(x.transpose(1, 2) for x in heads)),
        mask=mask,
        dense=tuple(view(bias) for bias in operands.biases),
        table=rows(operands.table) if operands.table is not None else None,
        dropout=_dropouts(operands),
        pages=Pages(block_table, block_table.stride(0), tl.constexpr(operands.k_pages.shape[1])),
        scale=float(problem.scale),
        rising=tl.constexpr(problem.scale > 0),
        softcap=problem.softcap,
    )


def _bounds(side: np.ndarray, device: torch.device) -> View:
    return view(torch.from_numpy(side.astype(np.int32)).to(device)[None, None, :, None])


def _dropouts(operands: PagedOperands) -> Dropout | None:
    """Words of dropout for each sequence, which is batch row 0 of a call of its own."""
    rule = operands.dropout
    if rule is None:
        return None
    rules = [
        dropout_of(rule, (operands.q.shape[1], int(q_len), int(k_len)), operands.q.device, n * 2**32)
        for n, (q_len, k_len) in enumerate(zip(operands.q_len, operands.k_len, strict=True))
    ]
    words = torch.stack([own.words for own in rules])
    words[:, 5] = 0
    return rules[0]._replace(words=words)
