"""The forward pass as the contract asks for it."""

from __future__ import annotations

import torch

from ...contract import Operands, Plan
from .arguments import call_of, heads_together, unsound_of
from .careful_kernels import careful_forward_kernel
from .decode import decode, decodes
from .device.records import rows, view
from .facts import facts_of
from .forward_kernel import forward_kernel
from .launch import blocks_of, launch, on_device_of
from .tiles import careful


def forward(plan: Plan, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one call.

    Args:
        operands: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) on one device, float32, float16 or bfloat16.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype; lse (B, Hq, Sq) float32.
    """
    q, k, v = operands.q, operands.k, operands.v
    problem = plan.problem
    out = like_layout(problem.layout, (*q.shape[:3], v.shape[3]), q, problem.part)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not problem.scores:
        # Triton need not be asked: no pair exists, so every row there is sees nothing.
        return out.zero_(), lse.fill_(float("-inf"))
    call = call_of(plan, operands)
    sinks = (
        operands.sinks.contiguous() if operands.sinks is not None else None
    )  # a number stands there as a broadcast one
    if decodes(problem, q.device):
        with on_device_of(q):
            decode(plan, operands, out, lse, sinks)
        return out, lse
    blocks = blocks_of("forward", plan, q.device)
    with on_device_of(q):
        for slab in facts_of(operands.mask, q.device).slabs("queries", blocks):
            masked, grid = slab.lists is not None, (slab.tiles * problem.batch * problem.q_heads,)
            unsound = unsound_of(plan, grid, q.device)
            arguments = (
                view(q), view(k), view(v), view(out), rows(lse), unsound, call._replace(mask=slab.mask), sinks,
                slab.lists, slab.first, slab.tiles, heads_together(problem, problem.q_heads, masked),
            )  # fmt: skip
            launch(forward_kernel, grid, *arguments, LAST_FIRST=masked, blocks=blocks)
            if unsound is not None:
                launch(careful_forward_kernel, grid, *arguments, LAST_FIRST=masked, blocks=careful(blocks))
    return out, lse


def like_layout(layout: str, shape: tuple[int, ...], like: torch.Tensor, part: bool) -> torch.Tensor:
    """An empty (B, H, S, D) tensor whose memory has the order of axes of the caller's layout; float32 in a part."""
    dtype = torch.float32 if part else like.dtype
    if layout == "bhsd":
        return torch.empty(shape, dtype=dtype, device=like.device)
    b, h, s, d = shape
    return torch.empty((b, s, h, d), dtype=dtype, device=like.device).transpose(1, 2)
