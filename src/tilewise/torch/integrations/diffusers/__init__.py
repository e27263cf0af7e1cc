"""Hugging Face diffusers: UNets and diffusion transformers on tilewise.

`use(model)` moves every softmax attention of a model, `stop(model)` moves it back. Either half can be had alone:

- Models of diffusers' attention dispatcher (Flux, Wan, Qwen-Image, ...): after `register()` the dispatcher knows the
  backend, so `model.set_attention_backend("tilewise")` works, and `with attention_backend("tilewise")`.
- Models with attention processors (UNets, DiT, PixArt, SD3, ...): `model.set_attn_processor(AttnProcessor())`, or
  `on_tilewise(kind)` for any other class of processors that calls torch's attention.
"""

from __future__ import annotations

from .backend import register
from .model import stop, use
from .processors import AttnAddedKVProcessor, AttnProcessor, FusedAttnProcessor, JointAttnProcessor, on_tilewise

__all__ = [
    "AttnAddedKVProcessor",
    "AttnProcessor",
    "FusedAttnProcessor",
    "JointAttnProcessor",
    "on_tilewise",
    "register",
    "stop",
    "use",
]
