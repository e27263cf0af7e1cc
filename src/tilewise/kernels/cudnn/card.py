"""Limits of cuDNN's attention in jax. Stated from jax's own checks; not yet run on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

from ...contract import KernelCard, Unavailable
from ...problem import AttentionProblem
from .faults import reasons
from .spelling import keywords

_WIDEST, _WIDEST_ON_HOPPER = 128, 256


def _available() -> Unavailable | None:
    return None if find_spec("jax") else Unavailable("jax is not installed", "pip install 'tilewise[jax]'")


def _widest(problem: AttentionProblem) -> int:
    architecture = problem.architecture
    older = not architecture or architecture.startswith(("sm_7", "sm_8"))
    return _WIDEST if older else _WIDEST_ON_HOPPER


def _further(problem: AttentionProblem) -> tuple[str, ...]:
    p, widest = problem, _widest(problem)
    mask = keywords(p)
    windowed = bool(mask) and "local_window_size" in mask
    limits = (
        (not p.scores, "it takes no call without queries or keys"),
        (p.head_dim > widest or p.head_dim % 8 != 0, f"it takes multiples of 8 up to {widest} as the head dimension"),
        (p.value_dim != p.head_dim, "jax.nn takes values of q's head dimension alone"),
        (mask is None, "it takes no mask, causal from the first key, or that with a window to the left"),
        (windowed and p.q_len > p.k_len, "rows beyond the last key's window would see nothing, which it leaves open"),
        (bool(p.bias.dense), "a bias of -inf for a whole row is not known to give a row that sees nothing"),
        (p.bias.table, "it takes no bias over the distance"),
        (p.softcap is not None, "it has no soft cap"),
        (p.sinks, "it has no sinks"),
        (p.dropout > 0, "its dropout draws other bits, from a fixed seed"),
        (p.return_lse, "jax.nn rounds its log-sum-exp to 16 bits and gives it no gradient"),
        (p.part, "it rounds its results, and a part's are added up"),
    )
    return (*(sentence for holds, sentence in limits if holds), *reasons(p))


CARD = KernelCard(
    name="cudnn",
    summary="cuDNN's attention as jax.nn reaches it",
    families=frozenset({"jax"}),
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"float16", "bfloat16"}),
    gradients=frozenset({"q", "k", "v"}),
    # Its limits come from jax's source and reports. Until a GPU has checked them it runs only when asked for by name.
    automatic=frozenset(),
    further=_further,
    rate=4e14,
    overhead=4e-5,
    available=_available,
)
