"""What a kernel promises (`KernelCard`), what the planner answers (`Plan`), and what a kernel is handed (`Operands`).

A kernel is a folder `kernels/<name>/` with

- `card.py`: its `KernelCard`, importing no framework and no compiled module;
- `forward.py`: `forward(plan, operands) -> (out, lse)`;
- `backward.py`, where it has one: `backward(plan, operands, out, lse, d_out, d_lse) -> Gradients`;
- `tangent.py`, where its card has `tangents`: `tangent(plan, operands, out, lse, moving) -> (d_out, d_lse)`.

`out` is (B, Hq, Sq, Dv) in q's dtype, strided as the plan's layout says; `lse` is (B, Hq, Sq) in the accumulator's
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._arrays import gpu_is_here
from .problem import AttentionProblem, Gradient

if TYPE_CHECKING:
    from .masks.lower import LoweredMask

Array = Any


@dataclass(frozen=True, slots=True)
class Dropout:
    """Counter-based dropout on the probabilities: Philox4x32-10 (Salmon et al., 2011).

    The pair (b, h, i, j) is kept iff the first word of philox(key=seed, counter=(n, stream)) is at least
    ceil(p * 2^32), where n = ((b * Hq + h) * Sq + i) * Sk + j; kept probabilities are divided by 1 - p. The same bits
    result from every kernel and framework.

    A call that is a part of a larger one (a shard of a sequence, some of the heads) draws the larger one's bits where
    `first` and `strides` say how its own pairs are numbered there: n = first + (b, h, i, j) . strides modulo 2^64.

    Attributes:
        p: probability to drop, in [0, 1].
        seed: 64-bit integer, or an integer array of one element (a tracer too), or of two uint32 words (low, high), or
            a jax key: one of two words (threefry) is its own words, one of another generator draws two.
        stream: 64-bit integer that tells apart several uses of one seed (layers, say).
        first: number of the call's first pair, an integer or, as `seed`, an array; only with `strides`.
        strides: what the next batch row, head, query and key add to a pair's number; None for a call of its own.
    """

    p: float
    seed: Any = 0
    stream: int = 0
    first: Any = 0
    strides: tuple[int, int, int, int] | None = None

    @property
    def threshold(self) -> int:
        """Smallest first word that is kept: ceil(p * 2^32), so 0 keeps all and 2^32 drops all."""
        return -int(-self.p * 2**32 // 1)

    @property
    def inverse_keep(self) -> float:
        """Factor of a kept probability, 1 / (1 - p); 0 where nothing is kept."""
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0

    def numbering(self, heads: int, q_len: int, k_len: int) -> tuple[Any, tuple[int, int, int, int]]:
        """The first pair's number as words (low, high), and the strides, in a call of Hq heads, Sq queries, Sk keys.

        `first` has been translated, as `seed` has.
        """
        if self.strides is None:
            return (0, 0), (heads * q_len * k_len, q_len * k_len, k_len, 1)
        return self.first, self.strides


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The arrays of one call, all of one framework.

    Attributes:
        q: (B, Hq, Sq, D); k: (B, Hkv, Sk, D); v: (B, Hkv, Sk, Dv). Views, never copies, whatever the caller's layout.
        mask: the lowered mask (NumPy arrays where the values could be looked at, else arrays of q's framework).
        dense: biases added to the scores, each 4-D with every axis either 1 or full.
        table: (B or 1, Hq or 1, Sq + Sk - 1) added as table[b, h, j - i + Sq - 1], accumulator's dtype, or None.
        sinks: (Hq,) exponents added to the denominator, accumulator's dtype, or None.
        dropout: None where p is 0. Its seed is then (low, high): two ints, or an array of two uint32-valued words;
            so is `first` where there are strides.
    """

    q: Array
    k: Array
    v: Array
    mask: LoweredMask
    dense: tuple[Array, ...] = ()
    table: Array | None = None
    sinks: Array | None = None
    dropout: Dropout | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """Gradients in the shapes and dtypes of the operands they belong to; None where not wanted."""

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    dense: tuple[Array | None, ...] = ()
    table: Array | None = None
    sinks: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tangents:
    """Tangents in the shapes and dtypes of the operands they belong to; None where an operand does not move."""

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    dense: tuple[Array | None, ...] = ()
    table: Array | None = None
    sinks: Array | None = None


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why a kernel cannot run in this process at all, and what would cure it."""

    reason: str
    cure: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of queries and of keys that a kernel handles at once, and the fixed number of keys in a split (0: none)."""

    queries: int
    keys: int
    split: int = 0


