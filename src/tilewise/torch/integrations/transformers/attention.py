"""The attention that transformers' models call, in tilewise's words."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch

from ...._api import attention
from ....contract import Dropout
from ....masks.algebra import Mask
from ....masks.biases import Bias, as_bias, relative
from ....masks.primitives import causal, dense
from ..autocast import as_autocast
from .relative import RelativeBias
from .symbolic import SymbolicMask
from .translate import both

# Arguments by which some models ask for another attention than the plain one, and why they cannot be honoured. Models
# hand over many more that say nothing about the result (positions, packed lengths); those are ignored.
_REFUSED = {
    "output_attentions": "the probabilities are never stored",
    "head_mask": "scaling whole heads is not supported",
    "cache": "paged caches of continuous batching are not supported",
    "block_indices": "a choice of key blocks per query, made by the model, is not supported",
}


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for a module of transformers, differentiable.

    Args:
        module: its `is_causal` counts where neither a mask nor `is_causal` is given (True where it has none).
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D), not expanded to the query heads. value: (B, Hkv, Sk, Dv).
        attention_mask: what `masks.attention_mask` made, or booleans that broadcast to (B, Hq, Sq, Sk), True = attend,
            or floats to be added to the scores. None: causal if the module is, with query 0 at key 0, and for a single
            query all keys, as transformers has it for torch's own attention.
        dropout: probability to drop, 0 outside of training; the seed is drawn from torch's default generator.
        scaling: factor of the scores; None is 1 / sqrt(D).
        is_causal: overrides the module's.
        softcap: c replaces scores s by c * tanh(s / c).
        s_aux: (Hq,) sinks, one more exponent in each row's denominator.
        position_bias: floats that broadcast to (B, Hq, Sq, Sk), added to the scores; a `RelativeBias` stays a table.
        sinks: (B, Hq, Sq, 1), a sink of each row.
        indices: (B, Sq, n), integers: the keys that each query sees, of those that the mask shows.
        kwargs: whatever else models hand over. `sliding_window` is ignored, since the mask holds it.

    Returns:
        (B, Sq, Hq, Dv), contiguous, query's dtype; and None in place of the probabilities.

    Raises:
        ValueError: an argument that would change the result in a way tilewise does not know.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f'{name}: attn_implementation="tilewise" cannot honour it: {reason}; use "eager" instead')
    query, key, value = _one_batch(*as_autocast(query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask, added = _mask_and_bias(attention_mask, bool(is_causal) and query.shape[2] > 1)
    if indices is not None:
        mask = both(mask, dense(_chosen(indices, key.shape[2])))
    biases = [_as_bias(bias) for bias in (added, position_bias) if bias is not None]
    out, lse = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask=mask,
        bias=reduce(add, biases) if biases else None,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=_draw(dropout),
        layout="bshd",
        return_lse=True,
    )
    if sinks is not None:
        # A sink s makes the denominator exp(lse) + exp(s), so it scales its row by 1 / (1 + exp(s - lse)).
        share = torch.sigmoid(lse - sinks.squeeze(-1)).transpose(1, 2).unsqueeze(-1)
        out = (out * share).to(out.dtype)
    return out.contiguous(), None


def _mask_and_bias(given: torch.Tensor | None, is_causal: bool) -> tuple[Mask | None, torch.Tensor | None]:
    if given is None:
        return (causal("start") if is_causal else None), None
    if isinstance(given, SymbolicMask):
        return given.mask, None
    if given.ndim != 4:
        raise ValueError(f"attention_mask: has shape {tuple(given.shape)}, expected 4 axes, (B, Hq, Sq, Sk) or 1 each")
    return (dense(given), None) if given.dtype == torch.bool else (None, given)


def _as_bias(bias: torch.Tensor) -> Bias:
    return relative(bias.table()) if isinstance(bias, RelativeBias) else as_bias(bias)


def _chosen(indices: torch.Tensor, k_len: int) -> torch.Tensor:
    """Booleans (B, 1, Sq, Sk), True at the keys chosen; the model has scored as many pairs to choose them."""
    seen = indices.new_zeros((*indices.shape[:2], k_len), dtype=torch.bool)
    return seen.scatter(-1, indices.long(), True).unsqueeze(1)


def _one_batch(query: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A batch of 1, as learned queries have, repeated in place to the batch of the others: strides of 0, no copy."""
    batch = max(tensor.shape[0] for tensor in (query, *others))
    return tuple(tensor.expand(batch, -1, -1, -1) if tensor.shape[0] == 1 else tensor for tensor in (query, *others))


def _draw(p: float) -> Dropout | None:
    return Dropout(p, torch.randint(2**63 - 1, (), device="cpu")) if p else None
