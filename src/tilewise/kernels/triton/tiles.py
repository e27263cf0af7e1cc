"""Tile sizes by pass, architecture, width and element size: a table, so that no call ever waits for a tuner.

Sizes were chosen by compiling: on sm_80, sm_89, sm_90, sm_100 and gfx942 shared memory suffices, and no register spills
but where the compile tests, which hold entries to that, record it. They were not yet timed on a GPU. A table that was
measured may be named instead (see `tuned.py`).
"""

from __future__ import annotations

from typing import Literal

from ...problem import AttentionProblem, kind_of
from .table import HALF, family_of, single
from .tuned import Blocks, Key, tuned_blocks

Pass = Literal["forward", "decode", "d_kv", "d_q", "d_qkv", "d_bias"]

# The ways of the backward pass: two passes whose sums have a fixed order, or one that adds to d_q atomically.
SPLIT, ATOMICS = "split", "atomics"

# The interpreter computes tile by tile in NumPy: small enough for several tiles an axis in tests.
_INTERPRETER = Blocks(32, 32, 4, 1)


def blocks_for(purpose: Pass, arch: str, problem: AttentionProblem) -> Blocks:
    """The tile sizes of a pass. `arch` is "sm_90" and the like, "gfx942" and the like, or "interpreter".

    Raises:
        ValueError: beginning with "TILEWISE_TILES:", where the file that it names holds no tile sizes.
    """
    width = max(64, padded_width(problem))
    tuned = tuned_blocks(arch, Key(purpose, kind_of(problem), problem.dtype, width))
    if tuned is not None:
        return tuned
    if arch == "interpreter":
        return _INTERPRETER
    if problem.dtype == "float32":
        return single(arch, width)
    blocks = HALF[purpose, family_of(arch)][width][_burden(problem)]
    # The pipeline holds tiles of arrays with an element for each pair, too: shared memory is counted for two of them.
    arrays = _pair_arrays(problem)
    return blocks._replace(stages=1 if arrays > 2 else max(1, blocks.stages - (arrays > 1)))


def careful(blocks: Blocks) -> Blocks:
    """How the kernels for what is not finite run over the same tiles: of these they take a few rows at a time."""
    return blocks._replace(stages=1)


def keys_and_values_apart(problem: AttentionProblem) -> bool:
    """Whether the gradients of keys and values are passes of their own.

    Where both accumulators do not fit the registers beside all else, recomputing one product more spills nothing.
    """
    width = padded_width(problem)
    return width >= 256 or (width >= 128 and _burden(problem) > 0)


def _pair_arrays(problem: AttentionProblem) -> int:
    """Arrays with an element for each pair, or read like such: dense masks and biases, tables."""
    return len(problem.bias.dense) + problem.bias.table + (problem.mask.bits is not None)


def _burden(problem: AttentionProblem) -> int:
    """What wants registers beside the scores: 0 nothing, 1 an array of pairs, 2 several, or dropout's generator."""
    return 2 if problem.dropout else min(2, _pair_arrays(problem))


# Queries of all heads of a group that stand in one tile, and keys of a split: fixed, so that no row's bits depend on
# how many others there are. The interpreter's split is small enough for several in tests.
_MOST_PACKED = 64
# Numbers of such a tile in float32, which wants four times the registers and twice the shared memory of half precision.
_MOST_PACKED_SINGLE = 64 * 64
_SPLIT = {"interpreter": 32}
_USUAL_SPLIT = 512


def decode_split(arch: str) -> int:
    """Keys that one program of a decoding call reads."""
    return _SPLIT.get(arch, _USUAL_SPLIT)


def most_packed(problem: AttentionProblem) -> int:
    """Rows of a group that one tile takes: 64, in float32 fewer where they are wide, but the 16 that products take."""
    if problem.dtype != "float32":
        return _MOST_PACKED
    return max(16, min(_MOST_PACKED, _MOST_PACKED_SINGLE // padded_width(problem)))


def packs(problem: AttentionProblem) -> bool:
    """Whether the queries of a group fit one tile, and no predicate has to be evaluated for them."""
    return problem.group * problem.q_len <= most_packed(problem) and problem.mask.bits != "lazy"


def packed_rows(problem: AttentionProblem) -> int:
    """Rows of the tile for the queries of a group that packs."""
    return rows_together(problem.group * problem.q_len, most_packed(problem))


def rows_together(rows: int, most: int) -> int:
    """Rows of a tile for so many of a group, which take several tiles where they are more than `most`."""
    return min(most, max(16, 1 << (max(1, rows) - 1).bit_length()))


def padded_width(problem: AttentionProblem) -> int:
    """The larger of D and Dv as a power of two, which rows are padded to by masks; matrix instructions want 16."""
    return max(16, 1 << (max(problem.head_dim, problem.value_dim) - 1).bit_length())
