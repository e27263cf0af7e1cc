"""The backward pass as the contract asks for it: recomputed from lse, in linear memory.

Two passes, one for the queries and one for the keys, give the same bits on every run. The way "atomics" takes one for
both, whose gradients to q are added in an order that changes from run to run; it is a way of problems that allow that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from ...contract import Gradients, Operands, Plan
from ..state import far_from, is_far, may_be_far
from .arguments import call_of, heads_together, unsound_of
from .bias_kernels import d_dense_kernel, d_table_kernel
from .careful_kernels import careful_d_kv_kernel, careful_d_q_kernel, unsound_d_q_kernel
from .d_kv_kernel import d_kv_kernel
from .d_q_kernel import d_q_kernel
from .device.arithmetic import LOG2E, MOST
from .device.records import Call, Levels, Rows, View, levels, rows, view
from .facts import Facts, facts_of
from .forward import like_layout
from .launch import blocks_of, launch, on_device_of
from .rows_kernel import rows_kernel
from .shares_kernel import shares_kernel
from .tiles import ATOMICS, careful, keys_and_values_apart

_ROWS_AT_ONCE = 32


def backward(
    plan: Plan,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
) -> Gradients:
    """Gradients of one call to the operands named in `plan.problem.gradients`.

    Args:
        out (B, Hq, Sq, Dv), lse (B, Hq, Sq): what the forward pass gave. d_out, d_lse: their gradients; d_lse or None.

    Returns:
        Gradients in the operands' shapes and dtypes, None for those not wanted.
    """
    wanted = plan.problem.gradients
    if not plan.problem.scores:
        return _zeros(operands, wanted)
    with on_device_of(operands.q):
        step = _begin(plan, operands, out, lse, d_out, d_lse)
        d_q = d_k = d_v = None
        if "q" in wanted and wanted & {"k", "v"} and _in_one_pass(plan):
            d_q, d_k, d_v = step.d_qkv()
        else:
            d_k, d_v = step.d_kv() if wanted & {"k", "v"} else (None, None)
            d_q = step.d_q() if "q" in wanted else None
        return Gradients(
            q=d_q,
            k=d_k if "k" in wanted else None,
            v=d_v if "v" in wanted else None,
            dense=tuple(step.d_dense(bias) if "bias" in wanted else None for bias in operands.dense),
            table=step.d_table(operands.table) if "table" in wanted and operands.table is not None else None,
            sinks=step.d_sinks(operands.sinks, lse) if "sinks" in wanted and operands.sinks is not None else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One backward pass: what its kernels share.

    Attributes:
        tiles: views of q, k, v and d_out, then levels and delta of each row (see `rows_kernel` and `shares_kernel`), in
            the kernels' order.
        level, shares, delta: (B, Hq, Sq) float32; shares None where no row can be far.
    """

    plan: Plan
    operands: Operands
    call: Call
    facts: Facts
    tiles: tuple[View | Rows | Levels, ...]
    level: torch.Tensor
    shares: torch.Tensor | None
    delta: torch.Tensor

    def d_q(self) -> torch.Tensor:
        """(B, Hq, Sq, D)."""
        problem, q = self.plan.problem, self.operands.q
        d_q = like_layout(problem.layout, tuple(q.shape), q, problem.part)
        blocks = blocks_of("d_q", self.plan, q.device)
        for slab in self.facts.slabs("queries", blocks):
            masked = slab.lists is not None
            grid = (slab.tiles * problem.batch * problem.q_heads,)
            walk = slab.lists, slab.first, slab.tiles, heads_together(problem, problem.q_heads, masked)
            unsound = unsound_of(self.plan, grid, q.device)
            arguments = (*self.tiles, view(d_q), unsound, self.call._replace(mask=slab.mask), *walk)
            launch(d_q_kernel, grid, *arguments, LAST_FIRST=masked, blocks=blocks)
            if unsound is not None:
                launch(careful_d_q_kernel, grid, *arguments, LAST_FIRST=masked, blocks=careful(blocks))
        return d_q

    def d_qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, Hq, Sq, D), (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), in one pass."""
        problem, q = self.plan.problem, self.operands.q
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        d_k, d_v = self.d_kv(sums)
        d_q = like_layout(problem.layout, tuple(q.shape), q, problem.part)
        return torch.mul(sums, problem.scale, out=d_q), d_k, d_v

    def d_kv(self, d_q: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, Hkv, Sk, D) and (B, Hkv, Sk, Dv); to d_q (B, Hq, Sq, D) float32 the gradient of q / scale is added."""
        problem, k, v = self.plan.problem, self.operands.k, self.operands.v
        d_k, d_v = (like_layout(problem.layout, tuple(array.shape), array, problem.part) for array in (k, v))
        blocks = blocks_of("d_kv" if d_q is None else "d_qkv", self.plan, k.device)
        passes = ((True, False), (False, True)) if keys_and_values_apart(problem) else ((True, True),)
        sums = view(d_q) if d_q is not None else None
        for slab in self.facts.slabs("keys", blocks):
            grid, call = (slab.tiles * problem.batch * problem.kv_heads,), self.call._replace(mask=slab.mask)
            together = heads_together(problem, problem.kv_heads, slab.lists is not None)
            walk = slab.lists, slab.first, slab.tiles, together
            unsound = unsound_of(self.plan, grid, k.device)
            made = view(d_k), view(d_v), unsound
            for (want_k, want_v), far in product(passes, (False, True) if self.shares is not None else (False,)):
                launch(
                    d_kv_kernel, grid, *self.tiles, sums if want_k else None, *made, call, *walk,
                    WANT_K=want_k, WANT_V=want_v, FAR=far, blocks=blocks,
                )  # fmt: skip
            if unsound is not None:
                launch(careful_d_kv_kernel, grid, *self.tiles, *made, call, *walk, blocks=careful(blocks))
            if unsound is not None and sums is not None:
                launch(unsound_d_q_kernel, grid, *self.tiles, sums, call, *walk, blocks=blocks)
        return d_k, d_v

    def d_dense(self, bias: torch.Tensor) -> torch.Tensor:
        """(B', H', Sq', Sk'), summed where the bias was broadcast."""
        problem = self.plan.problem
        over_b, over_h, over_q, over_k = (size == 1 for size in bias.shape)
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        blocks = blocks_of("d_bias", self.plan, self.delta.device)
        k_tiles = -(-problem.k_len // blocks.keys)
        for slab in self.facts.slabs("queries", blocks):
            grid = (1 if over_q else slab.tiles, 1 if over_k else k_tiles, bias.shape[0] * bias.shape[1])
            launch(
                d_dense_kernel, grid,
                *self.tiles, view(d_bias), self.call._replace(mask=slab.mask),
                slab.first, slab.tiles, k_tiles, problem.batch,
                OVER_B=over_b, OVER_H=over_h, OVER_Q=over_q, OVER_K=over_k, blocks=blocks,
            )  # fmt: skip
        return d_bias.to(bias.dtype)

    def d_table(self, table: torch.Tensor) -> torch.Tensor:
        """(B', H', Sq + Sk - 1), summed along diagonals."""
        problem = self.plan.problem
        blocks = blocks_of("d_bias", self.plan, self.delta.device)
        side = blocks.queries
        q_tiles, k_tiles = -(-problem.q_len // side), -(-problem.k_len // side)
        batch, heads, length = table.shape
        parts = torch.zeros((batch * heads, q_tiles + k_tiles - 1, 2 * side), dtype=torch.float32, device=table.device)
        for slab in self.facts.slabs("queries", blocks):
            launch(
                d_table_kernel, (parts.shape[1], parts.shape[0]),
                *self.tiles, parts, self.call._replace(mask=slab.mask),
                slab.first, slab.tiles, q_tiles, k_tiles, problem.batch,
                OVER_B=batch == 1, OVER_H=heads == 1, blocks=blocks,
            )  # fmt: skip
        # Neighbouring parts overlap by half: the right half of one and the left of the next are the same distances.
        sums = torch.zeros((batch * heads, q_tiles + k_tiles, side), dtype=torch.float32, device=table.device)
        sums[:, :-1] += parts[..., :side]
        sums[:, 1:] += parts[..., side:]
        padding = q_tiles * side - problem.q_len
        return sums.reshape(batch, heads, -1)[..., padding : padding + length].to(table.dtype)

    def d_sinks(self, sinks: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """(Hq,): a sink's probability has no value, so its gradient is only what normalisation takes away."""
        share = torch.where(lse == float("-inf"), 0.0, torch.exp(sinks[None, :, None] - lse))
        if self.shares is not None:
            # A far row's level is no rounded lse; sinks that overflow in units of log 2 are far above all others.
            of_far = torch.exp2((sinks[None, :, None] * LOG2E.value).clamp(-MOST.value, MOST.value) - self.level)
            problem = self.plan.problem
            share = torch.where(is_far(lse, far_from(problem.dropout, problem.dtype)), of_far * self.shares, share)
        return -(share * self.delta).sum((0, 2)).to(sinks.dtype)


def _in_one_pass(plan: Plan) -> bool:
    # The way is this kernel's own only where the plan names it: a plan of another kernel may come along as well, whose
    # results are not finite.
    return plan.backward == "triton" and plan.backward_way == ATOMICS


def _begin(
    plan: Plan,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
) -> _Step:
    problem = plan.problem
    call, facts = call_of(plan, operands), facts_of(operands.mask, operands.q.device)
    delta, level = (
        torch.empty_like(lse, memory_format=torch.contiguous_format),
        torch.empty_like(lse, memory_format=torch.contiguous_format),
    )
    batch, heads, q_len = lse.shape
    steps = -(-q_len // _ROWS_AT_ONCE)
    row_d_lse = rows(d_lse) if d_lse is not None else None
    launch(
        rows_kernel, (steps * batch * heads,),
        view(out), view(d_out), rows(lse), row_d_lse, rows(delta), rows(level),
        steps, heads, q_len,
        WIDTH=call.shape.dv.value, BLOCK=call.shape.block_dv.value, ROWS=_ROWS_AT_ONCE,
    )  # fmt: skip
    shares = far = None
    if may_be_far(problem):
        shares = torch.empty_like(level)
        far = torch.zeros(1, dtype=torch.int32, device=lse.device)
        sinks = operands.sinks.contiguous() if operands.sinks is not None else None
        # The lists of d_q's tiles; where it has work at all it is in no hurry.
        blocks = blocks_of("d_q", plan, lse.device)._replace(stages=1)
        for slab in facts.slabs("queries", blocks):
            masked, grid = slab.lists is not None, (slab.tiles * problem.batch * problem.q_heads,)
            launch(
                shares_kernel, grid,
                view(operands.q), view(operands.k), view(operands.v), view(d_out), rows(lse), row_d_lse,
                levels(level, shares, far), rows(delta), call._replace(mask=slab.mask), sinks,
                slab.lists, slab.first, slab.tiles, heads_together(problem, problem.q_heads, masked),
                LAST_FIRST=masked, FAR_FROM=far_from(problem.dropout, problem.dtype), blocks=blocks,
            )  # fmt: skip
    tiles = (
        view(operands.q), view(operands.k), view(operands.v), view(d_out), levels(level, shares, far), rows(delta)
    )  # fmt: skip
    return _Step(plan, operands, call, facts, tiles, level, shares, delta)


def _zeros(operands: Operands, wanted: frozenset[str]) -> Gradients:
    """Where no pair exists nothing depends on anything."""

    def zero(name: str, array: torch.Tensor | None) -> torch.Tensor | None:
        return torch.zeros_like(array) if array is not None and name in wanted else None

    return Gradients(
        q=zero("q", operands.q),
        k=zero("k", operands.k),
        v=zero("v", operands.v),
        dense=tuple(zero("bias", bias) for bias in operands.dense),
        table=zero("table", operands.table),
        sinks=zero("sinks", operands.sinks),
    )
