"""The steps from a call's arguments to its statistics: the check, the log-sum-exp, the walk, what is left per row."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .._api import attention
from .._arrays import Array, dtype_name, family_of
from ..kernels.portable.axes import ungrouped
from ..kernels.portable.call import Call as PortableCall
from ..validate import Call, prepare
from .leaders import Leaders
from .measure import measure
from .question import Question

_MINUS_INF = float("-inf")


def checked(q: Array, k: Array, options: dict[str, Any]) -> Call:
    """The checked call; its values are the keys, which nobody reads."""
    if family_of(q) == "jax":
        raise TypeError("q: got a jax array, expected a NumPy array or a torch tensor")
    return prepare(q, k, k, **{"dropout": None, **options}, return_lse=True)


def log_denominators(q: Array, k: Array, lse: Array | None, options: dict[str, Any], call: PortableCall) -> Array:
    """The log-sum-exp (B, Hq, Sq) in the accumulator's dtype: the caller's, or that of `attention`."""
    problem = call.problem
    if lse is None:
        # One number per key serves as its value; the log-sum-exp does not depend on it.
        v = k[..., :1]
        lse = attention(q, k, v.detach() if problem.family == "torch" else v, **options, return_lse=True)[1]
    elif family_of(lse) != problem.family or "float" not in dtype_name(lse):
        raise TypeError(f"lse: got {type(lse).__name__}, expected floats, a {problem.family} array as q is")
    packed, rows = problem.layout == "thd", (problem.q_heads, problem.q_len)
    expected = rows if packed else (problem.batch, *rows)
    if tuple(lse.shape) != expected:
        raise ValueError(f"lse: has shape {tuple(lse.shape)}, expected {expected}, as attention returns it")
    lse = call.verbs.to(lse, call.verbs.dtype)
    return lse[None] if packed else lse


def without_empty(call: PortableCall, lse: Array) -> Array:
    """lse, heads grouped, with 0 for rows that see nothing."""
    return call.rows(call.verbs.xp.where(lse == _MINUS_INF, 0.0, lse))


def answer(asked: Question, held: Array) -> tuple[list[Array], Leaders | None]:
    """The sums, heads grouped, and the leaders: through torch's door, which adds derivatives, or straight."""
    call = asked.call
    arrays = (call.q, call.k, *(bias for _, bias in call.biases), held)
    if call.problem.family == "torch":
        return import_module("tilewise.torch.statistics").run(asked, arrays)
    return measure(asked, arrays)


def surprise_of_sinks(call: PortableCall, sinks: Array | None, lse: Array, held: Array) -> Array | float:
    """-p log p of each row's sink, (B, Hkv, G, Sq)."""
    if sinks is None:
        return 0.0
    xp = call.verbs.xp
    sinks = call.verbs.cast(sinks).reshape(*call.q.shape[1:3], 1)
    # Held at the row's own lse, where 1 * log 1 is 0, if there is no row or no sink.
    gone = (call.rows(lse) == _MINUS_INF) | (sinks == _MINUS_INF)
    log_p = xp.where(gone, held, sinks) - held
    return -xp.exp(log_p) * log_p


def probabilities(call: PortableCall, leaders: Leaders, held: Array) -> tuple[Array, Array]:
    """(values, keys), (B, Hq, Sq, K) each, of the leaders."""
    xp, none, base = call.verbs.xp, leaders.keys < 0, held[..., None]
    # Where there is no key the exponent is made 0 first, so that no derivative meets the exp of something huge.
    values = xp.where(none, 0.0, xp.exp(xp.where(none, base, leaders.scores) - base))
    return ungrouped(values), ungrouped(leaders.keys)


def over_heads(sums: Array, heads: str) -> Array:
    """Column sums (B, Hkv, G, Sk) as `column_heads` asks for them."""
    match heads:
        case "kv":
            return sums.sum(2)
        case "mean":
            return sums.mean((1, 2))
        case "sum":
            return sums.sum((1, 2))
    return ungrouped(sums)
