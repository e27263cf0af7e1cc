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
    acc = torch.empty(
        (heads, splits, blocks.queries, block_width(problem.value_dim)), dtype=torch.float32, device=device
    )
    peak, total = (torch.empty(acc.shape[:3], dtype=torch.float32, device=device) for _ in range(2))
    call = call_of(plan, operands)._replace(mask=facts_of(operands.mask, device).mask)
    launch(
        decode_kernel, (heads * splits,),
        view(operands.q), view(operands.k), view(operands.v), acc, peak, total, call, splits,
        SPLIT=split, CAN_LEAK=can_leak(plan), blocks=blocks,
    )  # fmt: skip
    launch(
        merge_kernel, (heads,),
        acc, peak, total, view(out), rows(lse), call, sinks, splits,
        BLOCK_Q=blocks.queries, num_warps=blocks.warps,
    )  # fmt: skip
