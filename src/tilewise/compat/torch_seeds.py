"""Seeds of dropout as tensors on the device, drawn from torch's generators."""

from __future__ import annotations

import torch
from torch import Tensor

# Odd, so that different offsets give different keys: 2^64 divided by the golden ratio, as a signed number.
_STEP = 0x9E3779B97F4A7C15 - 2**64


def fresh_seed(device: torch.device) -> Tensor:
    """A 0-D int64 drawn from the device's default generator, which stays on the device and needs no synchronisation."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def key_of(seed: Tensor | int, offset: Tensor | int, device: torch.device) -> Tensor:
    """The pair (seed, offset) of aten's Philox as the one 64-bit key of ours, a 0-D int64 on the device.

    Args:
        seed: a number or a tensor of one element (two uint64 hold the pair (seed, offset) themselves, as flash's
            `rng_state` does; `offset` is then not read).
        offset: a number or a tensor of one element.
    """
    seed, offset = (_signed(value, device) for value in (seed, offset))
    if seed.numel() == 2:
        seed, offset = seed.unbind()
    return seed.reshape(()) + offset.reshape(-1)[:1].sum() * _STEP


def _signed(value: Tensor | int, device: torch.device) -> Tensor:
    """As int64 with the same 64 bits."""
    if isinstance(value, Tensor):
        return value.to(device).view(torch.int64) if value.dtype == torch.uint64 else value.to(device, torch.int64)
    value = int(value) % 2**64
    return torch.tensor(value - 2**64 if value >= 2**63 else value, device=device)
