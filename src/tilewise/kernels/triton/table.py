"""The tile sizes that were chosen by compiling for architectures, by pass and width.

For half precision each entry has three: for problems with nothing but a mask of ranges or labels; for those with an
array that is read for each pair (dense masks and biases, tables); and for those with several such arrays or dropout.
More stages cost shared memory and save registers: tiles that the pipeline copies pass none on their way.
"""

from __future__ import annotations

from .tuned import Blocks

_Three = tuple[Blocks, Blocks, Blocks]


def family_of(arch: str) -> str:
    """Architectures that share tile sizes: "sm_90" and its successors in datacentres, "sm_80", or "small".

    "small" are all others, among them consumers' cards with 99 KiB of shared memory a block and AMD's with 64 KiB.
    """
    if arch in ("sm_90", "sm_100", "sm_103"):
        return "sm_90"
    return arch if arch == "sm_80" else "small"


def _b(queries: int, keys: int, warps: int, stages: int) -> Blocks:
    return Blocks(queries, keys, warps, stages)


def _all(queries: int, keys: int, warps: int, stages: int) -> _Three:
    blocks = Blocks(queries, keys, warps, stages)
    return blocks, blocks, blocks


# Width (the larger of the padded D and Dv) -> blocks.
HALF: dict[tuple[str, str], dict[int, _Three]] = {
    ("forward", "sm_90"): {
        64: (_b(128, 128, 8, 3), _b(128, 64, 8, 2), _b(128, 32, 8, 2)),
        128: (_b(128, 64, 8, 3), _b(128, 64, 8, 2), _b(128, 32, 8, 2)),
        256: (_b(128, 64, 8, 2), _b(128, 32, 8, 2), _b(128, 16, 8, 3)),
        512: (_b(32, 32, 8, 2), _b(32, 32, 8, 1), _b(32, 32, 8, 1)),
    },
    ("forward", "sm_80"): {
        64: (_b(128, 64, 8, 3), _b(128, 64, 8, 2), _b(128, 32, 8, 2)),
        128: (_b(64, 64, 4, 2), _b(64, 32, 4, 2), _b(32, 32, 4, 2)),
        256: (_b(32, 64, 4, 1), _b(32, 64, 8, 1), _b(32, 64, 8, 1)),
        512: _all(32, 32, 8, 1),
    },
    ("forward", "small"): {
        64: (_b(128, 64, 4, 2), _b(64, 64, 4, 2), _b(64, 64, 4, 2)),
        128: (_b(64, 64, 4, 2), _b(64, 32, 4, 2), _b(64, 32, 4, 2)),
        256: (_b(64, 32, 4, 1), _b(32, 32, 4, 1), _b(32, 32, 4, 1)),
        512: _all(32, 16, 4, 1),
    },
    # Rows of queries are those of a group; see `packed_rows`.
    ("decode", "sm_90"): {
        64: (_b(64, 64, 4, 3), _b(64, 64, 4, 2), _b(64, 64, 4, 2)),
        128: (_b(64, 64, 4, 3), _b(64, 64, 4, 2), _b(64, 64, 4, 2)),
        256: (_b(64, 32, 4, 2), _b(64, 32, 4, 1), _b(64, 32, 4, 1)),
        512: (_b(64, 16, 8, 2), _b(64, 16, 8, 1), _b(64, 16, 8, 1)),
    },
    ("decode", "sm_80"): {
        64: (_b(64, 64, 4, 3), _b(64, 64, 4, 2), _b(64, 64, 4, 2)),
        128: (_b(64, 64, 4, 3), _b(64, 64, 4, 2), _b(64, 64, 4, 2)),
        256: _all(64, 32, 4, 1),
        512: _all(64, 16, 8, 1),
    },
    ("decode", "small"): {
        64: _all(64, 64, 4, 2),
        128: _all(64, 32, 4, 2),
        256: _all(64, 16, 4, 1),
        512: _all(64, 16, 8, 1),
    },
    ("d_kv", "sm_90"): {
        64: (_b(64, 128, 8, 2), _b(64, 128, 8, 2), _b(32, 128, 8, 2)),
        128: (_b(32, 128, 8, 1), _b(32, 128, 8, 2), _b(32, 128, 8, 2)),
        256: (_b(32, 128, 8, 2), _b(32, 128, 8, 2), _b(16, 128, 8, 3)),
        512: _all(16, 32, 8, 1),
    },
    ("d_kv", "sm_80"): {
        64: (_b(64, 128, 8, 2), _b(32, 128, 8, 2), _b(32, 64, 8, 2)),
        128: (_b(64, 64, 8, 1), _b(64, 64, 8, 2), _b(64, 64, 8, 2)),
        256: (_b(32, 64, 8, 1), _b(32, 64, 8, 1), _b(32, 32, 8, 1)),
        512: _all(16, 32, 8, 1),
    },
    ("d_kv", "small"): {
        64: _all(32, 64, 4, 1),
        128: (_b(32, 64, 4, 1), _b(32, 32, 4, 1), _b(32, 64, 4, 1)),
        256: _all(16, 32, 4, 1),
        512: _all(16, 16, 4, 1),
    },
    ("d_q", "sm_90"): {
        64: (_b(128, 64, 8, 2), _b(128, 64, 8, 2), _b(128, 32, 8, 2)),
        128: (_b(128, 64, 8, 2), _b(128, 64, 8, 2), _b(128, 32, 8, 2)),
        256: (_b(128, 32, 8, 2), _b(128, 32, 8, 2), _b(128, 16, 8, 3)),
        512: _all(32, 16, 8, 1),
    },
    ("d_q", "sm_80"): {
        64: (_b(128, 64, 8, 2), _b(128, 32, 8, 2), _b(64, 32, 8, 2)),
        128: (_b(128, 32, 8, 2), _b(128, 32, 8, 2), _b(32, 32, 8, 1)),
        256: (_b(64, 64, 8, 1), _b(64, 32, 8, 1), _b(32, 32, 8, 1)),
        512: _all(32, 16, 8, 1),
    },
    ("d_q", "small"): {
        64: _all(64, 32, 4, 1),
        128: _all(64, 32, 4, 1),
        256: _all(32, 16, 4, 1),
        512: _all(16, 16, 4, 1),
    },
    ("d_qkv", "sm_90"): {
        64: (_b(64, 128, 8, 2), _b(32, 128, 8, 2), _b(32, 64, 8, 2)),
        128: (_b(16, 128, 8, 1), _b(32, 64, 8, 1), _b(16, 64, 8, 1)),
        256: (_b(16, 64, 8, 2), _b(16, 64, 8, 2), _b(16, 64, 8, 3)),
        512: _all(16, 16, 8, 1),
    },
    ("d_qkv", "sm_80"): {
        64: (_b(32, 64, 8, 2), _b(32, 64, 8, 2), _b(32, 64, 8, 2)),
        128: (_b(32, 64, 8, 1), _b(32, 64, 8, 1), _b(32, 64, 8, 1)),
        256: _all(16, 64, 8, 1),
        512: _all(16, 16, 8, 1),
    },
    ("d_qkv", "small"): {
        64: _all(32, 64, 4, 1),
        128: _all(32, 32, 4, 1),
        256: _all(16, 32, 4, 1),
        512: _all(16, 16, 4, 1),
    },
    ("d_bias", "sm_90"): {
        64: _all(64, 64, 8, 1),
        128: _all(64, 64, 8, 1),
        256: _all(64, 64, 8, 1),
        512: _all(16, 16, 8, 1),
    },
    ("d_bias", "sm_80"): {
        64: _all(32, 32, 8, 1),
        128: _all(32, 32, 8, 1),
        256: _all(32, 32, 8, 1),
        512: _all(16, 16, 8, 1),
    },
    ("d_bias", "small"): {
        64: _all(32, 32, 4, 1),
        128: _all(32, 32, 4, 1),
        256: _all(32, 32, 4, 1),
        512: _all(16, 16, 4, 1),
    },
}

# float32 products run on the ordinary units, whose operands live in registers: small tiles, one stage.
_SINGLE: dict[int, Blocks] = {
    64: Blocks(32, 32, 8, 1),
    128: Blocks(16, 32, 8, 1),
    256: Blocks(16, 16, 8, 1),
    512: Blocks(16, 16, 8, 1),
}


def single(arch: str, width: int) -> Blocks:
    """The tile sizes of all passes in float32.

    AMD's warps have 64 threads: eight would leave each half the registers, and be more than a tile has elements.
    """
    blocks = _SINGLE[width]
    return blocks._replace(warps=4) if arch.startswith("gfx") else blocks
