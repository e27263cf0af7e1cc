"""Kernels broken on purpose: the conformance check must notice each fault, or it cannot be believed when it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import conformance
from support.conformance import check

from tilewise.contract import Gradients, Operands, Plan
from tilewise.kernels import backward_of, forward_of
from tilewise.masks.lower import LoweredMask
from tilewise.masks.materialize import picture
from tilewise.plan.catalog import PRESETS
from tilewise.plan.preset import Example, example

Call = tuple[Plan, Operands]
Results = tuple[np.ndarray, np.ndarray]


def problem(**changes: Any) -> Callable[[Plan, Operands], Call]:
    """A kernel that believes in another problem; a change may be a function of the true value."""

    def believe(plan: Plan, operands: Operands) -> Call:
        new = {name: to(getattr(plan.problem, name)) if callable(to) else to for name, to in changes.items()}
        return replace(plan, problem=replace(plan.problem, **new)), operands

    return believe


def operand(name: str, change: Callable[[Any], Any]) -> Callable[[Plan, Operands], Call]:
    """A kernel that misreads an operand."""
    return lambda plan, operands: (plan, replace(operands, **{name: change(getattr(operands, name))}))


def seen(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Plan, Operands], Call]:
    """A kernel that misreads the mask."""

    def misread(mask: LoweredMask) -> LoweredMask:
        return LoweredMask(mask.site, dense=change(picture(mask).copy()))

    return operand("mask", misread)


def out(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Plan, Results], Results]:
    """A kernel that spoils its output."""
    return lambda plan, results: (change(results[0].copy()), results[1])


def lse(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Plan, Results], Results]:
    """A kernel that spoils its log-sum-exp."""
    return lambda plan, results: (results[0], change(results[1].copy()))


def gradient(name: str, change: Callable[[Any], Any]) -> Callable[[Plan, Gradients], Gradients]:
    """A kernel that spoils a gradient."""
    return lambda plan, found: replace(found, **{name: change(getattr(found, name))})


def put(array: np.ndarray, place: Any, value: float) -> np.ndarray:
    array[place] = value
    return array


def _interleaved_heads(plan: Plan, operands: Operands) -> Call:
    """h % Hkv where h // group is right."""
    order = np.arange(plan.problem.q_heads).reshape(-1, plan.problem.group).T.ravel()
    return plan, replace(operands, q=operands.q[:, order])


def _unscaled_dropout(plan: Plan, results: Results) -> Results:
    return results[0] * (1 - plan.problem.dropout), results[1]


