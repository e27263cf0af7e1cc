"""Limits of torch's own operators."""

from __future__ import annotations

from importlib.util import find_spec

from ...contract import KernelCard, Unavailable
from ...problem import AttentionProblem
from .limits import backward_ways, refusals, ways


def _available() -> Unavailable | None:
    return None if find_spec("torch") else Unavailable("torch is not installed", "pip install 'tilewise[torch]'")


def _further(problem: AttentionProblem) -> tuple[str, ...]:
    return refusals("forward", problem) if problem.device in ("cpu", "cuda") else ()


def _further_backward(problem: AttentionProblem) -> tuple[str, ...]:
    return refusals("backward", problem) if problem.device in ("cpu", "cuda") else ()


CARD = KernelCard(
    name="aten",
    summary="torch's own cuDNN, flash and memory-efficient operators where they compute exactly what is asked",
    families=frozenset({"torch"}),
    devices=frozenset({"cuda", "cpu"}),
    dtypes=frozenset({"float64", "float32", "float16", "bfloat16"}),
    gradients=frozenset({"q", "k", "v", "bias"}),
    further=_further,
    further_backward=_further_backward,
    ways=ways,
    backward_ways=backward_ways,
    unordered=frozenset({"cpu", "cudnn", "flash"}),
    # On the CPU the native kernel was faster wherever both were timed (`benchmarks/results`).
    automatic=frozenset({"cuda"}),
    finite_only=True,
    rate=4e14,
    overhead=4e-5,
    available=_available,
)
