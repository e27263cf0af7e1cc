"""What devices send one another: keys to the next, all keys to all, sequences for heads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .course import Course, Pairs

Array = Any
SEQUENCE = 2


def sent(course: Course, arrays: tuple[Array, ...], pairs: Pairs) -> tuple[Array, ...]:
    """What arrives when each (from, to) sends its arrays; zeros where nobody sends."""
    if not pairs:
        return tuple(jnp.zeros_like(x) for x in arrays)
    return tuple(jax.lax.ppermute(x, course.names, pairs) for x in arrays)


def gathered(course: Course, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """All devices' keys where the course gathers them, in the order in which its pieces have them."""
    if not course.gathers:
        return arrays
    whole = tuple(jax.lax.all_gather(x, course.names, axis=SEQUENCE, tiled=True) for x in arrays)
    if course.natural is None:
        return whole
    return tuple(jnp.take(x, np.argsort(course.natural.order()), SEQUENCE) for x in whole)


def scattered(course: Course, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The transpose of `gathered`: sums over the devices, each device's own part."""
    if course.natural is not None:
        arrays = tuple(jnp.take(x, course.natural.order(), SEQUENCE) for x in arrays)
    return tuple(jax.lax.psum_scatter(x, course.names, scatter_dimension=SEQUENCE, tiled=True) for x in arrays)


def heads_for_rows(x: Array, names: tuple[str, ...], order: np.ndarray | None) -> Array:
    """(B, H, S local, …) of all heads as (B, H / devices, S, …): all rows of this device's share of the heads.

    Args:
        order: where the group's rows stand when they are put together, in the order of its devices; None: as they come.
    """
    x = jax.lax.all_to_all(x, names, 1, SEQUENCE, tiled=True)
    return x if order is None else jnp.take(x, order, SEQUENCE)


def rows_for_heads(x: Array, names: tuple[str, ...], order: np.ndarray | None) -> Array:
    """The inverse of `heads_for_rows`."""
    x = x if order is None else jnp.take(x, np.argsort(order), SEQUENCE)
    return jax.lax.all_to_all(x, names, SEQUENCE, 1, tiled=True)


def all_rows(x: Array, names: tuple[str, ...], order: np.ndarray | None) -> Array:
    """(B', 1, S local, …) as (B', 1, S, …): the rows of the whole group."""
    x = jax.lax.all_gather(x, names, axis=SEQUENCE, tiled=True)
    return x if order is None else jnp.take(x, order, SEQUENCE)
