"""The call over several ranks as two operators of torch's dispatcher, opaque to tracing as those of one device are.

    context_parallel           this rank's operands -> (out, lse) of its rows
    context_parallel_backward  operands, out, lse and gradients of both -> the wanted gradients

Both end in `facts, integers, scale, options` as every operator of tilewise does, and in `lengths, team`: the rows of
each rank, queries first, and the line of text of `Team`. What they need of other ranks they exchange inside.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import register_autograd, register_fake

from ..._remembered import Remembered
from ...distributed.schedule import Schedule
from ...problem import Gradient
from ..operator import LIBRARY, Tensors, empty_in_order, ordered
from ..options import Options, parse
from ..spelling import has_predicate, predicates_of
from . import sequence
from .agreement import agree
from .facts import Facts, accumulator, facts_of
from .heads import HeadsCircle
from .peers import Peers
from .spread import keys_circle, layout_of
from .strategy import schedule_of

_REST = "Tensor[] facts, SymInt[] integers, float? scale, str options, SymInt[] lengths, str team"

LIBRARY.define(f"context_parallel(Tensor[] operands, {_REST}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"context_parallel_backward(Tensor[] operands, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse, {_REST}, "
    "int[] wanted) -> Tensor[]"
)
context_parallel = torch.ops.tilewise.context_parallel.default
context_parallel_backward = torch.ops.tilewise.context_parallel_backward.default

_ONCE = (
    "context_parallel_attention: derivatives of second order are not available over several ranks; "
    "torch.utils.checkpoint and first-order gradients are"
)


@dataclass(frozen=True, slots=True)
class Team:
    """Who works together, and how.

    Attributes:
        group: name of the process group; strategy, sharding: as of `context_parallel_attention`.
        agreed: whether the ranks have compared their calls already.
    """

    group: str
    strategy: str
    sharding: str
    agreed: bool

    def __str__(self) -> str:
        return f"{self.strategy};{self.sharding};{int(self.agreed)};{self.group}"

    @classmethod
    def parse(cls, text: str) -> Team:
        """The team of such a text."""
        strategy, sharding, agreed, group = text.split(";", 3)
        return cls(group, strategy, sharding, agreed == "1")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What a rank has to do for a call; `circle` is None where no heads are exchanged."""

    told: Options
    facts: Facts
    schedule: Schedule
    peers: Peers
    circle: HeadsCircle | None


