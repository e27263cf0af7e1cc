"""The forward pass of few queries over many keys."""

from __future__ import annotations

import torch

from ...contract import Operands, Plan
from ...problem import AttentionProblem
from .arguments import call_of, can_leak
from .decode_kernel import decode_kernel, merge_kernel
from .device.records import block_width, rows, view
from .facts import facts_of
from .launch import blocks_of, launch, split_of
from .tiles import packed_rows, packs


def decodes(problem: AttentionProblem, device: torch.device) -> bool:
    """Whether a call is one of few queries over more keys than a split holds."""
    return packs(problem) and problem.k_len > split_of(device)


def decode(plan: Plan, operands: Operands, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Fill out (B, Hq, Sq, Dv) and lse (B, Hq, Sq)."""
    problem, device = plan.problem, operands.q.device
    split, heads = split_of(device), problem.batch * problem.kv_heads
    splits = -(-problem.k_len // split)
    blocks = blocks_of("decode", plan, device)._replace(queries=packed_rows(problem))
    acc, peak, total = parts_of(heads * splits, blocks.queries, problem.value_dim, device)
    call = call_of(plan, operands)._replace(mask=facts_of(operands.mask, device).mask)
    launch(
        decode_kernel, (heads * splits,),
        view(operands.q), view(operands.k), view(operands.v), acc, peak, total, call, None, splits,
        SPLIT=split, CAN_LEAK=can_leak(plan), blocks=blocks,
    )  # fmt: skip
    launch(
        merge_kernel, (heads,),
        acc, peak, total, view(out), rows(lse), call, None, sinks, splits,
        BLOCK_Q=blocks.queries, num_warps=blocks.warps,
    )  # fmt: skip


def parts_of(programs: int, queries: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Room for the states of `queries` rows that each program leaves: acc, peak and total, float32."""
    acc = torch.empty((programs, queries, block_width(width)), dtype=torch.float32, device=device)
    peak, total = (torch.empty((programs, queries), dtype=torch.float32, device=device) for _ in range(2))
    return acc, peak, total
