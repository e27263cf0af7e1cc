"""diffusers' attention processors, with tilewise in the place of torch's attention.

A processor projects, normalises, rotates and masks, and somewhere in between calls torch's attention. All but that call
is diffusers' own business and stays in diffusers' own code.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from diffusers.models import attention_processor as theirs
from torch.overrides import TorchFunctionMode

from .attention import attend

_TORCHS = torch._C._nn.scaled_dot_product_attention


class _Redirected(TorchFunctionMode):
    """While entered, torch's attention on tensors of four axes is tilewise's, with a scale where none is given."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _TORCHS or (args[0] if args else kwargs["query"]).ndim != 4:
            return func(*args, **kwargs)
        if self.scale is not None and kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": self.scale}
        return attend(*args, **kwargs)


def calls_torch(kind: type) -> bool:
    """Whether a class of processors calls torch's attention itself, so that `on_tilewise` means something for it."""
    code = getattr(kind.__call__, "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


@cache
def on_tilewise(kind: Any) -> type:
    """A subclass of a class of processors, whose calls of torch's attention are tilewise's.

    Args:
        kind: a class of diffusers' processors, or a user's own; weights, arguments and name are inherited.

    Raises:
        ValueError: its `__call__` does not name torch's `scaled_dot_product_attention`.
    """
    if not calls_torch(kind):
        raise ValueError(f"kind: {kind.__name__}.__call__ does not call torch's scaled_dot_product_attention")

    @wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Redirected():
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "off_tilewise": kind})


@cache
def scaled(kind: Any, dense: Any) -> type:
    """As `on_tilewise(kind)`, with the layer's own scale: what `dense`, which makes a matrix of scores, computes."""

    @wraps(kind.__call__)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        with _Redirected(attn.scale):
            return kind.__call__(self, attn, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "off_tilewise": dense})


# Processors that make the matrix of scores themselves, and those that compute the same by torch's attention.
TWINS = {
    theirs.AttnProcessor: theirs.AttnProcessor2_0,
    theirs.SlicedAttnProcessor: theirs.AttnProcessor2_0,
    theirs.AttnAddedKVProcessor: theirs.AttnAddedKVProcessor2_0,
    theirs.SlicedAttnAddedKVProcessor: theirs.AttnAddedKVProcessor2_0,
}

AttnProcessor = on_tilewise(theirs.AttnProcessor2_0)
AttnAddedKVProcessor = on_tilewise(theirs.AttnAddedKVProcessor2_0)
JointAttnProcessor = on_tilewise(theirs.JointAttnProcessor2_0)
FusedAttnProcessor = on_tilewise(theirs.FusedAttnProcessor2_0)
