"""Walk the cards, keep the refusals, rank the rest by estimated or measured time."""

from __future__ import annotations

from functools import lru_cache

from ..contract import KernelCard, Plan
from ..errors import KernelRefused, QuadraticMemory
from ..kernels import NAMES, cards
from ..problem import AttentionProblem
from .measured import Step, Table, table_for


def choose(problem: AttentionProblem, kernel: str | None = None, allow_quadratic: bool = False) -> Plan:
    """The plan for a problem, remembered by problem.

    Args:
        kernel: run this kernel or raise; None lets the cheapest that refuses nothing run.
        allow_quadratic: whether memory proportional to Sq * Sk is acceptable.

    Raises:
        ValueError: no kernel has that name.
        KernelRefused: the kernel asked for, or every kernel, refuses; with each reason.
        QuadraticMemory: only memory in Sq * Sk would do and `allow_quadratic` is False.
    """
    check_name(kernel)
    return planned(problem, kernel, allow_quadratic)


def check_name(kernel: str | None) -> None:
    """Raise ValueError unless it is the name of a kernel, or None."""
    if kernel is not None and kernel not in NAMES:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(map(repr, NAMES))} or None")


@lru_cache(maxsize=4096)
def planned(problem: AttentionProblem, kernel: str | None, allow_quadratic: bool) -> Plan:
    """`choose` for a name that is known to be one: the part that is remembered."""
    known, measured = cards(), table_for(problem.model) if problem.device != "cpu" else None
    refusals = {card.name: refusals_of(card, problem, kernel, measured) for card in known}
    willing = [card for card in known if not refusals[card.name]]
    if kernel is not None:
        willing = [card for card in willing if card.name == kernel]
    if not willing:
        named = refusals[kernel] if kernel else [f"{name}: {reason}" for name in refusals for reason in refusals[name]]
        raise KernelRefused(kernel or "auto", named)
    card = min(willing, key=lambda card: _seconds(card, problem, "forward", measured))
    if not card.linear_memory and not allow_quadratic:
        raise QuadraticMemory(
            f"allow_quadratic: kernel {card.name!r} needs memory for {problem.q_len} x {problem.k_len} scores a head; "
            f"pass allow_quadratic=True to accept that"
        )
    tiles = card.tiles(problem)
    others = {name: reasons or (_slower(card, kernel),) for name, reasons in refusals.items() if name != card.name}
    backward = _backward(card, known, problem, measured) if problem.gradients else None
    return Plan(
        problem,
        card.name,
        backward.name if backward else None,
        tiles,
        card.workspace(problem, tiles),
        others,
        forced=kernel is not None,
        way=_way(card, problem, "forward", measured),
        backward_way=_way(backward, problem, "backward", measured) if backward else "",
        careful=_careful(known, problem, measured) if card.finite_only or (backward and backward.finite_only) else None,
        tangent=card.name if problem.dtype in card.tangents else "portable",
    )


def refusals_of(
    card: KernelCard, problem: AttentionProblem, kernel: str | None, measured: Table | None = None
) -> tuple[str, ...]:
    """A card's reasons, and that it is never chosen unasked where that is so."""
    reasons = card.refuse(problem)
    return reasons if card.name == kernel else (*reasons, *_not_unasked(card, problem, "forward", measured))


def _not_unasked(card: KernelCard, problem: AttentionProblem, step: Step, measured: Table | None) -> tuple[str, ...]:
    """Why a card may not be chosen without being asked for, as a sentence or none."""
    if not card.unasked(problem.device):
        return ("it runs only when asked for by name",)
    if not card.needs_table:
        return ()
    unless = "it runs unasked only where a GPU run has checked and timed it"
    if measured is None:
        return (f"{unless}, and there is no table of {problem.model or 'this device, whose name is not known'}",)
    if measured.rate(problem, card.name, _ways(card, problem, step), step) is None:
        return (f"{unless}, and the table of {measured.device} has nothing like this problem",)
    return ()


def _seconds(card: KernelCard, problem: AttentionProblem, step: Step, measured: Table | None) -> float:
    """Estimated time of a pass: at the measured rate where there is one, else by the card's rough one."""
    rate = measured.rate(problem, card.name, _ways(card, problem, step), step) if measured else None
    return card.cost(problem) if rate is None else card.overhead + problem.flops() / rate


def _ways(card: KernelCard, problem: AttentionProblem, step: Step) -> tuple[str, ...]:
    """The ways that fit a pass; none where the card has but one way."""
    return card.ways(problem) if step == "forward" else card.backward_ways(problem)


def _way(card: KernelCard, problem: AttentionProblem, step: Step, measured: Table | None) -> str:
    """The fastest measured of a card's ways, or its first."""
    ways = _ways(card, problem, step)
    if not ways:
        return ""
    fastest = measured.fastest(problem, card.name, ways, step) if measured else None
    return fastest or ways[0]


def _slower(card: KernelCard, kernel: str | None) -> str:
    return (
        f"it could run, but {kernel!r} was asked for"
        if kernel
        else f"it could run, but {card.name} is estimated faster"
    )


def _backward(
    chosen: KernelCard, known: tuple[KernelCard, ...], problem: AttentionProblem, measured: Table | None
) -> KernelCard:
    """The kernel of the backward pass: the forward's own where it has one, else the cheapest that does.

    Where the device has a measured table, the cheapest of all that may be chosen unasked.
    """
    reasons = {card.name: card.refuse_backward(problem) for card in known}
    if not reasons[chosen.name] and measured is None:
        return chosen
    willing = [
        card
        for card in known
        if not reasons[card.name] and (card is chosen or not _not_unasked(card, problem, "backward", measured))
    ]
    if not willing:
        raise KernelRefused("auto", [f"backward of {name}: {reason}" for name in reasons for reason in reasons[name]])
    return min(willing, key=lambda card: _seconds(card, problem, "backward", measured))


def _careful(known: tuple[KernelCard, ...], problem: AttentionProblem, measured: Table | None) -> str | None:
    """The cheapest kernel that can run both passes and whose results are right whatever they are."""
    willing = [
        card
        for card in known
        if not card.finite_only
        and card.linear_memory
        and not refusals_of(card, problem, None, measured)
        and not (problem.gradients and card.refuse_backward(problem))
    ]
    return min(willing, key=lambda card: _seconds(card, problem, "forward", measured)).name if willing else None
