"""Attention over a sequence spread over ranks: layouts, schedules and their cost, as integers, without a framework."""

from .layout import Kind, Layout
from .schedule import WHOLE, Block, HeadShare, Schedule, Step, all_gather, grid, head_shares, needs, ring, ulysses

__all__ = [
    "WHOLE",
    "Block",
    "HeadShare",
    "Kind",
    "Layout",
    "Schedule",
    "Step",
    "all_gather",
    "grid",
    "head_shares",
    "needs",
    "ring",
    "ulysses",
]
