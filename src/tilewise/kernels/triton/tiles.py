"""Tile sizes by pass, architecture, width and element size: a table, so that no call ever waits for a tuner.

Sizes were chosen so that nothing spills and shared memory suffices; the compile tests hold every entry to that.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ...problem import AttentionProblem

Pass = Literal["forward", "decode", "d_kv", "d_q", "d_qkv", "d_bias"]

# The ways of the backward pass: two passes whose sums have a fixed order, or one that adds to d_q atomically.
SPLIT, ATOMICS = "split", "atomics"


class Blocks(NamedTuple):
    """Rows of queries and of keys in a tile, warps in a program, stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# Width (the larger of the padded D and Dv) -> blocks. "large" are the datacentre parts with more than 160 KiB of shared
# memory a block (sm_80, 90, 100); "small" all others, among them the consumer parts with 99 KiB and AMD with 64 KiB.
_HALF: dict[tuple[Pass, str], dict[int, Blocks]] = {
    ("forward", "large"): {
        64: Blocks(128, 128, 8, 3),
        128: Blocks(128, 64, 8, 3),
        256: Blocks(128, 64, 8, 2),
        512: Blocks(32, 32, 8, 2),
    },
    ("forward", "small"): {
        64: Blocks(128, 64, 4, 2),
        128: Blocks(64, 64, 4, 2),
        256: Blocks(64, 32, 4, 1),
        512: Blocks(32, 16, 4, 1),
    },
    # Rows of queries are those of a group; see `packed_rows`.
    ("decode", "large"): {
        64: Blocks(64, 64, 4, 3),
        128: Blocks(64, 64, 4, 3),
        256: Blocks(64, 32, 4, 2),
        512: Blocks(64, 16, 8, 2),
    },
    ("decode", "small"): {
        64: Blocks(64, 64, 4, 2),
        128: Blocks(64, 32, 4, 2),
        256: Blocks(64, 16, 4, 1),
        512: Blocks(64, 16, 8, 1),
    },
    ("d_kv", "large"): {
        64: Blocks(64, 128, 8, 2),
        128: Blocks(64, 128, 8, 2),
        256: Blocks(32, 128, 8, 2),
        512: Blocks(16, 32, 8, 1),
    },
    ("d_kv", "small"): {
        64: Blocks(32, 64, 4, 1),
        128: Blocks(32, 64, 4, 1),
        256: Blocks(16, 32, 4, 1),
        512: Blocks(16, 16, 4, 1),
    },
    ("d_q", "large"): {
        64: Blocks(128, 64, 8, 2),
        128: Blocks(128, 64, 8, 2),
        256: Blocks(128, 32, 8, 2),
        512: Blocks(32, 16, 8, 1),
    },
    ("d_q", "small"): {
        64: Blocks(64, 32, 4, 1),
        128: Blocks(64, 32, 4, 1),
        256: Blocks(32, 16, 4, 1),
        512: Blocks(16, 16, 4, 1),
    },
    ("d_bias", "large"): {
        64: Blocks(64, 64, 4, 1),
        128: Blocks(64, 64, 4, 1),
        256: Blocks(64, 64, 8, 1),
        512: Blocks(32, 32, 8, 1),
    },
    ("d_bias", "small"): {
        64: Blocks(32, 32, 4, 1),
        128: Blocks(32, 32, 4, 1),
        256: Blocks(32, 32, 4, 1),
        512: Blocks(16, 16, 4, 1),
    },
}

# float32 products run on the ordinary units, whose operands live in registers: small tiles, one stage.
_SINGLE: dict[int, Blocks] = {
    64: Blocks(32, 32, 4, 1),
    128: Blocks(32, 32, 8, 1),
    256: Blocks(16, 16, 8, 1),
    512: Blocks(16, 16, 8, 1),
}

# From this width on, the accumulators of both keys and values do not fit the registers: a pass of its own for each
# recomputes one product more and spills nothing.
KEYS_AND_VALUES_APART = 256

# The interpreter computes tile by tile in NumPy: small enough for several tiles an axis in tests.
_INTERPRETER = Blocks(32, 32, 4, 1)


def blocks_for(purpose: Pass, arch: str, problem: AttentionProblem) -> Blocks:
    """The tile sizes of a pass. `arch` is "sm_90" and the like, "gfx942" and the like, or "interpreter"."""
    if arch == "interpreter":
        return _INTERPRETER
    width = max(64, padded_width(problem))
    if problem.dtype == "float32":
        return _SINGLE[width]
    if purpose == "d_qkv":
        purpose = "d_kv"
    blocks = _HALF[purpose, "large" if arch in ("sm_80", "sm_90", "sm_100", "sm_103") else "small"][width]
    # Arrays with an element for each pair: dense masks and biases, tables.
    pair_arrays = len(problem.bias.dense) + problem.bias.table + (problem.mask.bits is not None)
    # The pipeline holds tiles of those too, and the 163 KiB of sm_80 hold a stage less than the 227 KiB after it.
    fewer = (pair_arrays > 1) + (width >= 256 and (pair_arrays > 0 or arch == "sm_80"))
    stages = max(1, min(blocks.stages, 2 if pair_arrays else 3) - fewer)
    keys = min(blocks.keys, 64) if purpose == "forward" and pair_arrays else blocks.keys
    # The rounds of the generator want registers beside the two accumulators.
    queries = min(blocks.queries, 32) if purpose == "d_kv" and problem.dropout else blocks.queries
    return blocks._replace(queries=queries, keys=keys, stages=stages)


# Queries of all heads of a group that stand in one tile, and keys of a split: fixed, so that no row's bits depend on
# how many others there are. The interpreter's split is small enough for several in tests.
MOST_PACKED = 64
_SPLIT = {"interpreter": 32}
_USUAL_SPLIT = 512


def decode_split(arch: str) -> int:
    """Keys that one program of a decoding call reads."""
    return _SPLIT.get(arch, _USUAL_SPLIT)


def packs(problem: AttentionProblem) -> bool:
    """Whether the queries of a group fit one tile, and no predicate has to be evaluated for them."""
    return problem.group * problem.q_len <= MOST_PACKED and problem.mask.bits != "lazy"


def packed_rows(problem: AttentionProblem) -> int:
    """Rows of the tile for the queries of a group that packs."""
    return rows_together(problem.group * problem.q_len)


def rows_together(rows: int) -> int:
    """Rows of a tile for so many of a group, which take several tiles where they are more than MOST_PACKED."""
    return min(MOST_PACKED, max(16, 1 << (max(1, rows) - 1).bit_length()))


def padded_width(problem: AttentionProblem) -> int:
    """The larger of D and Dv as a power of two, which rows are padded to by masks; matrix instructions want 16."""
    return max(16, 1 << (max(problem.head_dim, problem.value_dim) - 1).bit_length())
