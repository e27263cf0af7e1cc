"""Which of torch's operators fit a problem, as data and sentences; no framework is imported here.

Ways: "cpu" (the flash kernel for CPUs), "cudnn", "flash" (FlashAttention 2), "efficient" (the memory-efficient kernel
of CUTLASS). Limits were read in torch's sources, 2.9 to 2.13, and are stricter where nothing could be tried.
"""

from __future__ import annotations

from typing import Literal

from ...problem import ITEM_BYTES, AttentionProblem
from . import faults

Step = Literal["forward", "backward"]
Sentences = tuple[str, ...]

_HALVES = ("float16", "bfloat16")

# torch's own order where cuDNN is new enough; the memory-efficient kernel is the slowest and takes the most.
CUDA_WAYS = ("cudnn", "flash", "efficient")


def ways(problem: AttentionProblem) -> tuple[str, ...]:
    """The ways that fit the forward pass, best guess first."""
    return tuple(way for way in _candidates(problem) if not reasons(way, "forward", problem))


def backward_ways(problem: AttentionProblem) -> tuple[str, ...]:
    """The ways that fit the backward pass."""
    return tuple(way for way in _candidates(problem) if not reasons(way, "backward", problem))


def refusals(step: Step, problem: AttentionProblem) -> Sentences:
    """Why no way fits: what all refuse once, the rest by way; empty where one fits."""
    common = _common(problem, step)
    if common:
        return common
    found = {way: reasons(way, step, problem) for way in _candidates(problem)}
    if not all(found.values()):
        return ()
    prefix = "its backward by " if step == "backward" else ""
    return tuple(f"{prefix}{way}: {sentence}" for way, sentences in found.items() for sentence in sentences)


def reasons(way: str, step: Step, problem: AttentionProblem) -> Sentences:
    """Every reason why a way does not fit a pass."""
    own = {"cpu": _cpu, "cudnn": _cudnn, "flash": _flash, "efficient": _efficient}[way]
    return (*_common(problem, step), *_said(own(problem, step)), *faults.reasons(way, step, problem))


def _candidates(problem: AttentionProblem) -> tuple[str, ...]:
    return ("cpu",) if problem.device == "cpu" else CUDA_WAYS


def _said(pairs: list[tuple[bool, str]]) -> Sentences:
    return tuple(sentence for holds, sentence in pairs if holds)


def _common(problem: AttentionProblem, step: Step) -> Sentences:
    """What none of the operators can do."""
    mask, bias = problem.mask, problem.bias
    return _said(
        [
            (
                not mask.trivial and (mask.diagonal != 0 or problem.q_len != problem.k_len),
                "it knows no mask but none, and the causal one of as many queries as keys",
            ),
            (not mask.trivial and bool(bias.dense), "it takes a causal mask or a bias, not both"),
            (len(bias.dense) > 1, f"it adds at most one dense bias and there are {len(bias.dense)}"),
            (bias.table, "it has no relative bias table"),
            (problem.softcap is not None, "it has no soft cap"),
            (problem.part, "it rounds its results, and those of a part are to be added up first"),
            (problem.sinks, "it has no sinks"),
            (bool(problem.dropout), "its dropout has other random bits than those promised"),
            (step == "backward" and problem.return_lse, "its backward takes no gradient of the log-sum-exp"),
            (problem.architecture.startswith("gfx"), "on AMD GPUs torch's operators are others, which were not tried"),
        ]
    )


def _cpu(problem: AttentionProblem, step: Step) -> list[tuple[bool, str]]:
    return [
        (problem.head_dim != problem.value_dim, f"keys have width {problem.head_dim} and values {problem.value_dim}"),
        (_bias_of_another_dtype(problem), "a bias must have the dtype of q"),
        (step == "backward" and "bias" in problem.gradients, "it has no gradient to a bias"),
        (step == "backward" and problem.group > 1, "its backward wants as many key heads as query heads"),
        (
            problem.deterministic,
            "the order of its sums depends on the number of threads (TILEWISE_DETERMINISTIC=0 allows that)",
        ),
    ]


def _cuda(problem: AttentionProblem) -> list[tuple[bool, str]]:
    return [(not problem.scores, "there is no query or no key")]


def _cudnn(problem: AttentionProblem, step: Step) -> list[tuple[bool, str]]:
    widths = (problem.head_dim, problem.value_dim)
    return [
        *_cuda(problem),
        (problem.dtype not in _HALVES, f"it takes float16 or bfloat16, not {problem.dtype}"),
        (any(width % 8 for width in widths), "head dimensions must be multiples of 8"),
        (max(widths) > 128, f"it takes head dimensions up to 128, not {max(widths)}"),
        (widths[0] != widths[1], f"keys have width {widths[0]} and values {widths[1]}"),
        (problem.k_len == 1, "it wants more than one key"),
        (problem.architecture not in ("", "sm_90", "sm_100", "sm_103"), "it was looked at on sm_90 and sm_100 alone"),
        *_bias_in_full(problem),
        (step == "backward" and "bias" in problem.gradients, "torch's operator has no gradient to a bias"),
        *_any_order(problem, step),
    ]


def _flash(problem: AttentionProblem, step: Step) -> list[tuple[bool, str]]:
    widths = (problem.head_dim, problem.value_dim)
    return [
        *_cuda(problem),
        (problem.dtype not in _HALVES, f"it takes float16 or bfloat16, not {problem.dtype}"),
        (bool(problem.bias.dense), "it adds no bias"),
        (any(width % 8 for width in widths), "head dimensions must be multiples of 8"),
        (max(widths) > 256, f"it takes head dimensions up to 256, not {max(widths)}"),
        (widths[0] != widths[1], f"keys have width {widths[0]} and values {widths[1]}"),
        *_any_order(problem, step),
    ]


def _efficient(problem: AttentionProblem, step: Step) -> list[tuple[bool, str]]:
    unit = 16 // ITEM_BYTES[problem.dtype]
    shape = problem.bias.dense[0] if problem.bias.dense else None
    whole = (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
    wants_bias = step == "backward" and "bias" in problem.gradients
    return [
        *_cuda(problem),
        (problem.dtype == "float64", "it takes no float64"),
        (problem.dtype == "float32", "how exact its float32 products are was not checked"),
        (problem.group > 1, "it wants as many key heads as query heads"),
        (
            any(width % unit for width in (problem.head_dim, problem.value_dim)),
            f"head dimensions must be multiples of {unit}",
        ),
        *_bias_in_full(problem),
        (wants_bias and shape != whole, "the gradient to a broadcast bias would be made at full size first"),
    ]


def _bias_in_full(problem: AttentionProblem) -> list[tuple[bool, str]]:
    shape = problem.bias.dense[0] if problem.bias.dense else None
    return [
        (_bias_of_another_dtype(problem), "a bias must have the dtype of q"),
        (
            shape is not None and shape[2:] != (problem.q_len, problem.k_len),
            "a bias must have a value for each query and key",
        ),
        (shape is not None and problem.k_len % 8 != 0, "rows of a bias must begin at multiples of 16 bytes"),
    ]


def _bias_of_another_dtype(problem: AttentionProblem) -> bool:
    return any(dtype != problem.dtype for dtype in problem.bias.dtypes)


def _any_order(problem: AttentionProblem, step: Step) -> list[tuple[bool, str]]:
    return [
        (
            step == "backward" and problem.deterministic,
            "it adds in an order that changes from run to run (TILEWISE_DETERMINISTIC=0 allows that)",
        )
    ]
