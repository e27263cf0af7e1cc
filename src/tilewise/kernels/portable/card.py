"""Limits of the portable kernel: it has next to none."""

from __future__ import annotations

from ...contract import KernelCard
from .tiles import default_tiles, workspace

CARD = KernelCard(
    name="portable",
    summary="array operations tile by tile; everything on any device in linear memory",
    families=frozenset({"numpy", "torch", "jax"}),
    devices=frozenset({"*"}),
    dtypes=frozenset({"float64", "float32", "float16", "bfloat16"}),
    gradients=frozenset({"q", "k", "v", "bias", "table", "sinks"}),
    rate=3e10,
    overhead=2e-4,
    tiles=default_tiles,
    workspace=workspace,
)
