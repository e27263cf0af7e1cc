"""The question, without arrays: sizes, types, which facts the mask has, what must be differentiated.

An `AttentionProblem` is frozen and hashable, so a plan can be cached under it, and made without any array, so a
problem for a machine that is not here can be planned and explained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ACCUMULATOR = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# Calls with no more queries than this are limited by reading the keys, not by arithmetic.
DECODE_QUERIES = 16

Bits = Literal["dense", "lazy"]
Gradient = Literal["q", "k", "v", "bias", "table", "sinks"]
Invariance = Literal["batch", "row"]


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What a mask lowered to, without the arrays (see `masks/lower.py`).

    Attributes:
        text: the mask as it is written, for people.
        ranges: number R of key intervals per query row; 0 when there are no ranges.
        labels: whether query and key labels must agree.
        bits: None, "dense" (the caller's own boolean array, read in place) or "lazy" (evaluated tile by tile).
        heads: whether any fact differs between heads.
        batch: whether any fact differs between batch rows.
        known: whether the operands' values could be looked at when the mask was lowered.
        diagonal: c where the mask is exactly "key j is seen by query i iff j <= i + c"; else None.
    """

    text: str = "none"
    ranges: int = 0
    labels: bool = False
    bits: Bits | None = None
    heads: bool = False
    batch: bool = False
    known: bool = True
    diagonal: int | None = None

    @property
    def trivial(self) -> bool:
        """Whether every query sees every key."""
        return not (self.ranges or self.labels or self.bits)


@dataclass(frozen=True, slots=True)
class BiasFacts:
    """What the biases lowered to.

    Attributes:
        dense: the broadcast shapes (B', H', Sq', Sk') of dense ones; dtypes: theirs, in the same order.
        table: whether there is a table over j - i.
    """

    dense: tuple[tuple[int, int, int, int], ...] = ()
    table: bool = False
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One attention call: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), whatever the layout in memory.

    Attributes:
        family: "numpy", "torch" or "jax"; device: "cpu", "cuda", "tpu", …
        model: what the device is called ("NVIDIA H200"), "" where that is not known or does not matter.
        architecture: "sm_90", "gfx942", … of a GPU, "" where it is not known.
        dtype: of q, k, v and the output; `accumulator` is that of sums, lse and gradients' partial sums.
        layout: "bhsd" or "bshd", the order of axes in the caller's memory.
        scale: factor of the scores; softcap: cap c of c * tanh(s / c), or None.
        dropout: probability to drop, 0.0 for none.
        gradients: operands whose gradient is wanted.
        return_lse: whether the caller reads the log-sum-exp, or in a backward pass gives its gradient.
        traced: whether the arrays are tracers or fake tensors.
        invariance: "row" where a row of out and lse must have the same bits however many rows are computed together.
        deterministic: whether equal inputs must give equal bits, for any number of threads.
        part: whether this is a part of a larger call, whose results are to be added up: out and the gradients to q, k
            and v are then in the accumulator's dtype.
    """

    family: str
    device: str
    dtype: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    layout: str = "bhsd"
    scale: float = 1.0
    mask: MaskFacts = MaskFacts()
    bias: BiasFacts = BiasFacts()
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    gradients: frozenset[Gradient] = frozenset()
    return_lse: bool = False
    traced: bool = False
    invariance: Invariance = "batch"
    model: str = ""
    architecture: str = ""
    deterministic: bool = True
    part: bool = False

    @property
    def result(self) -> str:
        """Dtype of out and of the gradients to q, k and v."""
        return self.accumulator if self.part else self.dtype

    @property
    def accumulator(self) -> str:
        """Dtype of sums, lse and partial gradients: float64 for float64, else float32."""
        return ACCUMULATOR[self.dtype]

    @property
    def group(self) -> int:
        """Query heads per kv head; query head h reads kv head h // group."""
        return self.q_heads // self.kv_heads if self.kv_heads else 1

    @property
    def scores(self) -> int:
        """Number of (query, key) pairs over batch and heads, masked or not."""
        return self.batch * self.q_heads * self.q_len * self.k_len

    def flops(self, visible: float = 1.0) -> float:
        """Multiplications and additions of both products, for the share `visible` of the scores."""
        return 2.0 * self.scores * visible * (self.head_dim + self.value_dim)

    def io_bytes(self) -> int:
        """Bytes of q, k, v, out and lse, each counted once."""
        rows, keys = self.batch * self.q_heads * self.q_len, self.batch * self.kv_heads * self.k_len
        wide = rows * (self.head_dim + self.value_dim) + keys * (self.head_dim + self.value_dim)
        return wide * ITEM_BYTES[self.dtype] + rows * ITEM_BYTES[self.accumulator]


def kind_of(problem: AttentionProblem) -> str:
    """The class of a problem by what it asks for: "full", "causal", "ranges", "labels", "bits", "decode", plus options.

    Options follow in a fixed order: "causal+table+softcap".
    """
    mask = problem.mask
    if mask.bits or mask.labels:
        kind = "bits" if mask.bits else "labels"
    elif mask.diagonal is not None:
        kind = "causal"
    else:
        kind = "ranges" if mask.ranges else "full"
    kind = "decode" if problem.q_len <= DECODE_QUERIES and kind in ("full", "causal", "ranges") else kind
    options = {
        "bias": bool(problem.bias.dense),
        "table": problem.bias.table,
        "softcap": problem.softcap is not None,
        "sinks": problem.sinks,
        "dropout": bool(problem.dropout),
    }
    return "+".join([kind, *(name for name, given in options.items() if given)])