def compute(
    operands: Tensors, facts: Tensors, integers: Sequence[int], scale: float | None, options: str,
    lengths: Sequence[int], team: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of this rank's rows, (B, Hq, rows, Dv) and (B, Hq, rows)."""
    lengths, placed = list(lengths), Team.parse(team)
    if not placed.agreed:
        shapes = [(tuple(x.shape[:2]), x.shape[3]) for x in operands[:3]]
        own = operands[0].shape[2], operands[1].shape[2]
        text = f"{shapes} {operands[0].dtype} {options} {list(integers)} {scale} {placed.strategy} {placed.sharding}"
        agree(placed.group, text, own, lengths, once=False)
    job = _job(operands, facts, integers, scale, options, lengths, placed)
    q, k, v = operands[:3]
    if job.circle is not None:
        q, k, v = job.circle.join([q], [k, v], "rows for heads")
    out, lse = sequence.attend(job.peers, job.facts, job.schedule, q, k, v)
    if job.circle is not None:
        lse, out = job.circle.part([lse, out], [], "heads for rows")
    return ordered(out, job.told, 0), lse.contiguous()


def compute_backward(
    operands: Tensors, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor,
    facts: Tensors, integers: Sequence[int], scale: float | None, options: str, lengths: Sequence[int], team: str,
    wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of the operands numbered in `wanted`: to what all ranks share, this rank's part."""
    job = _job(operands, facts, integers, scale, options, list(lengths), Team.parse(team))
    names: frozenset[Gradient] = frozenset(job.told.names[n] for n in wanted)
    q, k, v = operands[:3]
    d_lse = d_lse.to(lse.dtype)
    if job.circle is not None:
        lse, d_lse, q, out, d_out, k, v = job.circle.join(
            [lse, d_lse, q, out, d_out.to(q.dtype)], [k, v], "rows for heads, backward"
        )
    shared = job.circle is not None and job.circle.shared_keys
    found = sequence.pull(
        job.peers, job.facts, job.schedule, q, k, v, (out, lse, d_out, d_lse), names, rounded=not shared
    )
    d_q, d_k, d_v = found.q, found.k, found.v
    if job.circle is not None:
        rows, keys = [x for x in (d_q,) if x is not None], [x for x in (d_k, d_v) if x is not None]
        back = iter(job.circle.part(rows, keys, "gradients for rows"))
        d_q, d_k, d_v = (None if x is None else next(back) for x in (d_q, d_k, d_v))
    flat = [d_q, d_k, d_v, *found.dense]
    flat += [x for x, given in ((found.table, job.facts.table), (found.sinks, job.facts.sinks)) if given is not None]
    return [ordered(flat[n].to(operands[n].dtype), job.told, n) for n in wanted]


_schedules: Remembered[Hashable, Schedule] = Remembered()  # of calls without arrays in their masks


def _job(
    operands: Tensors, facts: Tensors, integers: Sequence[int], scale: float | None, options: str,
    lengths: Sequence[int], team: Team,
) -> Job:  # fmt: skip
    told, count, group = parse(options), len(lengths) // 2, _resolve_process_group(team.group)
    q, k = layout_of("q", team.sharding, lengths[:count]), layout_of("k", team.sharding, lengths[count:])
    known = facts_of(operands, facts, integers, scale, told, q, k, dist.get_rank(group))
    q_heads, kv_heads, device = operands[0].shape[1], operands[1].shape[1], operands[0].device
    key = (options, tuple(integers), tuple(lengths), team, scale, device, *(x.shape for x in operands))
    symbolic = not facts and not has_predicate(told.mask)
    schedule = _schedules.get(key) if symbolic else None
    if schedule is None:
        schedule = schedule_of(team.strategy, known, operands, q, k)
        if symbolic:
            _schedules.keep(key, schedule)
    circle = HeadsCircle.of(group, schedule, q_heads, kv_heads, device) if schedule.inner > 1 else None
    if circle is not None:
        known = replace(known, heads=circle.own)
    return Job(told, known, schedule, keys_circle(group, schedule), circle)


for _name, _function in (("context_parallel", compute), ("context_parallel_backward", compute_backward)):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@register_fake("tilewise::context_parallel", lib=LIBRARY)
def _shapes(operands: Tensors, *rest: Any) -> tuple[Tensor, Tensor]:
    q, v, told = operands[0], operands[2], parse(rest[3])
    return empty_in_order(q, told, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=accumulator(q))


@register_fake("tilewise::context_parallel_backward", lib=LIBRARY)
def _backward_shapes(operands: Tensors, *rest: Any) -> list[Tensor]:
    told, wanted = parse(rest[7]), rest[10]
    return [
        empty_in_order(operands[n], told, operands[n].shape) if n < 3 else operands[n].new_empty(operands[n].shape)
        for n in wanted
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    operands, facts, *ctx.rest = inputs
    ctx.count, ctx.held = len(operands), predicates_of(ctx.rest[2])
    ctx.save_for_backward(*output, *operands, *facts)


def _pull(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    operands, facts = tensors[: ctx.count], tensors[ctx.count :]
    wanted = [n for n, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    found = iter(context_parallel_backward(operands, out, lse, d_out, d_lse, facts, *ctx.rest, wanted))
    gradients = [next(found) if n in wanted else None for n in range(ctx.count)]
    # torch takes an empty list of integers for one of tensors, and wants as many gradients.
    nothing: list[Any] = [[] if rest == [] else None for rest in ctx.rest]
    return gradients, [None] * len(facts), *nothing


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pass


def _refuse(ctx: Any, *cotangents: Any) -> NoReturn:
    raise NotImplementedError(_ONCE)


register_autograd("tilewise::context_parallel", _pull, setup_context=_save, lib=LIBRARY)
register_autograd("tilewise::context_parallel_backward", _refuse, setup_context=_save_nothing, lib=LIBRARY)