BEFORE: dict[str, tuple[str, Callable]] = {
    "the mask is ignored": ("llama3-8b", operand("mask", lambda mask: LoweredMask(mask.site))),
    "the diagonal is one to the right": ("llama3-8b", seen(lambda s: np.roll(s, 1, 3) | s)),
    "the diagonal is one to the left": ("llama3-8b", seen(lambda s: s & np.roll(s, -1, 3))),
    "the diagonal stands at the start": ("llama3-8b-chunk", seen(lambda s: s & np.tri(*s.shape[2:], dtype=bool))),
    "the window is one key too wide": (
        "mistral-7b",
        seen(lambda s: s | np.roll(s, 1, 2) & np.tri(*s.shape[2:], dtype=bool)),
    ),
    "the last key is dropped": ("whisper-encoder", seen(lambda s: put(s, np.s_[..., -1], False))),
    "a tile of keys is dropped": ("whisper-encoder", seen(lambda s: put(s, np.s_[..., 64:128], False))),
    "the first batch row's mask is used for all": ("bert-base", seen(lambda s: np.repeat(s[:1], len(s), 0))),
    "one head's mask is used for all": ("dense-mask", seen(lambda s: np.repeat(s[:, :1], s.shape[1], 1))),
    "documents see one another": ("packed-varlen", operand("mask", lambda mask: LoweredMask(mask.site))),
    "labels are ignored": (
        "interleaved-documents",
        operand("mask", lambda mask: replace(mask, q_labels=None, k_labels=None)),
    ),
    "a second interval is ignored": ("streaming-llm", seen(lambda s: put(s, np.s_[:, :, 40:, :4], False))),
    "bits are transposed": ("dense-mask", seen(lambda s: s.swapaxes(2, 3).copy())),
    "the scale is 1 % off": ("llama3-8b", problem(scale=lambda scale: 1.01 * scale)),
    "the scale is 1 / sqrt(D) whatever was asked": ("t5-encoder", problem(scale=0.25)),
    "the softcap is skipped": ("gemma2-9b-global", problem(softcap=None)),
    "query heads are dealt out in turns": ("llama3-8b", _interleaved_heads),
    "the next kv head is read": ("llama3-8b", operand("k", lambda k: np.roll(k, 1, 1))),
    "the sink is ignored": ("gpt-oss-20b-local", operand("sinks", lambda sinks: None)),
    "the sink of the next head is read": ("gpt-oss-20b-local", operand("sinks", lambda sinks: np.roll(sinks, 1))),
    "the bias has the other sign": ("swin-t", operand("dense", lambda dense: (-dense[0],))),
    "the bias is ignored": ("alphafold-row", operand("dense", lambda dense: (0 * dense[0],))),
    "the bias is scaled": ("swin-t", operand("dense", lambda dense: (0.25 * dense[0],))),
    "the table is one distance off": ("mpt-7b", operand("table", lambda table: np.roll(table, 1, -1))),
    "the table is read backwards": ("t5-encoder", operand("table", lambda table: table[..., ::-1].copy())),
    "dropout uses another stream": (
        "bert-base-training",
        operand("dropout", lambda d: replace(d, stream=d.stream + 1)),
    ),
    "dropout is skipped": ("bert-base-training", operand("dropout", lambda dropout: None)),
    "inputs are rounded to half": ("llama3-8b", operand("q", lambda q: q.astype(np.float16).astype(q.dtype))),
}  # fmt: skip

AFTER: dict[str, tuple[str, Callable]] = {
    "dropout is not rescaled": ("bert-base-training", _unscaled_dropout),
    "lse is a binary logarithm": ("llama3-8b", lse(lambda x: x / np.log(2))),
    "lse is the peak alone": ("llama3-8b", lse(lambda x: x - 0.5)),
    "lse of an empty row is 0": ("rows-that-see-nothing", lse(lambda x: np.where(x == -np.inf, 0, x))),
    "lse is rounded to half": ("llama3-8b", lse(lambda x: x.astype(np.float16).astype(x.dtype))),
    "an empty row is not zeroed": ("rows-that-see-nothing", out(lambda x: np.where(x == 0, 1e-3, x).astype(x.dtype))),
    "a row is never written": ("llama3-8b", out(lambda x: put(x, np.s_[1, 2, -1], np.nan))),
    "the last value column is never written": ("deepseek-v3", out(lambda x: put(x, np.s_[..., -1], 0.0))),
    "the output is rounded to half": ("llama3-8b", out(lambda x: x.astype(np.float16).astype(x.dtype))),
    "the output is divided twice": ("whisper-encoder", out(lambda x: x * 0.999)),
    "heads are swapped": ("llama3-8b", out(lambda x: x[:, ::-1])),
    "batch rows are swapped": ("bert-base", out(lambda x: x[::-1])),
    "the output has another dtype": ("llama3-8b", out(lambda x: x.astype(np.float64))),
    "the output has another shape": ("llama3-8b", out(lambda x: x[:, :, :-1])),
}

