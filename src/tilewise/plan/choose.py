"""Walk the cards, keep the refusals, rank the rest by estimated cost."""

from __future__ import annotations

from functools import lru_cache

from ..contract import KernelCard, Plan
from ..errors import KernelRefused, QuadraticMemory
from ..kernels import NAMES, cards
from ..problem import AttentionProblem


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
    if kernel is not None and kernel not in NAMES:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(map(repr, NAMES))} or None")
    return planned(problem, kernel, allow_quadratic)


@lru_cache(maxsize=4096)
def planned(problem: AttentionProblem, kernel: str | None, allow_quadratic: bool) -> Plan:
    """`choose` for a name that is known to be one: the part that is remembered."""
    known = cards()
    refusals = {card.name: refusals_of(card, problem, kernel) for card in known}
    willing = [card for card in known if not refusals[card.name]]
    if kernel is not None:
        willing = [card for card in willing if card.name == kernel]
    if not willing:
        named = refusals[kernel] if kernel else [f"{name}: {reason}" for name in refusals for reason in refusals[name]]
        raise KernelRefused(kernel or "auto", named)
    card = min(willing, key=lambda card: card.cost(problem))
    if not card.linear_memory and not allow_quadratic:
        raise QuadraticMemory(
            f"allow_quadratic: kernel {card.name!r} needs memory for {problem.q_len} x {problem.k_len} scores a head; "
            f"pass allow_quadratic=True to accept that"
        )
    tiles = card.tiles(problem)
    others = {
        name: reasons or (_slower(card, name, kernel),) for name, reasons in refusals.items() if name != card.name
    }
    backward = _backward(card, known, problem) if problem.gradients else None
    return Plan(problem, card.name, backward, tiles, card.workspace(problem, tiles), others, forced=kernel is not None)


def refusals_of(card: KernelCard, problem: AttentionProblem, kernel: str | None) -> tuple[str, ...]:
    """A card's reasons, and that it is never chosen unasked where that is so."""
    reasons = card.refuse(problem)
    return reasons if card.automatic or card.name == kernel else (*reasons, "it runs only when asked for by name")


def _slower(card: KernelCard, name: str, kernel: str | None) -> str:
    return (
        f"it could run, but {kernel!r} was asked for"
        if kernel
        else f"it could run, but {card.name} is estimated faster"
    )


def _backward(chosen: KernelCard, known: tuple[KernelCard, ...], problem: AttentionProblem) -> str:
    """The kernel of the backward pass: the forward's own where it has one, else the cheapest that does."""
    reasons = {card.name: card.refuse_backward(problem) for card in known}
    if not reasons[chosen.name]:
        return chosen.name
    willing = [card for card in known if card.automatic and not reasons[card.name]]
    if not willing:
        raise KernelRefused("auto", [f"backward of {name}: {reason}" for name in reasons for reason in reasons[name]])
    return min(willing, key=lambda card: card.cost(problem)).name
