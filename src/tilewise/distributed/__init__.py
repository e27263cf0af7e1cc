"""Attention over a sequence spread over ranks: layouts, schedules and their cost, as integers, without a framework."""

from .cost import Choice, Cost, choose_layout, choose_strategy
from .explain import explain
from .layout import Kind, Layout
from .machine import MACHINES, Machine
from .schedule import WHOLE, Block, HeadShare, Schedule, Step, all_gather, grid, head_shares, needs, ring, ulysses

__all__ = [
    "MACHINES",
    "WHOLE",
    "Block",
    "Choice",
    "Cost",
    "HeadShare",
    "Kind",
    "Layout",
    "Machine",
    "Schedule",
    "Step",
    "all_gather",
    "choose_layout",
    "choose_strategy",
    "explain",
    "grid",
    "head_shares",
    "needs",
    "ring",
    "ulysses",
]
