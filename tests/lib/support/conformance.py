"""The check that every kernel must pass on every problem; a function, so that broken kernels can be seen to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from accuracy import assert_accurate

import tilewise as tw
from tilewise.contract import Gradients, KernelCard, Operands, Plan
from tilewise.kernels import backward_of, cards, forward_of
from tilewise.kernels.reference import dense as reference
from tilewise.masks.biases import LoweredBias
from tilewise.plan.choose import choose
from tilewise.plan.preset import Example
from tilewise.problem import Gradient
from tilewise.validate import Checked, check_arrays, check_options, prepare

from .plain import leaves, plain_gradients, plain_out

FAMILIES = ("numpy", "torch", "jax")
OPTIONS = ("mask", "bias", "scale", "softcap", "sinks", "dropout")
Run = Callable[[Operands], tuple[Any, Any]]


def card(kernel: str) -> KernelCard:
    """The card of a kernel."""
    return next(card for card in cards() if card.name == kernel)


def to_family(value: Any, family: str, dtype: str | None = None) -> Any:
    """A NumPy array in a framework, floats as `dtype` if given."""
    if family == "torch":
        torch = pytest.importorskip("torch")
        tensor = torch.tensor(value)
        return tensor.to(getattr(torch, dtype)) if dtype else tensor
    if family == "jax":
        return pytest.importorskip("jax.numpy").asarray(value, dtype=dtype)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return value.astype(dtype) if dtype else value


@dataclass(frozen=True)
class Prepared:
    """A validated call in one framework and dtype, and what it wants differentiated.

    `run` is the framework's way on from there: the plan's kernel, with derivatives where the framework has them.
    """

    plan: Plan
    operands: Operands
    run: Run


def prepared(example: Example, kernel: str, family: str, dtype: str, gradients: bool) -> Prepared | tuple[str, ...]:
    """The example as a planned call, or the reasons for which the card refuses it."""
    q, k, v = (to_family(array, family, dtype) for array in (example.q, example.k, example.v))
    options = {**dict.fromkeys(OPTIONS), "layout": "bhsd", "return_lse": True, **example.options}
    if options["mask"] is not None:
        operands = iter([to_family(operand, family) for operand in options["mask"].operands()])
        options["mask"] = options["mask"].replace_operands(lambda: next(operands))
    for name in ("bias", "sinks"):
        if isinstance(options[name], np.ndarray):
            options[name] = to_family(options[name], family)
    call = prepare(q, k, v, **options)
    problem = replace(call.problem, gradients=_names(call.operands) if gradients else frozenset())
    reasons = card(kernel).refuse(problem)
    if reasons:
        return reasons
    plan = choose(problem, kernel, True)
    arrays = check_arrays(q, k, v, options["layout"])
    checked = check_options(arrays, *(options[name] for name in OPTIONS))
    return Prepared(plan, call.operands, _run_of(plan, checked))


def _names(operands: Operands) -> frozenset[Gradient]:
    given = {"bias": bool(operands.dense), "table": operands.table is not None, "sinks": operands.sinks is not None}
    return frozenset({"q", "k", "v"} | {name for name, there in given.items() if there})


def check(
    example: Example, kernel: str, family: str, dtype: str = "float32", *, gradients: bool = False
) -> tuple[str, ...]:
    """Raise AssertionError unless the kernel computes the example as accurately as promised.

    Returns:
        The card's reasons where it refuses, after making sure that the door gives the same; else ().
    """
    case = prepared(example, kernel, family, dtype, gradients)
    if isinstance(case, tuple):
        _check_refusal(example, kernel, family, dtype, case)
        return case
    plan, operands = case.plan, case.operands
    oracle = reference.attention(plan.problem, operands)
    if not gradients:
        out, lse = case.run(operands)
        check_forward(plan, operands, oracle, out, lse)
        return ()
    rng = np.random.default_rng(7)
    d_out = to_family(rng.standard_normal(oracle.out.shape), family, dtype)
    d_lse = to_family(rng.standard_normal(oracle.lse.shape), family, plan.problem.accumulator)
    differentiate = _by_hand if kernel == "reference" else DIFFERENTIATE[family]
    out, lse, found = differentiate(case, d_out, d_lse)
    check_forward(plan, operands, oracle, out, lse)
    check_gradients(plan, operands, oracle, found, d_out, d_lse)
    return ()


def check_forward(plan: Plan, operands: Operands, oracle: reference.Dense, out: Any, lse: Any) -> None:
    """Shapes, dtypes and values of out and lse."""
    assert str(out.dtype).removeprefix("torch.") == plan.problem.dtype
    assert str(lse.dtype).removeprefix("torch.") == plan.problem.accumulator
    assert_accurate("out", out, oracle.out, plain_out(plan.problem, oracle, operands))
    assert_accurate("lse", lse, oracle.lse)


def check_gradients(
    plan: Plan, operands: Operands, oracle: reference.Dense, found: Gradients, d_out: Any, d_lse: Any
) -> None:
    """Shapes and values of all gradients."""
    exact = reference.gradients(oracle, d_out, d_lse)
    yard = plain_gradients(plan.problem, oracle, operands, d_out, d_lse) or Gradients(
        dense=(None,) * len(operands.dense)
    )
    names = ("q", "k", "v", *(f"bias {n}" for n in range(len(operands.dense))), "table", "sinks")
    triples = zip(names, flat(found), flat(exact), flat(yard), strict=True)
    for name, got, truth, measure in triples:
        assert (got is None) == (truth is None), f"{name}: gradient is {'missing' if got is None else 'unasked for'}"
        if truth is not None:
            assert_accurate(name, got, truth, measure, plan.problem.dtype)


def flat(gradients: Gradients) -> tuple[Any, ...]:
    """q, k, v, each bias, table, sinks."""
    return (gradients.q, gradients.k, gradients.v, *gradients.dense, gradients.table, gradients.sinks)


def _run_of(plan: Plan, checked: Checked) -> Run:
    family = checked.arrays.family
    if family == "numpy":
        return lambda operands: forward_of(plan.kernel).forward(plan, operands)
    run = import_module(f"tilewise.{family}.call").run
    if family == "jax":
        return lambda operands: run(plan, operands)

    def attend(operands: Operands) -> tuple[Any, Any]:
        q, k, v, *dense, table, sinks = leaves(operands)
        arrays = checked.arrays._replace(q=q, k=k, v=v)
        again = checked._replace(arrays=arrays, biases=LoweredBias(tuple(dense), table), sinks=sinks)
        return run(again, plan.problem.layout, plan.kernel, True)

    return attend


def _by_hand(case: Prepared, d_out: Any, d_lse: Any) -> tuple[Any, Any, Gradients]:
    out, lse = case.run(case.operands)
    return out, lse, backward_of(case.plan.backward).backward(case.plan, case.operands, out, lse, d_out, d_lse)


def _by_torch(case: Prepared, d_out: Any, d_lse: Any) -> tuple[Any, Any, Gradients]:
    values = [None if value is None else value.detach().requires_grad_() for value in leaves(case.operands)]
    out, lse = case.run(_with_leaves(case.operands, values))
    wanted = [value for value in values if value is not None]
    found = iter(sys.modules["torch"].autograd.grad((out, lse), wanted, (d_out, d_lse)))
    return out.detach(), lse.detach(), _gradients([None if value is None else next(found) for value in values])


def _by_jax(case: Prepared, d_out: Any, d_lse: Any) -> tuple[Any, Any, Gradients]:
    values = leaves(case.operands)
    (out, lse), pull = sys.modules["jax"].vjp(lambda *leaves: case.run(_with_leaves(case.operands, leaves)), *values)
    return out, lse, _gradients(list(pull((d_out, d_lse))))


DIFFERENTIATE = {"numpy": _by_hand, "torch": _by_torch, "jax": _by_jax}


def _with_leaves(operands: Operands, values: Any) -> Operands:
    q, k, v, *dense, table, sinks = values
    return replace(operands, q=q, k=k, v=v, dense=tuple(dense), table=table, sinks=sinks)


def _gradients(found: list[Any]) -> Gradients:
    return Gradients(found[0], found[1], found[2], tuple(found[3:-2]), found[-2], found[-1])


def _check_refusal(example: Example, kernel: str, family: str, dtype: str, reasons: tuple[str, ...]) -> None:
    q, k, v = (to_family(array, family, dtype) for array in (example.q, example.k, example.v))
    with pytest.raises(tw.KernelRefused) as caught:
        tw.attention(q, k, v, kernel=kernel, **example.options)
    assert set(reasons) <= set(caught.value.reasons) and all(reason.strip() for reason in reasons)
