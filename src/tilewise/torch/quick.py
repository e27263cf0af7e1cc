"""Calls like one made before: the same shapes, strides and options, so the same plan, facts and addresses but three.

Small calls cost what the way to the kernel costs. What that way finds out depends on the key below alone, so it is
found once; then a call makes its two results and enters the compiled code.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._remembered import Remembered
from ..contract import Operands, Plan
from ..kernels.native.buffers import in_large_pages
from ..kernels.native.call import lasting
from ..kernels.native.facts import Alive, mask_place


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call of `_native.forward` without its tensors.

    Attributes:
        enter: the compiled function; rest: its keywords but those of tensors; alive: what they point into.
        out, lse: shapes in memory; swapped: whether `out` lies as (B, S, H, D).
        dtype, wide: of out and of lse.
        dense: whether a boolean mask, read in place, comes with each call.
    """

    enter: Any
    rest: dict[str, Any]
    alive: Alive
    out: tuple[int, ...]
    lse: tuple[int, ...]
    swapped: bool
    dtype: torch.dtype
    wide: torch.dtype
    dense: bool

    def __call__(self, operands: Sequence[Tensor], facts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq)."""
        q, k, v = operands
        out = in_large_pages(torch.empty(self.out, dtype=self.dtype))
        lse = in_large_pages(torch.empty(self.lse, dtype=self.wide))
        if self.swapped:
            out = out.transpose(1, 2)
        mask = {"mask": mask_place(facts[0])} if self.dense else {}
        self.enter(
            **self.rest, **mask, threads=torch.get_num_threads(),
            q=_place(q), k=_place(k), v=_place(v), out=_place(out), lse=lse.data_ptr(),
        )  # fmt: skip
        return out, lse


_calls: Remembered[Hashable, Prepared] = Remembered()


def key_of(
    operands: Sequence[Tensor], facts: Sequence[Tensor], integers: Sequence[int], scale: float | None, options: str
) -> Hashable | None:
    """What the way of a call depends on. None where it is not remembered: with biases, sinks, dropout, arrays."""
    if len(operands) != 3 or (facts and not options.endswith(";mask=Dense(T)")):
        return None
    q, k, v = operands
    mask = (facts[0].shape, facts[0].stride()) if facts else None
    return (
        options, scale, *integers, mask, q.dtype, q.device, q.shape, q.stride(),
        k.shape, k.stride(), v.shape, v.stride(),
    )  # fmt: skip


def find(key: Hashable | None) -> Prepared | None:
    """The call that was remembered under the key."""
    return _calls.get(key)


def remember(key: Hashable | None, plan: Plan, operands: Operands, out: Tensor, lse: Tensor) -> None:
    """Remember how the native kernel was called, where all that it needs is known from the key."""
    found = None if key is None else lasting(plan, operands)
    if found is None:
        return
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (operands.q, operands.k, operands.v)):
        return  # the kernel works on copies of these
    from .. import _native  # pyright: ignore[reportAttributeAccessIssue]  # there, since the kernel ran

    swapped = plan.problem.layout == "bshd"
    prepared = Prepared(
        _native.forward, *found, tuple(out.transpose(1, 2).shape if swapped else out.shape), tuple(lse.shape),
        swapped, out.dtype, lse.dtype, operands.mask.dense is not None,
    )  # fmt: skip
    _calls.keep(key, prepared)


def _place(x: Tensor) -> tuple[int, ...]:
    """Address and three strides of (B, H, S, D)."""
    return (x.data_ptr(), *x.stride()[:3])
