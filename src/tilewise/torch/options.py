"""All of a call that is no tensor, as one line of text; it tells an operator of torch what its tensors are.

operands=q,k,v,bias;mask=Causal("end",None);layout=bshd;softcap=30.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from torch import Tensor

from ..contract import Dropout, Operands, Tangents
from ..masks.algebra import Mask
from ..masks.lower import LoweredMask, lower
from ..masks.site import site_for
from ..problem import AttentionProblem, Gradient, Invariance
from ..validate import problem_of
from .spelling import has_predicate, read, spell


@dataclass(frozen=True, slots=True)
class Options:
    """What the text says.

    Attributes:
        names: what each tensor of the operands is: q, k, v, dense biases, table, sinks, in this order.
        mask: spelled; "" where there is none.
        layout, softcap, kernel, allow_quadratic, invariance: as of `tilewise.attention`.
        lse: whether a gradient of the log-sum-exp is given; in a backward pass where not, it is zero.
        p: of dropout. Its seed is the first two integers of the call, or its first fact where `seeded`.
        streamed: whether dropout's stream follows, as two words; else it is 0.
        placed: whether dropout numbers its pairs by six integers that follow: `first` as two words, and the strides.
    """

    names: tuple[Gradient, ...]
    mask: str = ""
    layout: str = "bhsd"
    softcap: float | None = None
    p: float = 0.0
    seeded: bool = False
    streamed: bool = False
    lse: bool = False
    placed: bool = False
    kernel: str | None = None
    allow_quadratic: bool = False
    invariance: Invariance = "batch"

    @property
    def foldable(self) -> bool:
        """Whether a call is the same in a larger batch: no fact tells batch rows apart, nor do random bits."""
        return not self.p and not has_predicate(self.mask)

    @property
    def _of_dropout(self) -> int:
        """How many integers dropout takes."""
        return 2 * (self.p > 0 and not self.seeded) + 2 * self.streamed + 6 * self.placed

    def site(self, operands: Sequence[Tensor]) -> tuple[int, int, int, int]:
        """B, Hq, Sq, Sk of (B, Hq, Sq, D) queries and (B, Hkv, Sk, D) keys."""
        q, k = operands[:2]
        return q.shape[0], q.shape[1], q.shape[2], k.shape[2]

    def lowered(
        self, sizes: tuple[int, int, int, int], like: Tensor, facts: Sequence[Tensor], integers: Sequence[int]
    ) -> LoweredMask:
        """The mask at its site."""
        mask = read(self.mask, facts[self.seeded :], integers[self._of_dropout :])
        held = [] if mask is None else mask.operands()
        # A mask on the host is fine wherever q is: it is lowered on the host and its facts follow q.
        places = [like, *held] if has_predicate(self.mask) else held
        return lower(mask, site_for("torch", like.device, sizes, places))

    def dropout(self, facts: Sequence[Tensor], integers: Sequence[int]) -> Dropout | None:
        """The dropout, its seed as two words."""
        if not self.p:
            return None
        given = iter(integers)
        seed = facts[0] if self.seeded else (next(given), next(given))
        stream = next(given) + (next(given) << 32) if self.streamed else 0
        if not self.placed:
            return Dropout(self.p, seed, stream)
        low, high, b, h, i, j = islice(given, 6)
        return Dropout(self.p, seed, stream, (low, high), (b, h, i, j))

    def operands(self, tensors: Sequence[Tensor], mask: LoweredMask, dropout: Dropout | None = None) -> Operands:
        """The tensors by name."""
        named = dict(zip(self.names, tensors, strict=False))
        dense = tuple(tensor for name, tensor in zip(self.names, tensors, strict=False) if name == "bias")
        q, k, v = tensors[:3]
        return Operands(q, k, v, mask, dense, named.get("table"), named.get("sinks"), dropout)

    def tangents(self, moving: Sequence[Tensor | None]) -> Tangents:
        """The operands' tangents by name; None for what does not move."""
        named = dict(zip(self.names, moving, strict=False))
        dense = tuple(tangent for name, tangent in zip(self.names, moving, strict=False) if name == "bias")
        q, k, v = moving[:3]
        return Tangents(q, k, v, dense, named.get("table"), named.get("sinks"))

    def problem(
        self, operands: Operands, scale: float | None, gradients: frozenset[Gradient] = frozenset()
    ) -> AttentionProblem:
        """The question that these operands ask."""
        return problem_of(
            "torch",
            operands,
            layout=self.layout,
            scale=scale,
            softcap=self.softcap,
            gradients=gradients,
            return_lse=self.lse,
            invariance=self.invariance,
        )


def write(
    names: str,
    mask: Mask | None,
    layout: str,
    softcap: float | None,
    dropout: Dropout | None,
    kernel: str | None,
    allow_quadratic: bool,
    invariance: Invariance = "batch",
) -> tuple[list[Tensor], list[int], str]:
    """The facts, the integers and the text of a call; `names` are those of its operands."""
    facts: list[Tensor] = []
    integers: list[int] = []
    text = "operands=" + names
    if dropout is not None:
        text += f";p={dropout.p}"
        if isinstance(dropout.seed, tuple):
            integers += dropout.seed
        else:
            facts.append(dropout.seed)
            text += ";seeded=1"
        if dropout.stream:
            integers += (dropout.stream & 0xFFFFFFFF, dropout.stream >> 32)
            text += ";streamed=1"
        if dropout.strides is not None:
            low, high = dropout.first
            integers += (low, high, *dropout.strides)
            text += ";placed=1"
    if mask is not None:
        text += ";mask=" + spell(mask, facts, integers)
    if layout != "bhsd":
        text += f";layout={layout}"
    if softcap is not None:
        text += f";softcap={softcap}"
    if kernel is not None:
        text += f";kernel={kernel}"
    if allow_quadratic:
        text += ";allow_quadratic=1"
    if invariance != "batch":
        text += f";invariance={invariance}"
    return facts, integers, text


_READERS: dict[str, Any] = {
    "softcap": float,
    "p": float,
    "seeded": bool,
    "streamed": bool,
    "lse": bool,
    "placed": bool,
    "allow_quadratic": bool,
}


@lru_cache(maxsize=1024)
def parse(text: str) -> Options:
    """The options of a text that `write` made."""
    given = dict(part.split("=", 1) for part in text.split(";"))
    names: Any = tuple(given.pop("operands").split(","))
    return Options(names, **{key: _READERS.get(key, str)(value) for key, value in given.items()})
