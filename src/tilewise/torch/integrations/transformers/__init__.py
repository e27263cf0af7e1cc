"""Hugging Face transformers: `attn_implementation="tilewise"` for its models.

After `register()`, `AutoModel.from_pretrained(name, attn_implementation="tilewise")` gives a model on tilewise, and
`model.set_attn_implementation("tilewise")` changes one that is already loaded. Models of T5's kind make a matrix of
their relative bias before any attention is asked; `linear_biases(model)` keeps them from that.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention_forward
from .masks import attention_mask
from .positions import linear_biases

__all__ = ["attention_forward", "attention_mask", "linear_biases", "register"]


def register(name: str = "tilewise") -> None:
    """Make `attn_implementation=name` known to transformers: the attention, and the masks that it is handed.

    Both registrations are needed: to an attention that has no mask function of its own name, transformers hands no mask
    at all, and padding would be attended without a word. Registering again changes nothing.

    Args:
        name: the value of `attn_implementation`, of `from_pretrained` or of `model.set_attn_implementation`.
    """
    AttentionMaskInterface.register(name, attention_mask)
    AttentionInterface.register(name, attention_forward)