def _whole(problem: AttentionProblem) -> Tiles:
    return Tiles(problem.q_len, problem.k_len)


def _nothing(problem: AttentionProblem) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class KernelCard:
    """A kernel's limits as plain data.

    Attributes:
        name: the name of its folder and of `kernel=`; summary: its role in a few words.
        families, devices, dtypes: what it runs on; "*" in `devices` is any.
        traced: whether it runs under jax tracing and torch fake tensors.
        gradients: operands its own backward differentiates; empty when it has no backward.
        backward_families: frameworks whose derivatives use its backward; None is all in `families`.
        tangents: dtypes of which it computes the tangents of out and lse too, along tangents of any operands.
        max_dense_biases, max_key_length: largest counts it takes; None is unbounded.
        further: limits that are no plain set, as a function from the problem to reasons; further_backward: likewise,
            of the backward pass alone.
        ways, backward_ways: of a kernel that has several ways to run, those that fit the problem, best first as far as
            is known without a measured table.
        unordered: the ways of its backward whose sums have no fixed order, so that equal calls may differ in their last
            bits; only problems that are not `deterministic` have them.
        linear_memory: whether its memory is linear in Sq + Sk.
        row_invariant: whether it can give a row the same bits however many rows it computes together.
        automatic: devices on which the planner may choose it unasked; "*" is any.
        needs_table: whether it may be chosen unasked only where the device's measured table holds it.
        finite_only: whether its results are right only where they are finite, so that it hands a call that gave another
            result to the plan's `careful` kernel.
        rate: a rough number of operations per second, for ranking only; overhead: seconds per call, likewise.
        available: asked late, answers None when the kernel can run in this process. A problem on a GPU that is not here
            is planned for a machine that has one, and this is not asked.
        tiles: the tile sizes for a problem.
        workspace: bytes needed beyond inputs and outputs for a problem and its tiles.
        arithmetic: how its forward pass multiplies on this machine, for a reader; "" where there is one way.
    """

    name: str
    summary: str
    families: frozenset[str]
    devices: frozenset[str]
    dtypes: frozenset[str]
    traced: bool = True
    gradients: frozenset[Gradient] = frozenset()
    backward_families: frozenset[str] | None = None
    tangents: frozenset[str] = frozenset()
    max_dense_biases: int | None = None
    max_key_length: int | None = None
    further: Callable[[AttentionProblem], tuple[str, ...]] = field(default=_nothing, compare=False)
    further_backward: Callable[[AttentionProblem], tuple[str, ...]] = field(default=_nothing, compare=False)
    ways: Callable[[AttentionProblem], tuple[str, ...]] = field(default=_nothing, compare=False)
    backward_ways: Callable[[AttentionProblem], tuple[str, ...]] = field(default=_nothing, compare=False)
    unordered: frozenset[str] = frozenset()
    linear_memory: bool = True
    row_invariant: bool = False
    automatic: frozenset[str] = frozenset({"*"})
    needs_table: bool = False
    finite_only: bool = False
    rate: float = 1e9
    overhead: float = 0.0
    available: Callable[[], Unavailable | None] = field(default=lambda: None, compare=False)
    tiles: Callable[[AttentionProblem], Tiles] = field(default=_whole, compare=False)
    workspace: Callable[[AttentionProblem, Tiles], int] = field(default=lambda problem, tiles: 0, compare=False)
    arithmetic: Callable[[AttentionProblem], str] = field(default=lambda problem: "", compare=False)

    def refuse(self, problem: AttentionProblem) -> tuple[str, ...]:
        """Every reason, a sentence each, why this kernel cannot compute the forward of `problem`; empty when it can."""
        return tuple(reason for reason in self._reasons(problem) if reason)

    def _reasons(self, problem: AttentionProblem) -> list[str | None]:
        missing = self.available() if problem.device != "cuda" or gpu_is_here() else None
        biases = len(problem.bias.dense)
        return [
            f"{missing.reason} ({missing.cure})" if missing else None,
            _outside("arrays", problem.family, self.families),
            _outside("device", problem.device, self.devices) if "*" not in self.devices else None,
            _outside("dtype", problem.dtype, self.dtypes),
            "it needs the arrays' values and these are traced" if problem.traced and not self.traced else None,
            f"it adds at most {self.max_dense_biases} dense biases and there are {biases}"
            if self.max_dense_biases is not None and biases > self.max_dense_biases
            else None,
            f"it takes at most {self.max_key_length} keys and there are {problem.k_len}"
            if self.max_key_length is not None and problem.k_len > self.max_key_length
            else None,
            "with it, a row's bits depend on how many rows are computed together"
            if problem.invariance == "row" and not self.row_invariant
            else None,
            *self.further(problem),
        ]

    def refuse_backward(self, problem: AttentionProblem) -> tuple[str, ...]:
        """Every reason why this kernel cannot compute the gradients that `problem` wants; empty when it can."""
        if not self.gradients:
            return (*self.refuse(problem), "it has no backward")
        missing = [f"it has no gradient to {name}" for name in sorted(problem.gradients - self.gradients)]
        if self.backward_families is not None and problem.family not in self.backward_families:
            missing.append(f"derivatives of {problem.family} arrays do not use its backward")
        return (*self.refuse(problem), *missing, *self.further_backward(problem))

    def unasked(self, device: str) -> bool:
        """Whether the planner may choose it on a device without being asked, as far as the card alone says."""
        return "*" in self.automatic or device in self.automatic

    def cost(self, problem: AttentionProblem) -> float:
        """Estimated seconds, for ranking kernels against each other; not a promise."""
        return self.overhead + problem.flops() / self.rate


