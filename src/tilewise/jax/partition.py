"""The maps of attention on arrays that are spread over devices: each device computes its batch rows and its heads.

XLA cannot see into a foreign call, so it is told: which axes of the operands and results go together, and what a device
does with its part. Nothing is gathered. What is summed over all batch rows or heads (the gradient of a bias that they
share, say) is summed over the devices, and nothing else is sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch  # there is no public way to say what `needs_devices` says
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from .case import Axes, Case, Flags
from .maps import Map

Array = Any
Names = tuple[str, ...]  # axes of a mesh

# jax 0.5.0 cannot be told a rule; its partitioner asks for the shardings of the results instead.
_TAKES_RULE = "sharding_rule" in inspect.signature(custom_partitioning.def_partition).parameters


def refuse_sequence(name: str, spec: PartitionSpec, axis: int = 2) -> None:
    """Refuse to gather an array whose sequence is spread over devices.

    Raises:
        ValueError: the sequence axis of `spec` names an axis of a mesh.
    """
    names = _names(spec, axis)
    if names:
        raise ValueError(
            f"{name}: its sequence is spread over the mesh axes {', '.join(names)}; expected each device to hold whole "
            f"sequences of some batch rows and heads. Attention over spread sequences "
            f"(context parallelism) is tilewise.jax.context_parallel_attention. To gather the sequence all the same, "
            f"constrain {name} with jax.lax.with_sharding_constraint or jax.sharding.reshard before the call"
        )


def needs_devices(of: Map) -> None:
    """Tell jax that lowering this map to a program asks on which devices it will run."""
    dispatch.prim_requires_devices_during_lowering.add(of.primitive)


@lru_cache(maxsize=1024)
def partitioned(of: Map, case: Case, chosen: Flags) -> Callable[..., list[Array]]:
    """The map as a function of whole arrays, which XLA may partition."""

    @custom_partitioning
    def whole(*operands: Array) -> list[Array]:
        return of.bind(*operands, case=case, chosen=chosen, local=True)

    def partition(mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> tuple:
        spread = _Spread.over(mesh, of, case, chosen, operands)
        given = spread.shardings(operands, of.operands(case, chosen))
        return mesh, partial(spread.local, results), spread.shardings(results, of.results(case, chosen)), tuple(given)

    def infer(mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> list[NamedSharding]:
        return _Spread.over(mesh, of, case, chosen, operands).shardings(results, of.results(case, chosen))

    rule = {"sharding_rule": lambda *given: _rule(of, case, chosen, *given[-2:])} if _TAKES_RULE else {}
    whole.def_partition(partition, infer, **rule)
    return whole


def _rule(of: Map, case: Case, chosen: Flags, operands: Sequence[Any], results: Sequence[Any]) -> str:
    """Which axes go together, in the notation of `custom_partitioning`: full axes of batch rows, and of heads."""
    sizes, alone = _sizes(case), count()

    def terms(types: Sequence[Any], axes: Sequence[Axes]) -> str:
        def factor(letter: str, size: int) -> str:
            together = letter in sizes and size == sizes[letter]
            # kv heads are spread like query heads where there are as many; else `_Spread` sees to them.
            letter = "h" if letter == "k" and sizes["k"] == sizes["h"] else letter
            return letter if together else f"x{next(alone)}"

        shapes = (jax_type.shape for jax_type in types)
        return ", ".join(
            " ".join(factor(letter, size) for letter, size in zip(letters.ljust(len(shape), "."), shape, strict=False))
            for letters, shape in zip(axes, shapes, strict=True)
        )

    return f"{terms(operands, of.operands(case, chosen))} -> {terms(results, of.results(case, chosen))}"


def _sizes(case: Case) -> dict[str, int]:
    p = case.problem
    return {"b": p.batch, "h": p.q_heads, "k": p.kv_heads}


@dataclass(frozen=True, slots=True, eq=False)
class _Spread:
    """How one call's batch rows and heads are spread over a mesh.

    Attributes:
        names: for each letter of `Axes` the axes of the mesh that it is spread over.
        picks: whether there are more devices along the heads than kv heads, so that each picks the one it needs.
    """

    mesh: Any
    of: Map
    case: Case
    chosen: Flags
    names: dict[str, Names]
    picks: bool

    @classmethod
    def over(cls, mesh: Any, of: Map, case: Case, chosen: Flags, operands: Sequence[Any]) -> _Spread:
        """As q is, or else k or v, as far as sizes divide.

        Raises:
            ValueError: the sequence of q, k or v is spread.
        """
        first, sizes = len(of.linear(case, chosen)), _sizes(case)
        specs = [getattr(x.sharding, "spec", PartitionSpec()) for x in operands[first : first + 3]]
        for name, spec in zip("qkv", specs, strict=True):
            refuse_sequence(name, spec)
        batch, heads = (next((n for spec in specs if (n := _names(spec, axis))), ()) for axis in (0, 1))
        rows, parts = _devices(mesh, batch), _devices(mesh, heads)
        batch = batch if sizes["b"] % rows == 0 else ()
        kv_heads = max(1, sizes["k"])
        picks = bool(kv_heads % parts) and parts % kv_heads == 0
        if sizes["h"] % parts or (kv_heads % parts and not picks) or set(heads) & set(batch):
            heads, picks = (), False
        return cls(mesh, of, case, chosen, {"b": batch, "h": heads, "k": () if picks else heads}, picks)

    def shardings(self, arrays: Sequence[Any], axes: Sequence[Axes]) -> list[NamedSharding]:
        """Where each array's parts are wanted."""
        sizes = _sizes(self.case)

        def spec(shape: tuple[int, ...], letters: Axes) -> PartitionSpec:
            full = zip(letters.ljust(len(shape), "."), shape, strict=False)
            return PartitionSpec(*(self.names.get(x) or None if size == sizes.get(x) else None for x, size in full))

        return [NamedSharding(self.mesh, spec(x.shape, letters)) for x, letters in zip(arrays, axes, strict=True)]

    def local(self, results: Sequence[Any], *operands: Array) -> list[Array]:
        """What a device does with its parts; `results` are whole."""
        first, case = len(self.of.linear(self.case, self.chosen)), self.case
        last = first + case.tree.num_leaves
        row, head = (self._place(letter) for letter in "bh")
        kv_head = head // case.problem.group
        kept = [
            jax.lax.dynamic_slice_in_dim(x, kv_head, 1, 1) if self.picks and letters[:2] == "bk" else x
            for x, letters in zip(operands, self.of.operands(case, self.chosen), strict=True)
        ]
        primal = kept[first:last]
        if case.numbered:
            case, primal = case.beginning_at(row, head, primal)
        case = case.resized(primal)
        found = self.of.bind(*kept[:first], *primal, *kept[last:], case=case, chosen=self.chosen, local=True)
        axes = self.of.results(case, self.chosen)
        if self.picks:
            found = [
                _put(x, kv_head, whole.shape[1]) if letters[:2] == "bk" else x
                for x, letters, whole in zip(found, axes, results, strict=True)
            ]
        return [
            _sum_over(x, [n for n in self.names["b"] + self.names["h"] if n not in _all_names(sharding.spec)])
            for x, sharding in zip(found, self.shardings(results, axes), strict=True)
        ]

    def _place(self, letter: str) -> Array:
        """The number of this device's first batch row or head."""
        names = self.names[letter]
        place = jnp.int32(0)
        for name in names:
            place = place * self.mesh.shape[name] + jax.lax.axis_index(name)
        return place * (_sizes(self.case)[letter] // _devices(self.mesh, names))


def _put(x: Array, place: Array, size: int) -> Array:
    """One kv head's gradient in its place among `size`."""
    zeros = jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, place, 1)


def _sum_over(x: Array, names: Sequence[str]) -> Array:
    return jax.lax.psum(x, tuple(names)) if names else x


def _names(spec: PartitionSpec, axis: int) -> Names:
    """The axes of a mesh that an axis of an array is spread over."""
    part = spec[axis] if axis < len(spec) else None
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _all_names(spec: PartitionSpec) -> set[str]:
    return {name for axis in range(len(spec)) for name in _names(spec, axis)}


def _devices(mesh: Any, names: Names) -> int:
    return prod(mesh.shape[name] for name in names)
