"""Limits of the compiled CPU kernel."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

from ...contract import KernelCard, Tiles, Unavailable
from ...problem import AttentionProblem
from .buffers import DTYPE_CODES

# Bytes of tile bits made at once: a predicate is evaluated for so many query rows, which are computed before the next.
BITS_BYTES = 1 << 24
# Pairs whose bits may be packed before a jax program runs: 64 MB.
_MOST_PACKED = 1 << 29


@cache
def _available() -> Unavailable | None:
    # Looking for the module takes longer than planning, and it does not come or go while a process runs.
    if find_spec("tilewise._native") is None:
        return Unavailable(
            "the compiled module is not installed", "install a C++17 compiler such as g++, then reinstall tilewise"
        )
    return None


def _packing(problem: AttentionProblem) -> tuple[str, ...]:
    """A jax program takes all tile bits as operands, so they are made before it runs; elsewhere a slab at a time."""
    if problem.family != "jax" or problem.mask.bits != "lazy":
        return ()
    if not problem.mask.known:
        return ("it packs a mask's bits before a jax program runs, and this mask's values are traced",)
    if problem.scores > _MOST_PACKED:
        return (
            f"it packs a mask's bits before a jax program runs, and {problem.scores} pairs would take too much memory",
        )
    return ()


def threads_of(problem: AttentionProblem) -> int:
    """Threads of a call: torch's own number for torch tensors, else 0 for the core's default."""
    return sys.modules["torch"].get_num_threads() if problem.family == "torch" and "torch" in sys.modules else 0


def sizes_of(problem: AttentionProblem) -> tuple[int, ...]:
    """Sizes in the order of `native/core/problem.h`."""
    p = problem
    return (p.batch, p.q_heads, p.kv_heads, p.q_len, p.k_len, p.head_dim, p.value_dim)


def _describe(problem: AttentionProblem) -> tuple[int, int, int, int, int, str]:
    # Asked only about problems that this kernel can run, so the module is there.
    from ... import _native  # pyright: ignore[reportAttributeAccessIssue]

    return _native.describe(
        DTYPE_CODES[problem.dtype], threads_of(problem), sizes_of(problem), problem.invariance == "row"
    )


def _tiles(problem: AttentionProblem) -> Tiles:
    queries, keys, split = _describe(problem)[:3]
    return Tiles(queries, keys, split)


def _workspace(problem: AttentionProblem, tiles: Tiles) -> int:
    """Each thread's tiles and probabilities, partial results of split keys, and tile bits of a predicate."""
    bits = problem.scores // 8 if problem.mask.bits == "lazy" else 0
    return _describe(problem)[3] + min(bits, BITS_BYTES)


def _arithmetic(problem: AttentionProblem) -> str:
    *_, parts, page = _describe(problem)
    return f"page {page}" + (f", each number as {parts} of bfloat16 (native/README.md)" if parts > 1 else "")


CARD = KernelCard(
    name="native",
    summary="compiled C++ for the CPU's own vector instructions",
    families=frozenset({"numpy", "torch", "jax"}),
    devices=frozenset({"cpu"}),
    dtypes=frozenset({"float32", "float64", "float16", "bfloat16"}),
    gradients=frozenset({"q", "k", "v", "bias", "table", "sinks"}),
    backward_families=frozenset({"numpy", "torch", "jax"}),
    tangents=frozenset({"float32", "float64", "float16", "bfloat16"}),
    max_dense_biases=4,
    row_invariant=True,
    further=_packing,
    rate=2e11,
    overhead=1e-5,
    available=_available,
    tiles=_tiles,
    workspace=_workspace,
    arithmetic=_arithmetic,
)
