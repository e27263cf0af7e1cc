"""Combinations for which torch's operators are known to be wrong or to crash, each with where it was reported.

A row holds for a range of versions. A version that is not known, of another machine's torch say, counts as inside.
`tests/kernels/aten/fault_check.py` runs each row's reproducer and prints which faults are still there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ...problem import ITEM_BYTES, AttentionProblem

Version = tuple[int, ...]
Passes = Literal["forward", "backward", "both"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One known fault.

    Attributes:
        issue: where it was reported; reproducer: name of its function in the checking script.
        way: of the operators ("cpu", "cudnn", "flash", "efficient"), "*" for all of CUDA; passes: which are affected.
        sentence: why the planner refuses.
        concerns: whether a problem meets it.
        torch, cudnn: first version affected and first version repaired; None is open. cuDNN's is (major, minor).
        architectures: prefixes of GPU architectures; empty is all.
    """

    issue: str
    reproducer: str
    way: str
    passes: Passes
    sentence: str
    concerns: Callable[[AttentionProblem], bool]
    torch: tuple[Version | None, Version | None] = (None, None)
    cudnn: tuple[Version | None, Version | None] = (None, None)
    architectures: tuple[str, ...] = ()

    def holds(self, way: str, step: Literal["forward", "backward"], problem: AttentionProblem) -> bool:
        """Whether a pass of a problem would meet it in this process."""
        return (
            self.way in ((way, "*") if way != "cpu" else (way,))
            and self.passes in (step, "both")
            and self.reaches(problem.architecture)
            and self.concerns(problem)
        )

    def reaches(self, architecture: str) -> bool:
        """Whether it is in the torch and cuDNN of this process on an architecture; "" is an unknown one."""
        return (
            (not self.architectures or not architecture or architecture.startswith(self.architectures))
            and _inside(torch_version(), self.torch)
            and (self.way != "cudnn" or _inside(cudnn_version(), self.cudnn))
        )


def reasons(way: str, step: Literal["forward", "backward"], problem: AttentionProblem) -> tuple[str, ...]:
    """A sentence for every fault that a pass of a problem would meet."""
    return tuple(f"{fault.sentence} ({fault.issue})" for fault in FAULTS if fault.holds(way, step, problem))


def torch_version() -> Version | None:
    """(major, minor) of the torch in this process; None where none is loaded."""
    torch = sys.modules.get("torch")
    return None if torch is None else tuple(int(part) for part in torch.__version__.split(".")[:2])


def cudnn_version() -> Version | None:
    """(major, minor) of cuDNN; None where torch has none."""
    torch = sys.modules.get("torch")
    number = torch.backends.cudnn.version() if torch is not None else None
    return None if number is None else (number // 10_000, number % 10_000 // 100)


def _inside(version: Version | None, bounds: tuple[Version | None, Version | None]) -> bool:
    first, repaired = bounds
    if version is None:
        return True
    return (first is None or version >= first) and (repaired is None or version < repaired)


def _biased(problem: AttentionProblem) -> bool:
    return bool(problem.bias.dense)


def _bias_dtype_differs(problem: AttentionProblem) -> bool:
    return any(dtype != problem.dtype for dtype in problem.bias.dtypes)


def _half_tile_left(problem: AttentionProblem) -> bool:
    return _biased(problem) and (problem.q_len % 128 == 64 or problem.k_len % 128 == 64)


def _half(problem: AttentionProblem) -> bool:
    return ITEM_BYTES[problem.dtype] == 2


# What depends on memory layout or on values is no row: strides that the operators misread (pytorch#187506) are copied
# by `calls.py`, and results that are not finite are computed again by another kernel.
FAULTS = (
    Fault(
        "pytorch#196678", "cudnn_half_tile", "cudnn", "backward",
        "cuDNN's backward gives NaN with a bias where a length leaves half of a tile of 128",
        _half_tile_left, torch=((2, 11), None), architectures=("sm_90",),
    ),
    Fault(
        "pytorch#191612", "cudnn_bias_dtype", "cudnn", "both",
        "cuDNN reads a bias of another dtype as if it had q's",
        _bias_dtype_differs,
    ),
    Fault(
        "pytorch#193893", "cudnn_few_heads", "cudnn", "both",
        "cuDNN was seen to be wrong on this architecture with fewer than 8 key heads",
        lambda problem: problem.group > 1 and problem.kv_heads < 8, architectures=("sm_10",),
    ),
    Fault(
        "NVIDIA/cudnn-frontend#1072", "cudnn_one_query", "cudnn", "backward",
        "cuDNN's backward gives NaN for a single query whose log-sum-exp is very negative",
        lambda problem: problem.q_len == 1, architectures=("sm_90",),
    ),
    Fault(
        "pytorch#187225", "efficient_far_bias", "efficient", "both",
        "the memory-efficient kernel addresses a bias with 32 bits, and its rows reach further",
        lambda problem: _biased(problem) and problem.q_len * problem.k_len > 2**31,
    ),
    Fault(
        "pytorch#162588", "efficient_long", "efficient", "both",
        "the memory-efficient kernel was seen to be wrong beyond 65536 queries or keys",
        lambda problem: max(problem.q_len, problem.k_len) > 2**16,
    ),
    Fault(
        "pytorch#142228", "many_heads", "*", "both",
        "it launches a block for each batch row and head, of which a grid holds 65535",
        lambda problem: problem.batch * problem.q_heads > 65_535,
    ),
    Fault(
        "pytorch#141219", "cpu_no_keys", "cpu", "both",
        "torch's CPU kernel divides by zero where there are no queries or no keys",
        lambda problem: not problem.scores,
    ),
    Fault(
        "seen in torch 2.13", "cpu_half_lse", "cpu", "both",
        "torch's CPU kernel gives the log-sum-exp of half precision with a tenth of the digits that are promised",
        _half,
    ),
)  # fmt: skip
