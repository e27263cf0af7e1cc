"""The planner's walk, printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..contract import Plan
from ..kernels import card_of
from ..masks.lower import LoweredMask
from ..masks.tiles import EMPTY, FULL, classify
from ..problem import AttentionProblem

# Looking at more pairs than this just to print a share would take longer than a reader waits.
_MOST_PAIRS_LOOKED_AT = 1 << 28
_MOST_TILES_A_SIDE = 256


def with_details(plan: Plan, mask: LoweredMask) -> Plan:
    """The plan with what only a reader wants to know: share of tiles skipped, operations, bytes."""
    problem = plan.problem
    details: dict[str, Any] = {}
    shares = _tile_shares(mask, problem)
    if shares is None:
        details["tiles"] = "not counted (the mask's values are not known here, or are too many)"
        visible = 1.0
    else:
        empty, mixed, full = shares
        details["tiles"] = f"{empty:.1%} skipped, {mixed:.1%} mixed, {full:.1%} full"
        visible = 1.0 - empty
    details["flops"] = problem.flops(visible)
    details["bytes"] = problem.io_bytes()
    return replace(plan, details=details)


def _tile_shares(mask: LoweredMask, problem: AttentionProblem) -> tuple[float, float, float] | None:
    """(empty, mixed, full) shares of tiles, counted on tiles no smaller than 64."""
    if not mask.site.concrete or not problem.scores:
        return None
    looked_at = mask.lazy is not None or mask.dense is not None or mask.q_labels is not None
    if looked_at and problem.scores > _MOST_PAIRS_LOOKED_AT:
        return None
    q_tile, k_tile = (max(64, -(-length // _MOST_TILES_A_SIDE)) for length in (problem.q_len, problem.k_len))
    states = classify(mask, q_tile, k_tile)
    empty, full = float((states == EMPTY).mean()), float((states == FULL).mean())
    return empty, max(0.0, 1.0 - empty - full), full


def table(plan: Plan) -> str:
    """The plan as lines of text in two columns."""
    pairs = list(rows(plan))
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in pairs)


def rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """The plan as pairs of a name and a text; the name is empty where a text continues the one above."""
    problem, details = plan.problem, plan.details
    yield "kernel", _named(plan.kernel, plan.way) + (" (asked for)" if plan.forced else "")
    if plan.backward:
        yield "backward", _named(plan.backward, plan.backward_way)
        if plan.backward_way in card_of(plan.backward).unordered:
            yield "", "its sums have no fixed order, which TILEWISE_DETERMINISTIC=0 allows: equal calls may differ in"
            yield "", "the last bits of their gradients"
    if problem.family != "numpy":
        yield "tangents", plan.tangent
    if plan.careful:
        yield "not finite", f"results with NaN or infinity are computed again by {plan.careful}"
    if arithmetic := card_of(plan.kernel).arithmetic(problem):
        yield "arithmetic", arithmetic
    yield "problem", _sizes(problem)
    device = problem.device + (f" ({problem.model})" if problem.model else "")
    yield "arrays", f"{problem.family} {problem.dtype} on {device}, layout {problem.layout}" + _traced(problem)
    yield "mask", f"{problem.mask.text} -> {_facts(problem)}"
    options = ", ".join(_options(problem))
    if options:
        yield "options", options
    if problem.invariance == "row":
        yield "invariance", "row: a prefill, its chunks and single queries sum in one order, and give the same bits"
        yield "", "few queries run as many do, which takes longer than the order that suits them best"
    split = f", keys split every {plan.tiles.split}" if plan.tiles.split else ""
    yield "tiles", f"{plan.tiles.queries} queries x {plan.tiles.keys} keys{split}"
    if "tiles" in details:
        yield "", details["tiles"]
    if "flops" in details:
        flops, moved = quantity(details["flops"], "FLOP"), quantity(details["bytes"], "B")
        yield "work", f"{flops}, {moved} of inputs and outputs"
    yield "workspace", quantity(plan.workspace, "B")
    for name, reasons in plan.refusals.items():
        for n, reason in enumerate(reasons):
            yield f"not {name}" if n == 0 else "", reason


def _named(kernel: str, way: str) -> str:
    return f"{kernel} ({way})" if way else kernel


def _sizes(problem: AttentionProblem) -> str:
    heads = f"{problem.q_heads}" if problem.group == 1 else f"{problem.q_heads}/{problem.kv_heads}"
    width = (
        f"{problem.head_dim}" if problem.head_dim == problem.value_dim else f"{problem.head_dim}/{problem.value_dim}"
    )
    return f"batch {problem.batch}, heads {heads}, queries {problem.q_len}, keys {problem.k_len}, width {width}"


def _traced(problem: AttentionProblem) -> str:
    return ", traced" if problem.traced else ""


def _facts(problem: AttentionProblem) -> str:
    mask = problem.mask
    parts = [f"{mask.ranges} range{'s' if mask.ranges > 1 else ''} a row"] if mask.ranges else []
    parts += ["labels"] if mask.labels else []
    parts += [{"dense": "a boolean array in place", "lazy": "bits by tile"}[mask.bits]] if mask.bits else []
    return " & ".join(parts) or "all pairs visible"


def _options(problem: AttentionProblem) -> Iterator[str]:
    yield f"scale {problem.scale:.6g}"
    if problem.softcap is not None:
        yield f"softcap {problem.softcap:g}"
    for shape in problem.bias.dense:
        yield f"dense bias {'x'.join(map(str, shape))}"
    if problem.bias.table:
        yield "relative bias table"
    if problem.sinks:
        yield "sinks"
    if problem.dropout:
        yield f"dropout {problem.dropout:g}"
    if problem.gradients:
        yield f"gradients to {', '.join(sorted(problem.gradients))}"


def quantity(value: float, unit: str) -> str:
    """A number with a decimal prefix: 1.37e11, 'B' -> '137 GB'."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
