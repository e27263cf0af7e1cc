"""Attention over sequences that are spread over a mesh of devices."""

from __future__ import annotations

from .call import context_parallel_attention
from .order import positions, shard, unshard

__all__ = ["context_parallel_attention", "positions", "shard", "unshard"]
