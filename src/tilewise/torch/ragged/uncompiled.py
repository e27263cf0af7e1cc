"""Functions that are not to be compiled, because what they call depends on values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compiler.disable`, which would load the compiler for programs that never compile."""

    @cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(function)

    @wraps(function)
    def outside(*args: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*args)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside
