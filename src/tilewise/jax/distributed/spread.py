"""Whole arrays on a mesh: the `shard_map` around a spread call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ...kernels.portable.jax_scan import Facts, Smooth
from ..meshes import explicit, type_of
from .device import Settings, of_rows

Array = Any


def of_whole_arrays(settings: Settings, mesh: Any, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), spread over `mesh` as the rows of q are.

    Dense biases and masks with a row for every query are spread as q is; all else is the same on every device.

    Raises:
        ValueError: the mesh has explicit axes that the sequence is not spread over.
    """
    layout = settings.schedule.q

    def ordered(x: Array) -> Array:
        moves = x.shape[2] == layout.length and layout.kind != "contiguous"
        return jnp.take(x, layout.order(), 2) if moves else x

    def spec(x: Array) -> PartitionSpec:
        return rows if x.shape[2] == layout.length > 1 else PartitionSpec()

    rows = PartitionSpec(None, None, settings.names)
    dense = tuple(map(ordered, smooth.dense))
    bits = None if facts.mask.dense is None else ordered(facts.mask.dense)
    smooth, facts = smooth._replace(dense=dense), facts._replace(mask=replace(facts.mask, dense=bits))
    alike = jax.tree.map(lambda _: PartitionSpec(), (smooth, facts))
    specs = (
        alike[0]._replace(q=rows, k=rows, v=rows, dense=tuple(map(spec, dense))),
        alike[1]._replace(mask=replace(alike[1].mask, dense=None if bits is None else spec(bits))),
    )
    leaves, tree = jax.tree.flatten((smooth, facts))
    kinds = tuple(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)))
    results = None
    if explicit(mesh):
        others = [name for name in mesh.axis_names if name not in settings.names]
        if others:
            # jax's custom_partitioning, which spreads batch rows and heads, wants devices where there are none yet.
            raise ValueError(
                f"mesh: has the explicit axes {', '.join(others)} beside those of axis_name; expected automatic axes "
                f"(AxisType.Auto), or a call inside jax.shard_map over all of them"
            )
        batch, heads = type_of(smooth.q).sharding.spec[:2]
        results = PartitionSpec(batch, heads, settings.names)
    return _program(settings, mesh, tree, kinds, rows, results)(*leaves)


@lru_cache(maxsize=256)
def _program(
    settings: Settings,
    mesh: Any,
    tree: Any,
    specs: tuple[PartitionSpec, ...],
    rows: PartitionSpec,
    results: PartitionSpec | None,
) -> Callable[..., Any]:
    """The compiled call; `results` is how it is spread over a mesh with explicit axes."""

    def device(*leaves: Array) -> tuple[Array, Array]:
        return of_rows(settings, *jax.tree.unflatten(tree, leaves))

    names = frozenset(settings.names)
    if results is None:
        return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=(rows, rows), axis_names=names))
    # Inside, the axes are automatic: arrays that are not spread yet as the call wants them are sent there.
    inside = jax.shard_map(device, in_specs=specs, out_specs=(rows, rows), axis_names=names)
    shardings = NamedSharding(mesh, results), NamedSharding(mesh, results)
    return jax.jit(jax.sharding.auto_axes(inside, out_sharding=shardings))


def devices_along(mesh: Any, names: tuple[str, ...]) -> int:
    """Number of devices along some axes of a mesh.

    Raises:
        ValueError: the mesh has no such axis.
    """
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        raise ValueError(f"axis_name: the mesh has no axis {', '.join(missing)}, only {', '.join(mesh.axis_names)}")
    return prod(mesh.shape[name] for name in names)
