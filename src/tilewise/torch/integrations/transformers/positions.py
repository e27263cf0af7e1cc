"""The relative biases of T5 and its kin as tables over the distance, instead of matrices over all pairs."""

from __future__ import annotations

from functools import partial, update_wrapper
from inspect import signature
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import attention_forward
from .relative import RelativeBias


def linear_biases(model: torch.nn.Module) -> int:
    """Let the attention layers of T5 and its kin (mT5, UMT5, Switch, Pop2Piano, ...) hand over their biases as tables.

    Such models make a matrix (1, H, Sq, Sk) of their relative bias, and one of zeros for each cross-attention, whatever
    the attention does with them. After this call they do so only under other attention implementations and while a
    graph is traced; only UMT5's zeros stay. Values, gradients and the state dict are the same. Calling it again changes
    nothing.

    Args:
        model: any model; layers of other kinds are left alone. The change goes with the model, not with its class.

    Returns:
        The number of layers changed.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = [layer for layer in model.modules() if _makes_matrix(layer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layer that makes a relative bias as T5's layers do")
    for layer in layers:
        if "compute_bias" not in vars(layer):
            layer.compute_bias = update_wrapper(partial(_bias, layer), layer.compute_bias)
            if "position_bias" in signature(layer.forward).parameters:
                layer.register_forward_pre_hook(_no_zeros, with_kwargs=True)
    return len(layers)


def _makes_matrix(layer: torch.nn.Module) -> bool:
    make = getattr(layer, "compute_bias", None)
    return hasattr(layer, "has_relative_attention_bias") and [*signature(make).parameters] == [
        "query_length", "key_length", "device", "past_seen_tokens"
    ]  # fmt: skip


def _bias(
    layer: torch.nn.Module,
    query_length: int,
    key_length: int,
    device: torch.device | None = None,
    past_seen_tokens: int | torch.Tensor = 0,
) -> torch.Tensor:
    make = partial(type(layer).compute_bias, layer, device=device)
    if not _ours(layer):
        return make(query_length, key_length, past_seen_tokens=past_seen_tokens)
    return RelativeBias(make, query_length, key_length, past_seen_tokens, layer.relative_attention_bias.weight)


def _no_zeros(layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A layer that has no bias of its own and is handed none would add zeros, (1, H, Sq, Sk); one zero does as well."""
    if layer.has_relative_attention_bias or len(args) > 3 or kwargs.get("position_bias") is not None:
        return None
    if not _ours(layer):
        return None
    return args, {**kwargs, "position_bias": layer.q.weight.new_zeros((1, 1, 1, 1))}


def _ours(layer: torch.nn.Module) -> bool:
    """Whether what the layer makes goes to tilewise, outside of a graph."""
    function = ALL_ATTENTION_FUNCTIONS.get(layer.config._attn_implementation)
    return function is attention_forward and not torch.compiler.is_compiling()