def _outside(what: str, got: str, allowed: frozenset[str]) -> str | None:
    return None if got in allowed else f"it takes {what} {' or '.join(sorted(allowed))}, not {got}"


@dataclass(frozen=True)
class Plan:
    """The planner's answer: which kernel runs the problem, in which tiles, and why no other does.

    Attributes:
        problem: the question.
        kernel: name of the kernel of the forward pass.
        backward: name of the kernel of the backward pass, or None when no gradient is wanted.
        tangent: name of the kernel of forward-mode derivatives.
        way, backward_way: which of a kernel's several ways each pass runs; "" where it has but one.
        careful: the kernel that computes a call again whose results are not finite; None where none is needed. It is
            handed this same plan, whose `tiles` and `way` are not its own.
        tiles: tile sizes of the forward kernel.
        workspace: bytes promised beyond inputs and outputs, forward.
        refusals: for every other kernel, its reasons.
        forced: whether the kernel was asked for by name.
        details: facts that only `explain` looks up, in the order to print them.
    """

    problem: AttentionProblem
    kernel: str
    backward: str | None
    tiles: Tiles
    workspace: int
    refusals: Mapping[str, tuple[str, ...]]
    forced: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    way: str = ""
    backward_way: str = ""
    careful: str | None = None
    tangent: str = "portable"

    def __str__(self) -> str:
        from .plan.explain import table  # printing is asked for rarely; planning should not pay for it

        return table(self)
