"""`SelfAttention` over a mesh: heads along the tensor axis, batch rows and parameters along the fsdp axis.

Two ways lead there. Under `jax.jit`, with arrays placed by `parameter_specs` and the mesh set by `jax.set_mesh`, the
compiler moves parameters, and attention runs on each device for its rows and heads without moving q, k or v. Inside
`jax.shard_map` the module works on its device's share by itself, and `gather_parameters` completes what is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .config import ParallelConfig

Array = Any


def parameter_specs(params: Any, parallel: ParallelConfig) -> Any:
    """How each parameter of a `SelfAttention` is spread over the mesh.

    The axis of the heads lies along the tensor axis if there is one. Then, where there is an fsdp axis, parameters with
    more than `fsdp_min_weight_size` elements are split along the largest of their other axes that it divides.

    Args:
        params: the tree under "params", of whole arrays or their shapes.
        parallel: the mesh.

    Returns:
        A tree of the same structure, of `jax.sharding.PartitionSpec`.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        dense, name = (getattr(entry, "key", None) for entry in path[-2:])
        axes: list[str | None] = [None] * len(leaf.shape)
        if parallel.model_axis_size > 1:
            if dense in ("dense_q", "dense_k", "dense_v"):
                axes[-2] = parallel.model_axis_name
            elif (dense, name) == ("dense_out", "kernel"):
                axes[-3] = parallel.model_axis_name
        count = parallel.fsdp_axis_size
        if count > 1 and math.prod(leaf.shape) > parallel.fsdp_min_weight_size:
            free = [i for i, size in enumerate(leaf.shape) if axes[i] is None and size % count == 0]
            if free:
                axes[max(free, key=lambda i: leaf.shape[i])] = parallel.fsdp_axis_name
        return PartitionSpec(*axes)

    return jax.tree_util.tree_map_with_path(spec, params)


def gather_parameters(params: Any, specs: Any, parallel: ParallelConfig) -> Any:
    """Inside `shard_map`: parameters whole along the fsdp axis, as the module wants them.

    They are gathered in `fsdp_gather_dtype`, and come in their own dtype where it is None. The gradient is averaged
    over the axis and scattered, in `fsdp_grad_scatter_dtype`: each device is left with that of its own share.

    Args:
        params: this device's shares. specs: those of `parameter_specs`. parallel: the mesh.

    Returns:
        The tree with the split axes whole.
    """

    def whole(leaf: Array, spec: PartitionSpec) -> Array:
        if parallel.fsdp_axis_name not in spec:
            return leaf
        way = _Way(
            parallel.fsdp_axis_name,
            spec.index(parallel.fsdp_axis_name),
            str(leaf.dtype),
            parallel.fsdp_gather_dtype or str(leaf.dtype),
            parallel.fsdp_grad_scatter_dtype,
        )
        return _gather(way, leaf)

    return jax.tree.map(whole, params, specs)


class _Way(NamedTuple):
    """How one parameter is gathered: the mesh's axis, the array's axis, and dtypes of share, whole and gradient."""

    name: str
    axis: int
    dtype: str
    whole: str
    gradient: str | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(way: _Way, share: Array) -> Array:
    return jax.lax.all_gather(share.astype(way.whole), way.name, axis=way.axis, tiled=True)


def _gather_forward(way: _Way, share: Array) -> tuple[Array, None]:
    return _gather(way, share), None


def _gather_backward(way: _Way, _: None, gradient: Array) -> tuple[Array]:
    gradient = gradient.astype(way.gradient or gradient.dtype)
    share = jax.lax.psum_scatter(gradient, way.name, scatter_dimension=way.axis, tiled=True)
    return ((share / jax.lax.psum(1, way.name)).astype(way.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def place_on_axis(parallel: ParallelConfig) -> tuple[Array | int, int]:
    """(index, size): this device's place on the tensor axis inside `shard_map`; (0, 1) where all heads are at hand.

    Raises:
        ValueError: the mesh's axis has another size than the configuration's.
    """
    name = parallel.model_axis_name
    if parallel.model_axis_size == 1:
        return 0, 1
    try:
        size = jax.lax.psum(1, name)
    except NameError:  # no such axis: not inside shard_map
        return 0, 1
    if parallel.model_axis_size not in (size, -1):
        raise ValueError(f"model_axis_size: is {parallel.model_axis_size}, but the mesh has {size} along {name!r}")
    return jax.lax.axis_index(name), size


def part_of(initializer: Callable[..., Array], axis: int, index: Array | int, parts: int) -> Callable[..., Array]:
    """An initializer of the share number `index` of an array, with the values that it has in the whole array."""
    if parts == 1:
        return initializer

    def share(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        full = initializer(key, (*shape[:axis], shape[axis] * parts, *shape[axis + 1 :]), dtype)
        return jax.lax.dynamic_slice_in_dim(full, index * shape[axis], shape[axis], axis)

    return share


def sum_over(axis_name: str | None, x: Array) -> Array:
    """The sum over an axis of the mesh; x itself without one."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def over_mesh(attend: Callable[..., Array], parallel: ParallelConfig) -> Callable[..., Array]:
    """`attend(q, k, v, segment_ids)`, each device for its rows and heads where `jax.set_mesh` names a mesh.

    Rows lie along the data and fsdp axes and heads along the tensor axis, each where it divides them.
    """
    if not hasattr(jax, "shard_map"):
        return attend  # an older jax, which knows no current mesh
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        return attend  # no mesh, or inside shard_map already, or the caller spreads arrays by their types

    def mapped(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        rows = [name for name in (parallel.data_axis_name, parallel.fsdp_axis_name) if mesh.shape.get(name, 1) > 1]
        while rows and q.shape[0] % math.prod(mesh.shape[name] for name in rows):
            rows.pop()
        count = mesh.shape.get(parallel.model_axis_name, 1)
        heads = parallel.model_axis_name if count > 1 and k.shape[2] % count == 0 else None
        spec = PartitionSpec(tuple(rows) or None, None, heads)
        ids = [] if segment_ids is None else [segment_ids]
        specs = [spec] * 3 + [PartitionSpec(tuple(rows) or None)] * len(ids)

        def here(q: Array, k: Array, v: Array, ids: Array | None = None) -> Array:
            return attend(q, k, v, ids)

        return jax.shard_map(here, in_specs=tuple(specs), out_specs=spec)(q, k, v, *ids)

    return mapped
