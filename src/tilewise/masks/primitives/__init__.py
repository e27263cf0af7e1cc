"""The primitive masks, one file each."""

from .blocks import blocks
from .causal import causal
from .dense import dense
from .documents import documents
from .intervals import intervals
from .lengths import lengths
from .predicate import Predicate, predicate
from .prefix import prefix
from .window import window

__all__ = [
    "Predicate",
    "blocks",
    "causal",
    "dense",
    "documents",
    "intervals",
    "lengths",
    "predicate",
    "prefix",
    "window",
]
