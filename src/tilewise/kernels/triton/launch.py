"""Where and how kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton

from ...contract import Plan
from .tiles import Pass, blocks_for, decode_split
from .tuned import Blocks


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, blocks: Blocks | None = None, **constants: Any) -> None:
    """Run a kernel; an empty grid is nothing to do."""
    if 0 in grid:
        return
    if blocks is not None:
        constants |= {
            "BLOCK_Q": blocks.queries,
            "BLOCK_K": blocks.keys,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
    compiled = kernel[grid](*arguments, **constants)
    if _tried and blocks is not None:
        _tried[-1][2].append(compiled)


def on_device_of(array: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the one the array lives on."""
    return torch.cuda.device(array.device) if array.is_cuda else nullcontext()


def blocks_of(purpose: Pass, plan: Plan, device: torch.device) -> Blocks:
    """The tile sizes of a pass on a device."""
    for tried, blocks, _ in _tried:
        if tried == purpose:
            return blocks
    return blocks_for(purpose, architecture(device), plan.problem)


# The pass and tile sizes that are being tried, if any, and the compiled kernels that were launched with tiles since.
_tried: list[tuple[str, Blocks, list[Any]]] = []


@contextmanager
def using(purpose: str, blocks: Blocks) -> Iterator[list[Any]]:
    """A pass runs in these tile sizes, whatever the table says; for tuning, by one thread at a time.

    Gives the kernels that are launched with tiles, as Triton compiled them (None where it interprets).
    """
    compiled: list[Any] = []
    _tried.append((purpose, blocks, compiled))
    try:
        yield compiled
    finally:
        _tried.pop()


def split_of(device: torch.device) -> int:
    """Keys that one program of a decoding call reads on a device."""
    return decode_split(architecture(device))


@lru_cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …, or "interpreter" where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
