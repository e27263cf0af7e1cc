"""What is measured: shapes of real use, each with the work that its visible pairs need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..contract import Dropout
from ..masks.algebra import Mask
from ..masks.lower import lower
from ..masks.materialize import materialize
from ..masks.primitives import causal, dense, documents, lengths, window
from ..masks.site import Site

Kind = Literal["forward", "decode", "training"]
DROPOUT = Dropout(0.1, seed=3)  # of the cases with options


def _booleans(case: Case) -> np.ndarray:
    return np.random.default_rng(5).random((1, 1, case.q_len, case.k_len)) < 0.75


# How each mask is written, and the operand that stands in it; written, so that another revision can read it, too.
MASKS: dict[str, tuple[str, Callable[[Case], np.ndarray] | None]] = {
    "full": ("None", None),
    "causal": ('causal("end")', None),
    "window": ('causal("end") & window(512, 0, "end")', None),
    "dense": ("dense(operand)", _booleans),
    "causal, dense": ('causal("end") & dense(operand)', _booleans),
    "packed": ('causal("end") & documents(operand, operand)', lambda case: case.ids()),
    "padding": ("lengths(k=operand)", lambda case: (np.linspace(0.24, 1.0, case.batch) * case.k_len).astype(np.int64)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        name: what people call it.
        batch, q_heads, kv_heads, q_len, k_len, dim: B, Hq, Hkv, Sq, Sk, D = Dv.
        mask: "full", "causal", "dense" (random booleans), "causal, dense", "packed" (16 sequences in one, causal in
            each), "padding" (62 % of the keys kept) or "window" (512, causal).
        kind: "forward", "decode" (judged by bytes read) or "training" (forward and backward).
        options: whether there is a bias (1, 1, Sq, Sk), with its gradient in training, and dropout.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    mask: str = "full"
    kind: Kind = "forward"
    options: bool = False

    def mask_of(self) -> Mask | None:
        """The mask as a value of ours; operands are NumPy arrays, always the same."""
        written, operand = MASKS[self.mask]
        names = {make.__name__: make for make in (causal, dense, documents, lengths, window)}
        return eval(written, {**names, "operand": operand(self) if operand else None})

    def starts(self) -> np.ndarray:
        """(17,) int32: where the packed sequences begin, and their sum; their lengths are as 1 : 3 : … : 31."""
        return (np.arange(17) ** 2 * self.q_len // 256).astype(np.int32)

    def ids(self) -> np.ndarray:
        """(Sq,) int64: which of the packed sequences a row is of."""
        return np.repeat(np.arange(16), np.diff(self.starts()))

    def pairs(self) -> float:
        """Visible pairs over batch and heads."""
        mask = self.mask_of()
        full = float(self.batch * self.q_heads * self.q_len * self.k_len)
        if mask is None:
            return full
        lowered = lower(mask, Site(self.batch, self.q_heads, self.q_len, self.k_len))
        if lowered.dense is not None:
            return full * float(np.mean(materialize(mask, self.q_len, self.k_len)))
        if lowered.ranges is None:
            return full
        seen = np.maximum(lowered.ranges.stops - lowered.ranges.starts, 0).sum(-1)
        return full * float(seen.mean()) / self.k_len

    def work(self, item_bytes: int) -> float:
        """Operations (4 D for each visible pair, 14 D with the backward pass); bytes of K and V for decode."""
        if self.kind == "decode":
            return 2.0 * self.batch * self.kv_heads * self.k_len * self.dim * item_bytes
        return (14.0 if self.kind == "training" else 4.0) * self.dim * self.pairs()

    def plain(self) -> Case:
        """The same without options and booleans: what those are held against."""
        return replace(self, mask=self.mask.removesuffix(", dense"), options=False)

    def smaller(self, factor: int) -> Case:
        """The same case with lengths divided, for a quick look."""
        rows = self.q_len if self.kind == "decode" else max(1, self.q_len // factor)
        keys = self.k_len if self.k_len < 128 else max(1, self.k_len // factor)
        return replace(self, q_len=rows, k_len=keys)


CASES = (
    Case("prefill D 64", 1, 8, 8, 4096, 4096, 64),
    Case("prefill D 128", 1, 8, 8, 4096, 4096, 128),
    Case("batch of short", 8, 16, 16, 512, 512, 64),
    Case("causal", 1, 8, 8, 4096, 4096, 64, "causal"),
    Case("causal, long", 1, 1, 1, 16384, 16384, 64, "causal"),
    Case("causal, grouped", 1, 32, 8, 2048, 2048, 128, "causal"),
    Case("boolean mask", 1, 8, 8, 2048, 2048, 64, "dense"),
    Case("key padding", 4, 8, 8, 2048, 2048, 64, "padding"),
    Case("window of 512", 1, 8, 8, 8192, 8192, 64, "window"),
    Case("packed, 16 lengths", 1, 8, 8, 8192, 8192, 64, "packed"),
    Case("cross-attention", 1, 8, 8, 4096, 77, 40),
    Case("decode", 1, 32, 8, 1, 8192, 128, kind="decode"),
    Case("decode, batch 16", 16, 32, 8, 1, 8192, 128, kind="decode"),
    Case("training", 1, 8, 8, 4096, 4096, 64, kind="training"),
    Case("training, causal", 1, 8, 8, 4096, 4096, 64, "causal", kind="training"),
    Case(
        "training, causal, mask + bias gradient + dropout", 1, 8, 8, 2048, 2048, 64, "causal, dense", "training", True
    ),
)


def arrays(case: Case) -> dict[str, Any]:
    """q (B, Hq, Sq, D), k and v (B, Hkv, Sk, D), bias (1, 1, Sq, Sk) with options, float32, always the same."""
    rng = np.random.default_rng(7)
    rows, keys = (case.batch, case.q_heads, case.q_len, case.dim), (case.batch, case.kv_heads, case.k_len, case.dim)
    shapes = {"q": rows, "k": keys, "v": keys, **({"bias": (1, 1, case.q_len, case.k_len)} if case.options else {})}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