GRADIENTS: dict[str, tuple[str, Callable]] = {
    "the gradient of q lacks its scale": ("llama3-8b", gradient("q", lambda x: 4 * x)),
    "the gradient of k is doubled": ("llama3-8b", gradient("k", lambda x: 2 * x)),
    "the gradient of k is 1 % off": ("llama3-8b", gradient("k", lambda x: np.float32(1.01) * x)),
    "the gradient of v is zero": ("llama3-8b", gradient("v", lambda x: 0 * x)),
    "the gradient of v is missing": ("llama3-8b", gradient("v", lambda x: None)),
    "the gradient of a key tile is dropped": (
        "whisper-encoder",
        gradient("k", lambda x: put(x.copy(), np.s_[:, :, 64:], 0)),
    ),
    "the gradient of the bias is not reduced": ("alphafold-row", gradient("dense", lambda x: (x[0] / 3,))),
    "the gradient of the table is one distance off": ("mpt-7b", gradient("table", lambda x: np.roll(x, 1, -1))),
    "the gradient of the sinks has the other sign": ("gpt-oss-20b-local", gradient("sinks", lambda x: -x)),
    "a gradient is NaN in an empty row": (
        "rows-that-see-nothing",
        gradient("q", lambda x: put(x.copy(), np.s_[0, 0, -1], np.nan)),
    ),
}  # fmt: skip

BACKWARD_BEFORE: dict[str, tuple[str, Callable]] = {
    "the backward pass ignores the mask": ("llama3-8b", BEFORE["the mask is ignored"][1]),
    "the backward pass ignores dropout": ("bert-base-training", BEFORE["dropout is skipped"][1]),
    "the backward pass ignores the softcap": ("gemma2-9b-global", problem(softcap=None)),
}


def install(monkeypatch: pytest.MonkeyPatch, *, before=None, after=None, back_before=None, back_after=None) -> None:
    """Put a fault between the check and the portable kernel."""

    def forward(plan: Plan, operands: Operands) -> Results:
        call = before(plan, operands) if before else (plan, operands)
        results = forward_of("portable").forward(*call)
        return after(plan, results) if after else results

    def backward(plan: Plan, operands: Operands, *rest: Any) -> Gradients:
        call = back_before(plan, operands) if back_before else (plan, operands)
        found = backward_of("portable").backward(*call, *rest)
        return back_after(plan, found) if back_after else found

    monkeypatch.setattr(conformance, "forward_of", lambda name: SimpleNamespace(forward=forward))
    monkeypatch.setattr(conformance, "backward_of", lambda name: SimpleNamespace(backward=backward))


def caught(name: str, gradients: bool) -> None:
    with pytest.raises(AssertionError):
        check(capped(name), "portable", "numpy", gradients=gradients)


def capped(name: str) -> Example:
    """The preset's example; where there is a cap, one low enough to bend scores of ordinary size."""
    case = example(PRESETS[name])
    return replace(case, options={**case.options, "softcap": 1.0}) if "softcap" in case.options else case


@pytest.mark.parametrize("fault", BEFORE)
def test_a_fault_in_what_the_kernel_reads(fault, monkeypatch):
    name, change = BEFORE[fault]
    install(monkeypatch, before=change)
    caught(name, gradients=False)


@pytest.mark.parametrize("fault", AFTER)
def test_a_fault_in_what_the_kernel_writes(fault, monkeypatch):
    name, change = AFTER[fault]
    install(monkeypatch, after=change)
    caught(name, gradients=False)


@pytest.mark.parametrize("fault", GRADIENTS)
def test_a_fault_in_a_gradient(fault, monkeypatch):
    name, change = GRADIENTS[fault]
    install(monkeypatch, back_after=change)
    caught(name, gradients=True)


@pytest.mark.parametrize("fault", BACKWARD_BEFORE)
def test_a_fault_in_the_backward_pass_alone(fault, monkeypatch):
    name, change = BACKWARD_BEFORE[fault]
    install(monkeypatch, back_before=change)
    caught(name, gradients=True)


def test_d_lse_forgotten(monkeypatch):
    def backward(plan: Plan, operands: Operands, o: Any, lse: Any, d_out: Any, d_lse: Any) -> Gradients:
        return backward_of("portable").backward(plan, operands, o, lse, d_out, 0 * d_lse)

    monkeypatch.setattr(conformance, "backward_of", lambda name: SimpleNamespace(backward=backward))
    caught("llama3-8b", gradients=True)


@pytest.mark.parametrize("name", sorted({name for table in (BEFORE, AFTER, GRADIENTS) for name, _ in table.values()}))
def test_without_a_fault_the_check_passes(name, monkeypatch):
    install(monkeypatch)
    assert check(capped(name), "portable", "numpy", gradients=True) == ()
