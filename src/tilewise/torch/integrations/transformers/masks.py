"""The masks that transformers asks for, symbolic wherever they are understood.

A mask function that `translate` does not know (a model's own, a user's) transformers evaluates into a dense tensor.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from transformers import MODEL_MAPPING
from transformers import masking_utils as theirs
from transformers.utils.import_utils import is_tracing

from ....masks.materialize import materialize
from .symbolic import SymbolicMask
from .translate import Function, NotUnderstood, Place, both, padding, translate


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Function = theirs.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **options: Any,
) -> torch.Tensor:
    """The mask of one forward pass, as transformers asks its mask functions for it.

    Args:
        batch_size, q_length, kv_length: B, Sq, Sk.
        q_offset, kv_offset: positions of query 0 and of key 0.
        mask_function: says of (b, h, i, j) whether i sees j.
        attention_mask: padding, booleans (B, keys seen so far), True = a real token; keys beyond it are padding.
        use_vmap: `mask_function` takes scalars alone.
        device: where a tensor is made.
        dtype: of the model; config: its configuration. They matter only to models that know no boolean masks.
        options: what other attention implementations need (leave to skip the mask).

    Returns:
        A tensor (B, 1, Sq, Sk) of booleans, True = attend; for a model that knows no boolean masks, of floats, 0 or
        the dtype's lowest value. It is a `SymbolicMask` wherever the mask is understood and no graph is being traced.
    """
    kind: Any = type(config)
    added = _adds_masks(kind)
    if not is_tracing(attention_mask) and not is_tracing(q_offset) and _trusted():
        place = Place(batch_size, q_length, kv_length, int(q_offset), kv_offset)
        try:
            mask = both(translate(mask_function, place), padding(attention_mask, place))
            shape = (batch_size, 1, q_length, kv_length)
            return SymbolicMask(mask, shape, device, dtype if added else torch.bool)
        except NotUnderstood:
            pass
    make = partial(theirs.eager_mask, dtype=dtype) if added else theirs.sdpa_mask
    return make(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
    )  # fmt: skip


def _adds_masks(config: Any) -> bool:
    """Whether the models of a class of configurations add masks to their scores, knowing nothing of torch's attention.

    Where such a model computes with its mask before the attention, only floats mean what it takes them for.
    """
    if config not in _adding:
        model = MODEL_MAPPING.get(config, None)
        model = model[0] if isinstance(model, tuple) else model
        _adding[config] = model is not None and not getattr(model, "_supports_sdpa", True)
    return _adding[config]


_adding: dict[Any, bool] = {}
# What `torch.compiler.assume_constant_result` does, which would load the whole compiler just to set this.
_adds_masks._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _trusted() -> bool:
    """Whether the closures mean, in the installed transformers, what the rules say: asked of small examples once.

    The rules know the closures by name, and a later transformers might keep a name and change what it means. Then every
    mask is evaluated by transformers itself, which is slower and right.
    """
    ids = torch.tensor([[0, 0, 1, 1, 1, -1, -1, 2]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2]])
    causal_function, window_function = theirs.causal_mask_function, theirs.sliding_window_causal_mask_function(3)
    examples = [
        causal_function,
        theirs.bidirectional_mask_function,
        window_function,
        theirs.sliding_window_bidirectional_mask_function(2),
        theirs.chunked_causal_mask_function(3, torch.tensor([1])),
        theirs.or_masks(causal_function, theirs.blockwise_overlay(ids)),
        theirs.packed_sequence_compatibility_function(window_function, positions, torch.cumsum(positions == 0, -1)),
    ]
    try:
        return all(_agrees(function, Place(1, 8, 8)) for function in examples) and all(
            _agrees(function, Place(1, 3, 6, q_offset=5, kv_offset=2)) for function in examples[:6]
        )
    except (AttributeError, LookupError, TypeError):
        return False


def _agrees(function: Function, place: Place) -> bool:
    real = torch.tensor([[False, True, True, True, True, True, True, False]])
    sizes = (place.batch, place.q_len, place.k_len, place.q_offset, place.kv_offset)
    expected = theirs.sdpa_mask(*sizes, function, real, allow_is_causal_skip=False)
    mask = both(translate(function, place), padding(real, place))
    return mask is not None and np.array_equal(materialize(mask, place.q_len, place.k_len), expected.numpy())
