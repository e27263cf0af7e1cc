"""Functions that are not to be compiled, because what they call depends on values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compiler.disable`, which would load the compiler for programs that never compile."""

    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def outside(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside
