"""A whole model on tilewise, and back."""

from __future__ import annotations

from typing import Any

import torch

from .backend import register
from .processors import TWINS, calls_torch, on_tilewise, scaled


def use(model: torch.nn.Module) -> list[str]:
    """Let every softmax attention of a model of diffusers run on tilewise.

    Layers of diffusers' dispatcher get the backend; processors that call torch's attention, or make a matrix of scores
    where a twin of theirs calls it, change their class. Other processors (linear attention, other libraries') stay.
    Weights and the state dict are untouched; layers given a new processor later need the call again.

    Args:
        model: any module that holds diffusers' attention layers.

    Returns:
        The names of the layers that are on tilewise now.

    Raises:
        ValueError: there is none.
    """
    moved = []
    for name, layer in model.named_modules():
        processor = getattr(layer, "processor", None)
        kind: Any = type(processor)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = register()
        elif kind in TWINS:
            processor.__class__ = scaled(TWINS[kind], kind)
        elif hasattr(kind, "off_tilewise"):
            pass
        elif processor is not None and calls_torch(kind):
            processor.__class__ = on_tilewise(kind)
        else:
            continue
        moved.append(name)
    if not moved:
        raise ValueError(f"model: {type(model).__name__} has no attention layer of diffusers that tilewise can serve")
    return moved


def stop(model: torch.nn.Module) -> None:
    """Undo `use`: each layer attends as it did before, those of the dispatcher by diffusers' default backend."""
    ours = register()
    for layer in model.modules():
        processor = getattr(layer, "processor", None)
        if getattr(processor, "_attention_backend", None) is ours:
            processor._attention_backend = None
        elif hasattr(type(processor), "off_tilewise"):
            processor.__class__ = type(processor).off_tilewise
