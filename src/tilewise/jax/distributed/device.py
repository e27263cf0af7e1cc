"""What one device does of a spread call: heads exchanged where they are, keys that come by, sinks at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ...distributed import Schedule
from ...kernels.portable.jax_scan import Facts, Smooth
from ...masks.part import Run
from ...problem import AttentionProblem
from ..derivative import attention
from ..meshes import all_manual, varying_alike
from .blocks import Work, cut
from .course import gather_course, pieces, ring_course
from .heads import Group
from .travel import attend

Array = Any


@dataclass(frozen=True, slots=True)
class Settings:
    """What is known of a spread call before its arrays; hashable, so that compiled programs are kept by it.

    Attributes:
        problem: of the whole sequence, as a part.
        kernel: asked for by name, or None.
        precision: `jax.default_matmul_precision` where attention is called.
        names: the mesh axes that the sequence is spread over.
        schedule: of all devices.
    """

    problem: AttentionProblem
    kernel: str | None
    precision: str | None
    names: tuple[str, ...]
    schedule: Schedule


def of_shards(settings: Settings, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """`of_rows` for dense biases and masks that have rows for the whole sequence: this device's are cut out."""
    layout = settings.schedule.q
    place = jax.lax.axis_index(settings.names)

    def own(x: Array) -> Array:
        if x.shape[2] != layout.length or layout.ranks == 1:
            return x
        return jnp.concatenate([cut(piece.at(place), x, 2) for piece in pieces(layout)], 2)

    mask = facts.mask
    if mask.dense is not None:
        mask = replace(mask, dense=own(mask.dense))
    return of_rows(settings, smooth._replace(dense=tuple(map(own, smooth.dense))), facts._replace(mask=mask))


def of_rows(settings: Settings, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq local, Dv) in q's dtype and lse (B, Hq, Sq local), inside `shard_map`.

    Args:
        smooth: this device's q, k and v; dense biases of its rows; the whole table; the sinks of all heads.
        facts: of the whole call, but bits in place that are of this device's rows.
    """
    schedule, names = settings.schedule, settings.names
    smooth, facts = varying_alike((smooth, facts), names)
    group = None
    if schedule.heads:
        names, inner = (names[:-1], names[-1:]) if schedule.strategy == "grid" else ((), names)
        group = Group(inner, schedule.heads, schedule.q, schedule.k)
        smooth, facts = group.to_heads(smooth, facts)
    problem = replace(settings.problem, q_heads=smooth.q.shape[1], kv_heads=smooth.k.shape[1])
    if schedule.strategy == "ulysses":
        out, lse = _at_once(settings, problem, smooth, facts)
    else:
        work = Work(problem, settings.kernel, settings.precision, all_manual())
        course = (gather_course if schedule.strategy == "all_gather" else ring_course)(schedule, names)
        out, lse = attend(work, course, smooth._replace(sinks=None), facts)
        if smooth.sinks is not None:
            out, lse = _with_sinks(out, lse, smooth.sinks[:, None])
    out = out.astype(problem.dtype)
    return (out, lse) if group is None else group.to_rows(out, lse)


def _at_once(settings: Settings, problem: AttentionProblem, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """All rows and all keys of some heads are here: a call like one device's, to the same bits."""
    problem = replace(problem, part=False, sinks=smooth.sinks is not None)
    work = Work(problem, settings.kernel, settings.precision, all_manual())
    case, leaves = work.block(smooth, facts, Run(0, problem.q_len), Run(0, problem.k_len))
    return attention(case, *case.parts(leaves), local=work.local)


def _with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Results with one more exponent in each row's denominator; a row that sees nothing keeps its lse of -inf."""
    nothing = lse == -jnp.inf
    held = jnp.where(nothing, sinks, lse)
    total = jnp.logaddexp(held, sinks)
    share = jnp.where(nothing, 1.0, jnp.exp(held - total))
    return out * share[..., None], jnp.where(nothing, -jnp.inf, total)
