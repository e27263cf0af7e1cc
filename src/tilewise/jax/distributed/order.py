"""The order of a spread sequence: where each device's rows stand in the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...distributed import Kind, Layout
from .course import pieces

Array = Any
Names = tuple[str, ...]


def shard(x: Array, ranks: int, *, sharding: Kind = "contiguous", axis: int = 2) -> Array:
    """`x` reordered along `axis`, so that its n-th of `ranks` equal pieces is what device n holds.

    Args:
        x: a whole array in the sequence's own order; axis: that of the sequence, 2 for (B, H, S, D).
        ranks: number of devices that the sequence is spread over.
        sharding: "contiguous" changes nothing; "zigzag" and "stripe" balance causal masks, see `Layout`.

    Raises:
        ValueError: "x: …" where the length does not divide.
    """
    layout = equal_layout("x", sharding, x.shape[axis], ranks)
    return x if sharding == "contiguous" else jnp.take(x, layout.order(), axis)


def unshard(x: Array, ranks: int, *, sharding: Kind = "contiguous", axis: int = 2) -> Array:
    """The inverse of `shard`.

    Args, Raises: as `shard`.
    """
    layout = equal_layout("x", sharding, x.shape[axis], ranks)
    return x if sharding == "contiguous" else jnp.take(x, np.argsort(layout.order()), axis)


def positions(length: int, *, axis_name: str | Names = "sp", sharding: Kind = "contiguous") -> Array:
    """(length / devices,) int32: the positions in the whole of this device's rows; for rotary embeddings, say.

    To be called inside `shard_map`.

    Args:
        length: that of the whole sequence.
        axis_name: the axis or axes of the mesh that the sequence is spread over.

    Raises:
        ValueError: "axis_name: …" where it names no axis of an enclosing `shard_map`; "length: …" where it does not
            divide.
    """
    names = names_of(axis_name)
    layout = equal_layout("length", sharding, length, devices_of(names))
    place = jax.lax.axis_index(names)
    runs = [piece.at(place) for piece in pieces(layout)]
    return jnp.concatenate([run.start + run.step * jnp.arange(run.count, dtype=jnp.int32) for run in runs])


def equal_layout(name: str, kind: Kind, length: int, ranks: int) -> Layout:
    """The layout, whose shards are all of one size, as jax's are.

    Raises:
        ValueError: beginning with `name`, where the length does not divide.
    """
    layout = Layout(kind, length, ranks)
    parts = 2 * ranks if kind == "zigzag" else ranks
    if length % parts:
        raise ValueError(
            f"{name}: has {length} positions, expected a multiple of {parts} for {ranks} devices, sharding={kind!r}"
        )
    return layout


def names_of(axis_name: str | Names) -> Names:
    """The axes of a mesh as a tuple.

    Raises:
        TypeError: neither a name nor some.
    """
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name: got {axis_name!r}, expected the name of a mesh axis, or a tuple of names")
    return tuple(names)


def devices_of(names: Names) -> int:
    """Number of devices along axes that an enclosing `shard_map` has bound.

    Raises:
        ValueError: an axis is not bound.
    """
    try:
        return int(jax.lax.psum(1, names))
    except NameError:
        raise ValueError(
            f"axis_name: {', '.join(names)} is bound by no enclosing shard_map; call this inside one, or pass mesh="
        ) from None
