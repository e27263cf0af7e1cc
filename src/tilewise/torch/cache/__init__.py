"""Keys and values of the tokens so far, for generation."""

from .cache import KVCache

__all__ = ["KVCache"]
