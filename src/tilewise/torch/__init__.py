"""tilewise for torch: the door behind `tilewise.attention` for tensors, and what models are built of.

The names below load what they need when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AttentionStatistics": ".statistics",
    "KVCache": ".cache",
    "LinearScaling": ".positions.rotary",
    "Llama3Scaling": ".positions.rotary",
    "MultiheadAttention": ".multihead",
    "NtkScaling": ".positions.rotary",
    "PagedKVCache": ".paged",
    "YarnScaling": ".positions.rotary",
    "attention_statistics": ".statistics",
    "attention_weights": ".statistics",
    "context_parallel_attention": ".distributed",
    "install": "..compat.torch_sdpa",
    "nested_attention": ".ragged",
    "paged_attention": ".paged",
    "rotary": ".positions.rotary",
    "rotary_frequencies": ".positions.rotary",
    "rotary_tables": ".positions.rotary",
    "scaled_dot_product_attention": "..compat.torch_sdpa",
    "sdpa": "..compat.torch_sdpa",
    "uninstall": "..compat.torch_sdpa",
    "varlen_attention": ".ragged",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
