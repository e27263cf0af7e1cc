"""Operands taken apart into the tensors that autograd and functorch must see, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..contract import Dropout, Operands
from ..masks.lower import LoweredMask
from ..masks.ranges import Ranges
from ..problem import Gradient


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """The mask and dropout of a call; their tensors, if any, are replaced by those given to `rebuild`.

    Facts of a mask are NumPy arrays mostly; they are tensors off the CPU and under functorch.
    """

    mask: LoweredMask
    dropout: Dropout | None

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of `rebuild`."""
        found: list[Tensor] = []

        def look(value: Tensor) -> Tensor:
            found.append(value)
            return value

        self._map(look)
        return found

    def rebuild(self, tensors: Sequence[Tensor]) -> Facts:
        """The same facts with other tensors."""
        rest = iter(tensors)
        return self._map(lambda _: next(rest))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Facts:
        def maybe(value):
            return change(value) if isinstance(value, Tensor) else value

        mask, dropout = self.mask, self.dropout
        ranges = Ranges(maybe(mask.ranges.starts), maybe(mask.ranges.stops)) if mask.ranges is not None else None
        lazy = mask.lazy
        if lazy is not None:
            rest = iter([maybe(operand) for operand in lazy.operands()])
            lazy = lazy.replace_operands(lambda: next(rest))
        mask = replace(
            mask,
            ranges=ranges,
            q_labels=maybe(mask.q_labels),
            k_labels=maybe(mask.k_labels),
            dense=maybe(mask.dense),
            lazy=lazy,
        )
        if dropout is not None and not isinstance(dropout.seed, tuple):
            dropout = replace(dropout, seed=maybe(dropout.seed))
        return Facts(mask, dropout)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """How a call's operands lie in a flat list: q, k, v, dense biases, table, sinks, then the tensors of the facts.

    Attributes:
        names: what each differentiable operand is called in `AttentionProblem.gradients`.
        facts: the mask and dropout.
    """

    names: tuple[Gradient, ...]
    facts: Facts

    @classmethod
    def of(cls, operands: Operands) -> tuple[Parts, list[Tensor]]:
        """The layout of the list, and the list."""
        named: list[tuple[Gradient, Tensor | None]] = [("q", operands.q), ("k", operands.k), ("v", operands.v)]
        named += [("bias", array) for array in operands.dense]
        named += [("table", operands.table), ("sinks", operands.sinks)]
        given = [(name, tensor) for name, tensor in named if tensor is not None]
        facts = Facts(operands.mask, operands.dropout)
        # A bias that came as a NumPy array beside tensors is a constant of q's device.
        tensors = [torch.as_tensor(tensor, device=operands.q.device) for _, tensor in given]
        return cls(tuple(name for name, _ in given), facts), tensors + facts.tensors()

    @property
    def count(self) -> int:
        """Number of differentiable operands."""
        return len(self.names)

    def operands(self, tensors: Sequence[Tensor]) -> Operands:
        """The operands, from a list of the same layout (longer lists are read up to where the facts end)."""
        facts = self.facts_of(tensors)
        by_name = dict(zip(self.names, tensors, strict=False))
        dense = tuple(tensor for name, tensor in zip(self.names, tensors, strict=False) if name == "bias")
        q, k, v = tensors[:3]
        return Operands(q, k, v, facts.mask, dense, by_name.get("table"), by_name.get("sinks"), facts.dropout)

    def facts_of(self, tensors: Sequence[Tensor]) -> Facts:
        """The mask and dropout with the tensors of such a list."""
        return self.facts.rebuild(tensors[self.count :])
