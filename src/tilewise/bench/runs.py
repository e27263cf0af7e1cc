"""What the peers' files share: how a case is made into tensors, and a call of torch into a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..masks.materialize import materialize
from .cases import Case

Run = Callable[[], Any]
# What a run returned, as float32: the output (B, Hq, Sq, D), and for training the gradient of q where all gradients
# of the output are 1.
Answers = tuple[np.ndarray, ...]
Prepared = tuple[Run, Callable[[Any], Answers]]
Prepare = Callable[[Case, dict[str, np.ndarray], str], Prepared]


class Refused(Exception):
    """The peer cannot run the case."""


def forward_alone(case: Case) -> None:
    """For peers that have neither derivatives nor dropout.

    Raises:
        Refused: the case needs them.
    """
    if case.kind == "training":
        raise Refused("no backward")
    if case.options:
        raise Refused("no dropout")


def torch_tensors(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Any, ...]:
    """The arrays as tensors of a dtype, which ask for gradients where the case does."""
    import torch

    tensors = tuple(torch.from_numpy(held).to(getattr(torch, dtype)) for held in data.values())
    return tuple(x.requires_grad_(case.kind == "training") for x in tensors)


def torch_run(case: Case, tensors: tuple[Any, ...], attend: Callable[[], Any]) -> Prepared:
    """Run a call of torch, with the gradients of all tensors for training; its result is (B, Hq, Sq, D)."""
    import torch

    def forward() -> tuple[Any, ...]:
        with torch.no_grad():
            return (attend(),)

    def training() -> tuple[Any, ...]:
        out = attend()
        return out, torch.autograd.grad(out, tensors, gradient)[0]

    gradient = torch.ones((), dtype=tensors[0].dtype).expand(*tensors[0].shape[:3], tensors[2].shape[3])
    return (training if case.kind == "training" else forward), lambda got: tuple(
        x.detach().float().numpy() for x in got
    )


def one_by_one(case: Case, tensors: Sequence[Any], attend: Callable[..., Any]) -> Prepared:
    """Run a call of torch for each packed sequence that is not empty; that its results are joined is not timed."""
    import torch

    parts = [[x[:, :, a:b] for x in tensors] for a, b in pairwise(case.starts().tolist()) if a < b]

    def run() -> list[Any]:
        with torch.no_grad():
            return [attend(*part) for part in parts]

    return run, lambda outs: (torch.cat(outs, 2).float().numpy(),)


def booleans(case: Case) -> np.ndarray | None:
    """The mask as booleans that broadcast to (B, Hq, Sq, Sk), as small as they can be.

    Raises:
        Refused: of packed sequences: who has no other way to them is not asked.
    """
    mask = case.mask_of()
    if mask is None:
        return None
    if case.mask == "packed":
        raise Refused("no packed sequences, and as booleans they would take the square of all lengths together")
    if case.mask == "padding":
        (kept,) = mask.operands()
        return np.asarray(np.arange(case.k_len) < kept[:, None])[:, None, None]
    return materialize(mask, case.q_len, case.k_len)
