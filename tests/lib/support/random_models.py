"""Models of transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def build(recipe: Callable[[], tuple[Any, Any]], seed: int = 0) -> Any:
    """A random model of a recipe (its class and configuration), in evaluation mode, attending by its own code.

    Weights are large enough that attention is not uniform.
    """
    kind, config = recipe()
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0.0, 0.2)
            if "sinks" in name:
                weight.normal_()
    return model
