"""Limits of the Triton kernels."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from ...contract import KernelCard, Tiles, Unavailable
from ...problem import AttentionProblem
from .table import family_of
from .tiles import ATOMICS, SPLIT, blocks_for, decode_split, packed_rows, packs, padded_width

# Positions are 32-bit in the kernels, and the last tile reaches a little beyond the last key.
_MOST_KEYS = 2**31 - 1024
_WIDEST = 512
# In float32 and wider than this, the four tiles of a step of the backward pass, of as few rows as products take, need
# 128 KiB of shared memory. AMD's compiler keeps them in registers.
_WIDEST_SINGLE_BACKWARD = 256


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _available() -> Unavailable | None:
    if find_spec("triton") is None:
        return Unavailable("Triton is not installed", "install tilewise[torch] on Linux, or triton beside torch")
    torch = sys.modules.get("torch")
    if torch is not None and not _interpreted() and not torch.cuda.is_available():
        return Unavailable(
            "torch sees no GPU", "run on a machine with one, or set TRITON_INTERPRET=1 to try the kernels slowly"
        )
    return None


def _further(problem: AttentionProblem) -> tuple[str, ...]:
    """Widths beyond the table, more queries than positions reach, the CPU without the interpreter."""
    widest = max(problem.head_dim, problem.value_dim)
    reasons = (
        (
            problem.device == "cpu" and not _interpreted(),
            "on the CPU it runs only interpreted, with TRITON_INTERPRET=1",
        ),
        (widest > _WIDEST, f"it takes head dimensions up to {_WIDEST}, not {widest}"),
        (problem.q_len > _MOST_KEYS, f"it takes at most {_MOST_KEYS} queries and there are {problem.q_len}"),
    )
    return tuple(reason for holds, reason in reasons if holds)


def _further_backward(problem: AttentionProblem) -> tuple[str, ...]:
    """Wide float32 on NVIDIA's cards with 99 KiB of shared memory a block."""
    widest, arch = max(problem.head_dim, problem.value_dim), problem.architecture
    small = arch.startswith("sm_") and family_of(arch) == "small"
    if not small or problem.dtype != "float32" or widest <= _WIDEST_SINGLE_BACKWARD:
        return ()
    return (f"on {arch} its float32 backward takes head dimensions up to {_WIDEST_SINGLE_BACKWARD}, not {widest}",)


def _backward_ways(problem: AttentionProblem) -> tuple[str, ...]:
    """One pass in no fixed order where that is allowed, of fewer products and so the better guess; else two passes."""
    return (SPLIT,) if problem.deterministic else (ATOMICS, SPLIT)


def _tiles(problem: AttentionProblem) -> Tiles:
    arch = "interpreter" if problem.device == "cpu" else problem.architecture or "sm_90"
    if problem.scores and packs(problem) and problem.k_len > decode_split(arch):
        return Tiles(packed_rows(problem), blocks_for("decode", arch, problem).keys, decode_split(arch))
    blocks = blocks_for("forward", arch, problem)
    return Tiles(blocks.queries, blocks.keys)


def _workspace(problem: AttentionProblem, tiles: Tiles) -> int:
    """Bounds of ranges, a byte for each program, and lists of tiles: at most 64 MiB of those at once, and 32 MiB of
    evaluated predicates."""
    leading = (problem.batch if problem.mask.batch else 1) * (problem.q_heads if problem.mask.heads else 1)
    bounds = 8 * leading * problem.q_len * problem.mask.ranges
    masked = problem.mask.ranges or problem.mask.labels or problem.mask.bits
    met = -(-problem.q_len // max(1, tiles.queries)) * (-(-problem.k_len // max(1, tiles.keys)) + 2)
    lists = min(4 * leading * met, 1 << 26) if masked else 0
    if tiles.split:
        states = problem.batch * problem.kv_heads * -(-problem.k_len // tiles.split) * tiles.queries
        return bounds + 4 * states * (padded_width(problem) + 2)
    flags = problem.batch * problem.q_heads * -(-problem.q_len // max(1, tiles.queries))
    return bounds + lists + flags + (1 << 25 if problem.mask.bits == "lazy" else 0)


CARD = KernelCard(
    name="triton",
    summary="Triton kernels for NVIDIA and AMD GPUs, from torch",
    families=frozenset({"torch"}),
    devices=frozenset({"cuda", "cpu"}),
    dtypes=frozenset({"float32", "float16", "bfloat16"}),
    gradients=frozenset({"q", "k", "v", "bias", "table", "sinks"}),
    max_key_length=_MOST_KEYS,
    # Held to the oracle by Triton's interpreter and compiled for five architectures: unasked, it runs where a GPU run
    # has checked and timed it, which that device's measured table says.
    automatic=frozenset({"cuda"}),
    needs_table=True,
    further=_further,
    further_backward=_further_backward,
    backward_ways=_backward_ways,
    unordered=frozenset({ATOMICS}),
    rate=3e14,
    overhead=5e-5,
    available=_available,
    tiles=_tiles,
    workspace=_workspace,
)
