"""Attention of one rank's rows to the keys of all: block by block, merged; and back.

The states of a row's blocks are merged in the accumulator's dtype in the order of the schedule's steps, so rounding to
the dtype of q happens once, whatever the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Gradients
from ...distributed.schedule import Block, Schedule
from ...kernels.state import merge
from ...masks.part import Run
from ...problem import Gradient
from .facts import BiasSums, Facts, accumulator
from .peers import Peers
from .travel import Homeward, around

Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # out, lse, d_out, d_lse


def whole(schedule: Schedule) -> Block:
    """The block of all rows and all keys."""
    q_len, k_len = schedule.q.length, schedule.k.length
    return Block(Run(0, q_len), Run(0, k_len), 0, 0, q_len * k_len)


def attend(peers: Peers, facts: Facts, schedule: Schedule, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, H, rows, Dv) in q's dtype and lse (B, H, rows) of q (B, H, rows, D), k and v of this rank."""
    if len(peers) == 1:
        return facts.attend(q, k, v, whole(schedule), whole=True)
    out, lse = _nothing_seen(q, v)
    for _, step, shard in around(peers, schedule, k, v):
        for block in step.blocks:
            rows = slice(block.q_begin, block.q_begin + block.rows.count)
            part = facts.attend(q[:, :, rows], *shard.keys(step, block), block)
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *part)
    if facts.sinks is not None:
        out, lse = _with_sinks(out, lse, facts.heads.of(facts.sinks, 0))
    return out.to(q.dtype), lse


def pull(
    peers: Peers, facts: Facts, schedule: Schedule, q: Tensor, k: Tensor, v: Tensor, given: Rows,
    wanted: frozenset[Gradient], rounded: bool,
) -> Gradients:  # fmt: skip
    """The wanted gradients: to this rank's q, k and v whole, to what all ranks share this rank's part.

    Those to q, k and v are in the accumulator's dtype unless the circle is of one rank and they are to be `rounded`;
    those to biases and sinks are of all heads, 0 where the heads are not these.
    """
    sums = BiasSums(facts, wanted)
    if len(peers) == 1:
        block = whole(schedule)
        found = facts.pull(q, k, v, given, block, wanted, whole=True, rounded=rounded)
        sums.add(block, found)
        return Gradients(found.q, found.k, found.v, sums.dense, sums.table, _of_all_heads(facts, found.sinks))
    inside = wanted - {"sinks"}
    d_q = torch.zeros(q.shape, dtype=accumulator(q), device=q.device)
    homeward = Homeward(peers, schedule, k, v, accumulator(q))
    for number, step, shard in around(peers, schedule, k, v):
        part = homeward.fresh(shard.k.shape[2]) if step.blocks else None
        for block in step.blocks if inside else ():
            rows = slice(block.q_begin, block.q_begin + block.rows.count)
            found = facts.pull(
                q[:, :, rows], *shard.keys(step, block), [x[:, :, rows] for x in given], block, inside
            )  # fmt: skip
            if "q" in wanted:
                d_q[:, :, rows] += found.q
            for name, total in zip("kv", part.keys(step, block), strict=True):
                if name in wanted:
                    total += getattr(found, name)
            sums.add(block, found)
        if wanted & {"k", "v"}:
            homeward.send(number, step, part)
    homeward.land()
    sinks = _sinks_gradient(facts, given) if "sinks" in wanted else None
    return Gradients(
        d_q if "q" in wanted else None,
        homeward.total.k if "k" in wanted else None,
        homeward.total.v if "v" in wanted else None,
        sums.dense,
        sums.table,
        sinks,
    )


def _nothing_seen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of rows that have seen no key yet."""
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=accumulator(q), device=q.device)
    return out, torch.full(q.shape[:3], float("-inf"), dtype=out.dtype, device=q.device)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more exponent in the denominator of every row that sees something."""
    nothing = lse == float("-inf")
    total = torch.where(nothing, lse, torch.logaddexp(lse, sinks[:, None]))
    fade = torch.where(nothing, 1.0, torch.exp(lse - total))
    return out * fade[..., None], total


def _sinks_gradient(facts: Facts, given: Rows) -> Tensor:
    """A sink has the weight p = exp(sink - lse) and no value, so its gradient is the sum of p (d_lse - out . d_out)."""
    out, lse, d_out, d_lse = given
    wide = lse.dtype
    nothing = lse == float("-inf")
    share = torch.where(nothing, 0.0, torch.exp(facts.heads.of(facts.sinks, 0)[:, None] - lse))
    row = d_lse.to(wide) - torch.linalg.vecdot(out.to(wide), d_out.to(wide))
    return _of_all_heads(facts, torch.where(nothing, 0.0, share * row).sum((0, 2)))


def _of_all_heads(facts: Facts, sinks: Tensor | None) -> Tensor | None:
    if sinks is None:
        return None
    total = torch.zeros_like(facts.sinks)
    facts.heads.of(total, 0).copy_(sinks)
    return total
