"""The two products of attention over visible pairs alone, as jax primitives that are closed under differentiation.

    pair_products(x, y, seen)[r, c] = sum_f x[r, f] y[c, f]           where row r sees row c, else 0
    weighted_rows(w, y, seen)[r, f] = sum of w[r, c] y[c, f]          over the c that row r sees

Each is linear in either factor, and the transpose of each is the other: so values, gradients and tangents of any order
go through these two alone, and NaN or infinity in a row of y never reaches a row that does not see it. A plain matrix
product with zeros at masked pairs would let it through, for 0 * NaN is NaN, and would do so in the transposes that jax
derives, where no caller can step in. That is why they are primitives and not functions.

The precision of products is `jax.default_matmul_precision` where attention is called, and travels as a parameter: what
is in force later, when the compiler asks for the formula, or in the backward pass, may be another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = Any


def pair_products(x: Array, y: Array, seen: Array | None) -> Array:
    """Inner products of visible pairs.

    Args:
        x: (…, R, F). y: (…, C, F), same leading axes and dtype.
        seen: booleans (…, R, C), each leading axis full or 1; None when every pair is visible.

    Returns:
        (…, R, C), 0 at masked pairs.
    """
    return _pairs_p.bind(x, y, *_given(seen), precision=jax.config.jax_default_matmul_precision)


def weighted_rows(w: Array, y: Array, seen: Array | None) -> Array:
    """Sums of the rows that each row sees, with weights.

    Args:
        w: (…, R, C), ignored at masked pairs. y: (…, C, F), same leading axes and dtype.
        seen: as for `pair_products`.

    Returns:
        (…, R, F).
    """
    return _rows_p.bind(w, y, *_given(seen), precision=jax.config.jax_default_matmul_precision)


def _given(seen: Array | None) -> tuple[Array, ...]:
    return () if seen is None else (seen,)


def _products(x: Array, y: Array) -> Array:
    return jnp.einsum("...rf,...cf->...rc", x, y)


def _sums(w: Array, y: Array) -> Array:
    return jnp.einsum("...rc,...cf->...rf", w, y)


def _pairs(x: Array, y: Array, *seen: Array) -> Array:
    return jnp.where(seen[0], _products(x, y), 0) if seen else _products(x, y)


def _kept_apart(w: Array) -> Array:
    # XLA's CPU backend multiplies a transposed matrix several times slower than it transposes and multiplies. Behind
    # the barrier the two stay apart; jax 0.4.31 has none, and is slower there.
    barrier = getattr(jax.lax, "optimization_barrier", None)
    return w if barrier is None else barrier(w)


def _rows(w: Array, y: Array, *seen: Array) -> Array:
    if not seen:
        return _sums(_kept_apart(w), y)
    w, finite = _kept_apart(jnp.where(seen[0], w, 0)), jnp.isfinite(y)
    total = _sums(w, jnp.where(finite, y, 0))
    return jax.lax.cond(finite.all(), lambda total, *_: total, _add_the_rest, total, w, seen[0], y, finite)


def _add_the_rest(total: Array, w: Array, seen: Array, y: Array, finite: Array) -> Array:
    """`total` plus what is not finite, term by term, key after key: rare, so small and not fast."""

    def add(total: Array, column: tuple[Array, ...]) -> tuple[Array, None]:
        w, seen, y, finite = column
        reached = seen[..., None] & ~finite[..., None, :]
        return total + jnp.where(reached, w[..., None] * y[..., None, :], 0), None

    columns = (*(jnp.moveaxis(x, -1, 0) for x in (w, seen)), *(jnp.moveaxis(x, -2, 0) for x in (y, finite)))
    return jax.lax.scan(add, total, columns)[0]


_pairs_p, _rows_p = Primitive("tilewise_pair_products"), Primitive("tilewise_weighted_rows")


def _transpose_pairs(ct: Array, x: Array, y: Array, *seen: Array, **how: Any) -> tuple[Array | None, ...]:
    if ad.is_undefined_primal(x):
        return _rows_p.bind(ct, y, *seen, **how), None, *_none(seen)
    return None, _rows_p.bind(ct.mT, x, *_flipped(seen), **how), *_none(seen)


def _transpose_rows(ct: Array, w: Array, y: Array, *seen: Array, **how: Any) -> tuple[Array | None, ...]:
    if ad.is_undefined_primal(w):
        return _pairs_p.bind(ct, y, *seen, **how), None, *_none(seen)
    return None, _rows_p.bind(w.mT, ct, *_flipped(seen), **how), *_none(seen)


def _flipped(seen: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(mask.mT for mask in seen)


def _none(seen: tuple[Array, ...]) -> tuple[None, ...]:
    return (None,) * len(seen)


def _jvp(primitive: Primitive, primals: tuple, tangents: tuple, **how: Any) -> tuple[Array, Any]:
    (a, b, *seen), (da, db, *_) = primals, tangents
    out = primitive.bind(a, b, *seen, **how)
    parts = [] if type(da) is ad.Zero else [primitive.bind(da, b, *seen, **how)]
    parts += [] if type(db) is ad.Zero else [primitive.bind(a, db, *seen, **how)]
    return out, sum(parts[1:], parts[0])


def _batch(primitive: Primitive, operands: tuple, axes: tuple, **how: Any) -> tuple[Array, int]:
    """One more leading axis: full for the factors, 1 for a mask that is not mapped."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    fronts = (_in_front(x, axis, size if n < 2 else 1) for n, (x, axis) in enumerate(zip(operands, axes, strict=True)))
    return primitive.bind(*fronts, **how), 0


def _in_front(x: Array, axis: int | None, size: int) -> Array:
    return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


def _define(primitive: Primitive, formula: Callable, plain: Callable, transpose: Callable) -> None:
    def at_precision(*operands: Array, precision: str | None) -> Array:
        with jax.default_matmul_precision(precision):
            return formula(*operands)

    def abstract(a: Any, b: Any, *seen: Any, precision: str | None) -> Any:
        # The plain product has the type asked for, with what jax adds to it: shardings and mesh axes.
        return jax.make_jaxpr(plain)(a, b).out_avals[0]

    primitive.def_impl(jax.jit(at_precision, static_argnames="precision"))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(at_precision, multiple_results=False))
    ad.primitive_jvps[primitive] = partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = partial(_batch, primitive)


_define(_pairs_p, _pairs, _products, _transpose_pairs)
_define(_rows_p, _rows, _sums, _transpose_rows)
