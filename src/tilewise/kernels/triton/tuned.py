"""Tile sizes that were measured on a GPU: a file that `TILEWISE_TILES` names.

`benchmarks/gpu_tiles.py` writes it, in JSON:

    {"architecture": "sm_90", "device": "NVIDIA H200", "triton": "3.7.1", "entries": [
      {"pass": "forward", "kind": "causal", "dtype": "bfloat16", "width": 128, "blocks": [128, 64, 8, 3], "ms": 0.61}]}

An entry serves the problems of its kind (`problem.kind_of`), dtype and padded width on that architecture; all
others keep the table of `tiles.py`. It is opt-in: no file is shipped and none is looked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "TILEWISE_TILES"
PASSES = ("forward", "decode", "d_kv", "d_q", "d_qkv", "d_bias")


class Blocks(NamedTuple):
    """Rows of queries and of keys in a tile, warps in a program, stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Key(NamedTuple):
    """What an entry serves: pass, class of problems, dtype of q, k and v, and the larger of the padded D and Dv."""

    purpose: str
    kind: str
    dtype: str
    width: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """The entries of one file."""

    architecture: str
    entries: Mapping[Key, Blocks]


def tuned_blocks(arch: str, key: Key) -> Blocks | None:
    """The measured tile sizes for a key on an architecture; None where there are none.

    Raises:
        ValueError: beginning with "TILEWISE_TILES:", where the file holds no such table.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        return None
    tuned = read(Path(path))
    return tuned.entries.get(key) if tuned.architecture == arch else None


@lru_cache(maxsize=8)
def read(path: Path) -> Tuned:
    """The table in a file, read once.

    Raises:
        ValueError: beginning with "TILEWISE_TILES:", where the file holds none.
    """
    try:
        held = json.loads(path.read_text())
        return Tuned(str(held["architecture"]), dict(map(_entry, held["entries"])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE}: {path} holds no tile sizes, as benchmarks/gpu_tiles.py writes them: {error!r}"
        ) from None


def write(path: Path, architecture: str, found: Iterable[tuple[Key, Blocks, float]], **about: str) -> None:
    """Write a table: keys, tile sizes and the milliseconds that were measured; `about` says where and with what."""
    entries = [
        {"pass": key.purpose, "kind": key.kind, "dtype": key.dtype, "width": key.width, "blocks": blocks, "ms": ms}
        for key, blocks, ms in found
    ]
    path.write_text(json.dumps({"architecture": architecture, **about, "entries": entries}, indent=1) + "\n")


def _entry(held: Mapping[str, Any]) -> tuple[Key, Blocks]:
    key = Key(str(held["pass"]), str(held["kind"]), str(held["dtype"]), int(held["width"]))
    blocks = Blocks(*(int(size) for size in held["blocks"]))
    if key.purpose not in PASSES:
        raise ValueError(f"pass: got {key.purpose!r}, expected one of {', '.join(PASSES)}")
    if min(blocks) < 1 or any(size & (size - 1) for size in blocks[:3]):
        raise ValueError(f"blocks: got {list(blocks)}, expected powers of two, and stages of at least 1")
    return key, blocks
