"""The public functions: arguments are checked as those of `attention`, the log-sum-exp comes from its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._arrays import Array
from ..contract import Dropout
from ..errors import QuadraticMemory
from ..kernels.portable.axes import ungrouped
from ..kernels.portable.call import make_call
from ..kernels.portable.tiles import default_tiles
from ..masks.algebra import Mask
from ..masks.biases import Bias
from .answer import answer, checked, log_denominators, over_heads, probabilities, surprise_of_sinks, without_empty
from .question import Question

_HEADS = ("each", "kv", "mean", "sum")


class AttentionStatistics(NamedTuple):
    """What `attention_statistics` found; None where it was not asked for. Floats are in the accumulator's dtype.

    Attributes:
        lse: (B, Hq, Sq) log of each row's denominator, -inf for a row that sees nothing.
        column_sums: (B, Hq, Sk), the probability that each key received, summed over the queries; see `column_heads`.
        entropy: (B, Hq, Sq), in nats; 0 for a row that sees nothing.
        max_logit: (B, Hq, Sq), the largest score of each row after scale, soft cap and bias; -inf for a row that sees
            nothing. A sink is no score.
        top_values: (B, Hq, Sq, top_k), the largest probabilities of each row, descending; 0 beyond the keys it sees.
        top_indices: (B, Hq, Sq, top_k) int64, the keys they belong to; -1 beyond the keys it sees.
    """

    lse: Array
    column_sums: Array | None = None
    entropy: Array | None = None
    max_logit: Array | None = None
    top_values: Array | None = None
    top_indices: Array | None = None


def attention_statistics(
    q: Array,
    k: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    layout: str = "bhsd",
    lse: Array | None = None,
    column_sums: bool = False,
    column_heads: str = "each",
    entropy: bool = False,
    max_logit: bool = False,
    top_k: int = 0,
) -> AttentionStatistics:
    """Facts about the probabilities of `attention(q, k, …)`, before dropout, in memory linear in Sq + Sk.

    One pass over the tiles that some row sees, after one of `attention` for the log-sum-exp unless that is given.

    The entropy of a row is -sum p log p over its keys and, with `sinks`, over the sink as one more outcome: the
    probabilities of keys alone would not sum to 1. Of equal scores the lower key comes first among the largest.

    In torch every float in the result has a first derivative by q, k, bias, sinks and a given lse, reverse mode; the
    choice of the largest is held. Second derivatives, forward mode and functorch transforms raise.

    Args:
        q: queries (B, Hq, Sq, D); k: keys (B, Hkv, Sk, D); NumPy arrays or torch tensors.
        mask, bias, scale, softcap, sinks, layout: as for `attention`.
        lse: (B, Hq, Sq), or (Hq, T) for layout "thd", from `attention(…, return_lse=True)` of the same arguments.
        column_sums, entropy, max_logit: whether these are wanted.
        column_heads: "each" query head's column sums (B, Hq, Sk); "kv", summed over the query heads that share a kv
            head, (B, Hkv, Sk); "mean" or "sum" over all heads, (B, Sk).
        top_k: how many of the largest probabilities of each row are wanted.

    Returns:
        `AttentionStatistics`; for layout "thd" without the axis B.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name. jax arrays are not taken.
    """
    if column_heads not in _HEADS:
        raise ValueError(f"column_heads: got {column_heads!r}, expected one of {', '.join(map(repr, _HEADS))}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k: got {type(top_k).__name__}, expected an int")
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, expected 0 or more")
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks, "layout": layout}
    given = checked(q, k, options)
    call = make_call(given.problem, given.operands, default_tiles(given.problem))
    everything, top = slice(0, given.problem.q_len), max(top_k, int(bool(max_logit)))
    asked = Question(call, everything, column_sums=bool(column_sums), entropy=bool(entropy), top=top)
    lse = log_denominators(q, k, lse, options, call)
    held = without_empty(call, lse)
    with call.verbs.quiet():
        sums, leaders = answer(asked, held)
        found: dict[str, Any] = {"lse": lse}
        if column_sums:
            found["column_sums"] = over_heads(sums.pop(0)[..., 0, :], column_heads)
        if entropy:
            found["entropy"] = ungrouped(sums.pop(0) + surprise_of_sinks(call, given.operands.sinks, lse, held))
        if leaders is not None and max_logit:
            found["max_logit"] = ungrouped(leaders.scores)[..., 0]
        if leaders is not None and top_k:
            found["top_values"], found["top_indices"] = probabilities(call, leaders, held)
    packed = layout == "thd"
    return AttentionStatistics(**{name: value[0] if packed else value for name, value in found.items()})


def attention_weights(
    q: Array,
    k: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Bias | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | float | None = None,
    dropout: Dropout | None = None,
    layout: str = "bhsd",
    lse: Array | None = None,
    average: bool = False,
    rows: slice | None = None,
    allow_quadratic: bool = False,
) -> Array:
    """The weights themselves: what `attention` multiplies the values with, 0 where a row does not see a key.

    The mean over heads is summed tile by tile, without the heads' own matrices. In torch differentiable once, as
    `attention_statistics` is.

    Args:
        q: queries (B, Hq, Sq, D); k: keys (B, Hkv, Sk, D); NumPy arrays or torch tensors.
        mask, bias, scale, softcap, sinks, dropout, layout: as for `attention`.
        lse: as for `attention_statistics`.
        average: whether the mean over heads is wanted.
        rows: the queries wanted, a slice with step 1; None is all, whose weights are Sq * Sk numbers.
        allow_quadratic: accept that size.

    Returns:
        (B, Hq, rows, Sk), or with `average` (B, rows, Sk), in q's dtype; for layout "thd" without the axis B.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name. jax arrays are not taken.
        QuadraticMemory: neither `rows` nor `allow_quadratic` is given.
    """
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sinks": sinks, "layout": layout}
    given = checked(q, k, {**options, "dropout": dropout})
    problem = given.problem
    if rows is None and not allow_quadratic:
        raise QuadraticMemory(
            f"allow_quadratic: the weights of {problem.q_len} queries and {problem.k_len} keys are quadratic by "
            "themselves; pass allow_quadratic=True to accept that, or ask for some rows="
        )
    call = make_call(problem, given.operands, default_tiles(problem))
    asked = Question(call, _rows(rows, problem.q_len), weights="mean" if average else "each")
    (weights,), _ = answer(asked, without_empty(call, log_denominators(q, k, lse, options, call)))
    weights = call.verbs.to(ungrouped(weights), q.dtype)
    weights = weights[:, 0] if average else weights
    return weights[0] if layout == "thd" else weights


def _rows(rows: slice | None, q_len: int) -> slice:
    """The rows asked for, inside 0 … Sq."""
    if rows is None:
        return slice(0, q_len)
    if not isinstance(rows, slice):
        raise TypeError(f"rows: got {type(rows).__name__}, expected a slice")
    start, stop, step = rows.indices(q_len)
    if step != 1:
        raise ValueError(f"rows: got a step of {step}, expected 1")
    return slice(start, max(start, stop))
