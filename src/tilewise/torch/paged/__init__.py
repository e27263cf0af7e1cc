"""Keys and values in pages: attention through block tables, and a cache that hands pages out."""

from .attention import paged_attention
from .cache import PagedKVCache

__all__ = ["PagedKVCache", "paged_attention"]
