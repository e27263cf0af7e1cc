"""A choice among strategies in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .._arrays import Array
from ..plan.explain import quantity
from ..problem import AttentionProblem, Gradient
from ..validate import prepare
from .cost import Choice, Cost, choose_layout, choose_strategy
from .layout import Layout
from .machine import Machine

_OPTIONS = {"mask": None, "bias": None, "scale": None, "softcap": None, "sinks": None, "dropout": None}


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    ranks: int,
    layout: str | None = None,
    machine: Machine | None = None,
    backward: bool = True,
    **options: Any,
) -> Choice:
    """What a call would cost over several ranks by each strategy, and which is chosen. Nothing is computed or sent.

    Args:
        q, k, v: the whole call's arrays, shapes (B, H, S, D); only their outlines are read.
        ranks: over how many the sequence is spread; layout: "contiguous", "zigzag" or "stripe"; None: all are compared.
        machine: rates of ranks and links, see `Machine`; None: assumed by the arrays' device.
        backward: count the backward pass, too.
        options: mask, bias, scale, softcap, sinks, dropout, layout of axes as `axes`, as for `tilewise.attention`.

    Returns:
        A `Choice`; `str(choice)` is a table of steps, bytes, operations and predicted seconds of the busiest rank.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """
    unknown = set(options) - set(_OPTIONS) - {"axes"}
    if unknown:
        raise TypeError(f"options: got {', '.join(sorted(unknown))}, expected some of {', '.join(_OPTIONS)}, axes")
    axes = options.pop("axes", "bhsd")
    call = prepare(q, k, v, **{**_OPTIONS, **options}, layout=axes, return_lse=False)
    wanted: frozenset[Gradient] = frozenset({"q", "k", "v"} if backward else ())
    problem = replace(call.problem, gradients=wanted)
    return over_ranks(problem, call.operands.mask, ranks, layout, machine)


def over_ranks(
    problem: AttentionProblem, mask: Any, ranks: int, layout: str | None = None, machine: Machine | None = None
) -> Choice:
    """The choice for a problem and its lowered mask; a layout of None compares all."""
    if layout is None:
        return choose_layout(problem, mask, ranks, machine)
    q, k = (Layout(layout, length, ranks) for length in (problem.q_len, problem.k_len))  # type: ignore[arg-type]
    return choose_strategy(problem, mask, q, k, machine)


def table(choice: Choice) -> str:
    """The choice as lines of text."""
    pairs = list(rows(choice))
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in pairs)


def rows(choice: Choice) -> Iterator[tuple[str, str]]:
    """The choice as pairs of a name and a text, a pair for each strategy and layout."""
    best, machine = choice.best, choice.machine
    yield "strategy", f"{best.name}, {best.kind} layout, over {choice.ranks} ranks"
    rates = f"{quantity(machine.flops, 'FLOP/s')} a rank, {quantity(machine.bandwidth, 'B/s')} and"
    yield (
        "machine",
        f"{rates} {machine.latency * 1e6:.3g} us between nodes of {machine.node}"
        + (f" ({machine.name})" if machine.name else ""),
    )
    for cost, (name, why) in zip(choice.costs, choice.reasons, strict=True):
        if cost.refused:
            yield f"not {name}", why
            continue
        yield name, f"{_numbers(cost, bool(choice.problem.gradients))}; {why}"


def _numbers(cost: Cost, backward: bool) -> str:
    steps = f"{cost.steps} step" + ("s" if cost.steps != 1 else "")
    work = f"{quantity(cost.flops, 'FLOP')} ({cost.imbalance:.2f} of the mean)"
    seconds = _time(cost.forward) + (f" + {_time(cost.backward)} backward" if backward else "")
    return f"{seconds}: {steps}, {work}, sends {quantity(cost.sent, 'B')}, holds {quantity(cost.held, 'B')} more"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
