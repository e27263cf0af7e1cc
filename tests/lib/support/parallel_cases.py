"""A call over ranks beside the same call on one device: what each rank does, and how the ranks' results join."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import add
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import tilewise as tw
from tilewise import validate
from tilewise.contract import Gradients, Operands, Plan
from tilewise.distributed.layout import Layout
from tilewise.masks.biases import as_bias
from tilewise.plan.catalog import PRESETS
from tilewise.plan.choose import choose
from tilewise.plan.preset import example
from tilewise.torch.distributed import context_parallel_attention, shard

_OPTIONS = ("mask", "bias", "scale", "softcap", "sinks", "dropout")


@dataclass(frozen=True)
class Case:
    """A problem of the catalogue over the first ranks of the group.

    Attributes:
        own: whether dense masks and biases are given as the rank's rows.
        kernel: the kernel to ask for, or None; lengths: uneven shards, queries and keys.
    """

    preset: str
    strategy: str
    sharding: str = "contiguous"
    ranks: int = 4
    dtype: str = "float32"
    own: bool = False
    kernel: str | None = None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, eq=False)
class Whole:
    """The call on one device, validated; arrays are torch tensors."""

    options: dict[str, Any]
    layout: str
    operands: Operands
    problem: Any
    d_out: Tensor
    d_lse: Tensor

    @property
    def plan(self) -> Plan:
        """With all gradients wanted."""
        given = {"bias": bool(self.operands.dense), "table": self.operands.table is not None}
        given["sinks"] = self.operands.sinks is not None
        names = frozenset({"q", "k", "v"} | {name for name, there in given.items() if there})
        return choose(replace(self.problem, gradients=names), None, True)


@lru_cache(maxsize=8)
def whole_of(preset: str, dtype: str) -> Whole:
    """The same on every rank: everything random has a fixed seed."""
    made = example(PRESETS[preset])
    kind = getattr(torch, dtype)
    options = {**dict.fromkeys(_OPTIONS), **made.options}
    layout = options.pop("layout", "bhsd")
    if options["mask"] is not None:
        held = iter([torch.tensor(np.asarray(x)) for x in options["mask"].operands()])
        options["mask"] = options["mask"].replace_operands(lambda: next(held))
    for name in ("bias", "sinks"):
        if isinstance(options[name], np.ndarray):
            options[name] = torch.tensor(options[name])
    q, k, v = (torch.tensor(x).to(kind) for x in (made.q, made.k, made.v))
    call = validate.prepare(q, k, v, layout=layout, return_lse=True, **options)
    p, rng = call.problem, np.random.default_rng(7)
    d_out = torch.tensor(rng.standard_normal((p.batch, p.q_heads, p.q_len, p.value_dim))).to(kind)
    d_lse = torch.tensor(rng.standard_normal((p.batch, p.q_heads, p.q_len)), dtype=getattr(torch, p.accumulator))
    return Whole(options, layout, call.operands, p, d_out, d_lse)


def leaves_of(operands: Operands) -> list[Tensor | None]:
    """q, k, v, the dense biases, the table, the sinks."""
    return [operands.q, operands.k, operands.v, *operands.dense, operands.table, operands.sinks]


def one_device(case: Case) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """out, lse (in the layout "bhsd") and the gradients to `leaves_of`."""
    whole = whole_of(case.preset, case.dtype)
    return _differentiated(whole, case, whole.operands, lambda x, axis, keys=False: x, tw.attention, {})


def on_this_rank(case: Case) -> tuple[Any, ...] | str | None:
    """The same of this rank's rows, or what the call was refused with; None where the rank has no part in it."""
    group = group_of(case.ranks)
    if dist.get_rank() >= case.ranks:
        return None
    whole = whole_of(case.preset, case.dtype)
    lengths = case.lengths or (None, None)

    def cut(x: Tensor, axis: int, keys: bool = False) -> Tensor:
        return shard(x, axis, group=group, sharding=case.sharding, lengths=lengths[keys])

    spread = {
        "group": group, "strategy": case.strategy, "sharding": case.sharding, "kernel": case.kernel,
        "lengths": case.lengths,
    }  # fmt: skip
    try:
        out, lse, found = _differentiated(whole, case, whole.operands, cut, context_parallel_attention, spread)
    except ValueError as refused:
        return str(refused)
    return tuple(None if x is None else portable(x) for x in (out, lse, *found))


def portable(x: Tensor) -> np.ndarray:
    """As an array that a pipe can carry."""
    return x.detach().to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype).numpy()


def joined(case: Case, answers: list[tuple[Any, ...] | None]) -> tuple[Tensor, Tensor, Gradients]:
    """The ranks' results as one device has them: rows side by side, parts of what is shared added up."""
    whole = whole_of(case.preset, case.dtype)
    kind, p = getattr(torch, case.dtype), whole.problem
    q_lengths, k_lengths = case.lengths or (None, None)
    q = np.argsort(Layout(case.sharding, p.q_len, case.ranks, q_lengths).order())
    k = np.argsort(Layout(case.sharding, p.k_len, case.ranks, k_lengths).order())
    columns = list(zip(*(answer for answer in answers if answer is not None), strict=True))

    def rows(n: int, order: np.ndarray, dtype: Any) -> Tensor:
        return torch.tensor(np.concatenate(columns[n], 2)[:, :, order]).to(dtype)

    lse = rows(1, q, getattr(torch, p.accumulator))
    shared = [None if parts[0] is None else torch.tensor(np.sum(parts, 0)) for parts in columns[5:]]
    return rows(0, q, kind), lse, Gradients(
        rows(2, q, kind), rows(3, k, kind), rows(4, k, kind), tuple(shared[:-2]), shared[-2], shared[-1]
    )  # fmt: skip


def group_of(ranks: int) -> Any:
    """The group of the first ranks; every rank must ask."""
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(range(ranks)))
    return _groups[ranks]


_groups: dict[int, Any] = {}


def _differentiated(
    whole: Whole, case: Case, o: Operands, cut: Any, attention: Any, spread: dict[str, Any]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    local = [cut(o.q, 2), cut(o.k, 2, True), cut(o.v, 2, True)]
    own = case.own and bool(spread)
    dense = [cut(x, 2) if own and x.shape[2] > 1 else x for x in o.dense]
    values = [None if x is None else x.detach().clone().requires_grad_() for x in (*local, *dense, o.table, o.sinks)]
    q, k, v, *biases, table, sinks = values
    terms = [*map(as_bias, biases), *([] if table is None else [tw.relative(table)])]
    bias = reduce(add, terms) if terms else None
    mask = whole.options["mask"]
    if own and mask is not None:
        held = iter([cut(x, x.ndim - 2) if x.dtype == torch.bool and x.shape[-2] > 1 else x for x in mask.operands()])
        mask = mask.replace_operands(lambda: next(held))
    options = {**whole.options, "mask": mask, "bias": bias, "sinks": sinks, "layout": whole.layout}
    if whole.layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    elif whole.layout == "thd":
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out, lse = attention(q, k, v, return_lse=True, **options, **spread)
    if whole.layout == "bshd":
        out = out.transpose(1, 2)
    elif whole.layout == "thd":
        out, lse = out.transpose(0, 1)[None], lse[None]
    wanted = [x for x in values if x is not None]
    found = iter(torch.autograd.grad((out, lse), wanted, (cut(whole.d_out, 2), cut(whole.d_lse, 2))))
    return out.detach(), lse.detach(), [None if x is None else next(found) for x in values]
