"""What is known to be wrong with cuDNN's attention in jax, each with where it was reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...problem import AttentionProblem
from .spelling import keywords


@dataclass(frozen=True, slots=True)
class Fault:
    """One known fault: where it was reported, why the planner refuses, and whether a problem meets it."""

    issue: str
    sentence: str
    concerns: Callable[[AttentionProblem], bool]


def _window_alone(problem: AttentionProblem) -> bool:
    return "window" in problem.mask.text and keywords(problem) is None


def _array(problem: AttentionProblem) -> bool:
    return problem.mask.bits == "dense"


def _bias(problem: AttentionProblem) -> bool:
    return bool(problem.bias.dense)


def _bias_gradient(problem: AttentionProblem) -> bool:
    return bool(problem.bias.dense) and "bias" in problem.gradients


FAULTS = (
    Fault("jax#39576", "without the causal mask its window lets rows see keys ahead", _window_alone),
    Fault("jax#28974", "it takes an array as a mask only as a dense bias of all pairs", _array),
    Fault("jax#28974", "it takes no bias that broadcasts over rows or keys", _bias),
    Fault("jax#30593, jax#27184", "its gradient to a bias is missing or refused in batches", _bias_gradient),
)


def reasons(problem: AttentionProblem) -> tuple[str, ...]:
    """A sentence for every fault that a problem would meet."""
    return tuple(f"{fault.sentence} ({fault.issue})" for fault in FAULTS if fault.concerns(problem))
