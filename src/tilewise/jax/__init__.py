"""tilewise for jax: masks, biases and dropout as pytrees, and the door behind `tilewise.attention` for jax arrays.

The names below load what they need when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "attention_fn": ".integrations.flax",
    "attention_one": ".integrations.equinox",
    "context_parallel_attention": ".distributed",
    "dot_product_attention": "..compat.jax_sdpa",
    "install": "..compat.jax_sdpa",
    "positions": ".distributed",
    "sdpa": "..compat.jax_sdpa",
    "shard": ".distributed",
    "uninstall": "..compat.jax_sdpa",
    "unshard": ".distributed",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
