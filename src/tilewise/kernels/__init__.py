"""The kernels, one folder each; see `contract.py` for what a folder holds."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..contract import KernelCard

# In the order in which `explain` lists them; the planner ranks by cost.
NAMES = ("native", "aten", "triton", "cudnn", "portable", "reference")


def cards() -> tuple[KernelCard, ...]:
    """All cards. A card imports neither a framework nor a compiled module."""
    return tuple(card_of(name) for name in NAMES)


def card_of(name: str) -> KernelCard:
    """The card of a kernel."""
    return import_module(f"{__name__}.{name}.card").CARD


def forward_of(name: str) -> ModuleType:
    """The module with a kernel's `forward`, imported when first needed."""
    return import_module(f"{__name__}.{name}.forward")


def backward_of(name: str) -> ModuleType:
    """The module with a kernel's `backward`, imported when first needed."""
    return import_module(f"{__name__}.{name}.backward")


def tangent_of(name: str) -> ModuleType:
    """The module with a kernel's `tangent`, imported when first needed."""
    return import_module(f"{__name__}.{name}.tangent")
