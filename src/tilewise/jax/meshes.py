"""Operands made alike in what jax knows of their devices, where that is a part of their types.

Inside `shard_map` an array's type says over which axes of the mesh it varies; on a mesh with explicit axes it says how
the array is spread. Everywhere else this changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..kernels.portable.jax_scan import Facts, Smooth
from .partition import refuse_sequence

Array = Any
Attention = Callable[[Smooth, Facts], tuple[Array, Array]]


def spread(attention: Attention, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """`attention(smooth, facts)`; on explicit axes, its results are spread as q is.

    Raises:
        ValueError: the sequence of q, k or v is known to be spread. On automatic axes, where traced arrays do not say,
            the partitioner refuses later, with the same words.
    """
    for name, x in zip("qkv", smooth[:3], strict=True):
        where = type_of(x) if isinstance(x, jax.core.Tracer) else x
        refuse_sequence(name, getattr(getattr(where, "sharding", None), "spec", PartitionSpec()))
    smooth, facts = varying_alike((smooth, facts))
    sharding = getattr(type_of(smooth.q), "sharding", None)
    if sharding is None or not explicit(sharding.mesh):
        return attention(smooth, facts)
    batch, heads = sharding.spec[:2]
    specs = PartitionSpec(batch, heads, None, None), PartitionSpec(batch, heads, None)
    results = tuple(NamedSharding(sharding.mesh, spec) for spec in specs)
    # Inside, the axes are automatic: the partitioner asks the primitives, which know what to do.
    return jax.sharding.auto_axes(attention, out_sharding=results)(smooth, facts)


def all_manual() -> bool:
    """Whether an enclosing `shard_map` has taken every axis of the mesh, so that nothing is left to partition."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def type_of(x: Array) -> Any:
    """The type of an array, which knows its sharding."""
    return jax.typeof(x) if hasattr(jax, "typeof") else jax.core.get_aval(x)


def explicit(mesh: Any) -> bool:
    """Whether a mesh has axes over which types say how arrays are spread."""
    return bool(getattr(mesh, "explicit_axes", ()))


def varying_alike(operands: Any, names: tuple[str, ...] = ()) -> Any:
    """The operands as arrays that all vary over the mesh axes that any of them varies over, and over `names`.

    Where types do not say what varies (`shard_map` with `check_vma=False`), nothing changes.
    """
    leaves, tree = jax.tree.flatten(operands)
    varying = [_varies_over(x) for x in leaves]
    union = frozenset[str]().union(*varying)
    if not union:
        return operands
    union |= frozenset(names)
    return jax.tree.unflatten(
        tree, [_vary(jnp.asarray(x), union - over) for x, over in zip(leaves, varying, strict=True)]
    )


def _varies_over(x: Array) -> frozenset[str]:
    kind = type_of(x)
    found = getattr(kind, "manual_axis_type", None)  # jax 0.10; "vma" in 0.7 to 0.9, nothing before
    return getattr(kind, "vma", frozenset()) if found is None else found.varying


def _vary(x: Array, axes: frozenset[str]) -> Array:
    if not axes:
        return x
    names = tuple(sorted(axes))
    return jax.lax.pcast(x, names, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, names)
