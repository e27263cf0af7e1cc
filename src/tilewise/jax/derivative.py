"""The maps of attention as jax primitives that are closed under differentiation.

The derivative of `attend` is `tangent`; `tangent` and `backward` are each other's transposes. So forward and reverse
mode meet a fused kernel wherever there is one, and never the operations inside it. Beyond that, in second derivatives,
the portable kernel is differentiated as the jax program it is, in memory linear in Sq + Sk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from ..kernels.portable.jax_scan import Facts, Smooth
from .case import Case, Flags
from .maps import ATTEND, BACKWARD, TANGENT, Map
from .partition import needs_devices, partitioned
from .vectorize import batch

Array = Any


def attention(case: Case, smooth: Smooth, facts: Facts, local: bool = False) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in the case's dtype, lse (B, Hq, Sq) in the accumulator's; `local` as for `Map.bind`."""
    out, lse = ATTEND.bind(*jax.tree.leaves((smooth, facts)), case=case, local=local)
    return out, lse


def _derivative(primals: tuple, tangents: tuple, *, case: Case, chosen: Flags, local: bool) -> tuple[list, list]:
    """The derivative of `attend`: `tangent` along the operands that move."""
    results = ATTEND.bind(*primals, case=case, local=local)
    moving = tuple(type(t) is not ad.Zero for t in tangents[: case.movable])
    if not any(moving):
        return results, [ad.Zero.from_primal_value(x) for x in results]
    given = [t for t, moves in zip(tangents, moving, strict=False) if moves]
    return results, TANGENT.bind(*given, *primals, *results, case=case, chosen=moving, local=local)


def _transpose_tangent(cotangents: list, *operands: Any, case: Case, chosen: Flags, local: bool) -> list:
    given, primals = operands[: sum(chosen)], operands[sum(chosen) :]
    asked = [ad.is_undefined_primal(x) for x in given]
    rest = iter(asked)
    wanted = tuple(moves and next(rest) for moves in chosen)
    gradients = map(ad.instantiate_zeros, cotangents)
    found = iter(BACKWARD.bind(*gradients, *primals, case=case, chosen=wanted, local=local))
    return [next(found) if wants else None for wants in asked] + [None] * len(primals)


def _transpose_backward(cotangents: list, *operands: Any, case: Case, chosen: Flags, local: bool) -> list:
    primals, given = operands[2:], [ct for ct in cotangents if type(ct) is not ad.Zero]
    rest = iter(cotangents)
    moving = tuple(wanted and type(next(rest)) is not ad.Zero for wanted in chosen)
    found = TANGENT.bind(*given, *primals, case=case, chosen=moving, local=local)
    return [x if ad.is_undefined_primal(y) else None for x, y in zip(found, operands, strict=False)] + [None] * len(
        primals
    )


def _derivative_of_linear(of: Map) -> Callable[..., tuple[list, list]]:
    """The derivative of a map that is linear in its first operands and smooth in the others."""

    def rule(primals: tuple, tangents: tuple, **settings: Any) -> tuple[list, list]:
        case, chosen = settings["case"], settings["chosen"]
        count = len(of.linear(case, chosen))
        results, terms = of.bind(*primals, **settings), []
        if any(type(t) is not ad.Zero for t in tangents[:count]):
            terms.append(of.bind(*map(ad.instantiate_zeros, tangents[:count]), *primals[count:], **settings))
        movers = [n for n, t in enumerate(tangents) if n >= count and type(t) is not ad.Zero]
        if movers:

            def function(*moved: Array) -> list[Array]:
                replaced = dict(zip(movers, moved, strict=True))
                return of.compute(case, False, chosen, *(replaced.get(n, x) for n, x in enumerate(primals)))

            terms.append(jax.jvp(function, [primals[n] for n in movers], [tangents[n] for n in movers])[1])
        return results, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]

    return rule


def _define(of: Map) -> None:
    primitive = of.primitive
    primitive.multiple_results = True
    needs_devices(of)

    def types(*operands: Any, case: Case, chosen: Flags, local: bool) -> list[Any]:
        wanted, first = of.types(case, chosen, operands), operands[len(of.linear(case, chosen))]
        # Zeros like q have what jax adds to a type: on which mesh it is, and over which of its axes it varies.
        return jax.make_jaxpr(lambda x: [jnp.zeros_like(x, shape=s, dtype=d) for s, d in wanted])(first).out_avals

    def program(cpu: bool, *operands: Array, case: Case, chosen: Flags, local: bool) -> list[Array]:
        if not local:
            return partitioned(of, case, chosen)(*operands)
        return of.compute(case, cpu, chosen, *operands)

    def now(*operands: Array, **settings: Any) -> list[Array]:
        with jax.disable_jit(False):  # there is nothing to see step by step inside
            return _compiled(of, **settings)(*operands)

    primitive.def_impl(now)
    primitive.def_abstract_eval(types)
    batching.primitive_batchers[primitive] = partial(batch, of)
    mlir.register_lowering(primitive, mlir.lower_fun(partial(program, False), multiple_results=True))
    mlir.register_lowering(primitive, mlir.lower_fun(partial(program, True), multiple_results=True), platform="cpu")


@lru_cache(maxsize=1024)
def _compiled(of: Map, **settings: Any) -> Callable[..., list[Array]]:
    return jax.jit(partial(of.bind, **settings))


for _map in (ATTEND, TANGENT, BACKWARD):
    _define(_map)
ad.primitive_jvps[ATTEND.primitive] = _derivative
for _map, _transpose in ((TANGENT, _transpose_tangent), (BACKWARD, _transpose_backward)):
    ad.primitive_jvps[_map.primitive] = _derivative_of_linear(_map)
    ad.primitive_transposes[_map.primitive] = _transpose
