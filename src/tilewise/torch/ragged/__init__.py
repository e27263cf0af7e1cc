"""Sequences of different lengths: packed one after the other, or nested."""

from .nested import nested_attention
from .varlen import varlen_attention

__all__ = ["nested_attention", "varlen_attention"]
