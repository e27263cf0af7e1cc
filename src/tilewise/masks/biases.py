"""What is added to the scores: dense arrays, and tables over the distance j - i (ALiBi, T5), linear in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from .._arrays import Array, as_array, dtype_name, family_of, introduce
from ..problem import ACCUMULATOR
from .primitives.positions import Align, check_alignment, is_integer
from .site import Site


@dataclass(frozen=True, eq=False)
class Bias:
    """Base of biases. `a + b` adds two; a plain array may stand on either side."""

    def __post_init__(self) -> None:
        introduce()

    __array_ufunc__ = None  # `array + bias` must come to `__radd__`, not be taken apart by NumPy

    def __add__(self, other: Any) -> Bias:
        return Sum((*self.parts(), *as_bias(other).parts()))

    def __radd__(self, other: Any) -> Bias:
        return as_bias(other) + self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`bias + tensor` and its like; torch's compiler asks nobody else whether that is a function of tensors."""
        if function.__name__ not in ("__add__", "__radd__", "add"):
            return NotImplemented
        return Sum((*as_bias(args[0]).parts(), *as_bias(args[1]).parts()))

    def parts(self) -> tuple[Bias, ...]:
        """The terms of a sum."""
        return (self,)

    def check(self, site: Site) -> None:
        """Raise ValueError beginning with "bias:" if it does not fit the sizes."""

    def table(self, site: Site, xp: Any, dtype: Any) -> Array | None:
        """(B', H', Sq + Sk - 1): the value at j - i = d stands at d + Sq - 1. None for dense biases."""
        return None

    def operands(self) -> Iterator[Array]:
        """The array operands."""
        for part in self.parts():
            yield from (value for value in vars(part).values() if family_of(value) is not None)


@dataclass(frozen=True, eq=False)
class Sum(Bias):
    """Several biases added."""

    terms: tuple[Bias, ...]

    def parts(self) -> tuple[Bias, ...]:
        return self.terms


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A float array that broadcasts to (B, Hq, Sq, Sk)."""

    array: Array

    def check(self, site: Site) -> None:
        shape, full = tuple(self.array.shape), (site.batch, site.heads, site.q_len, site.k_len)
        if len(shape) > 4 or not broadcasts(shape, full):
            raise ValueError(f"bias: the array has shape {shape}, which does not broadcast to (B, H, Sq, Sk) = {full}")

    def four(self, xp: Any) -> Array:
        """The caller's array in place, (B', H', Sq', Sk')."""
        array = xp.asarray(self.array)
        return array.reshape((1,) * (4 - array.ndim) + tuple(array.shape)) if array.ndim < 4 else array


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """See `alibi`."""

    slopes: Array
    align: Align | None

    def check(self, site: Site) -> None:
        shape = tuple(self.slopes.shape)
        if not 1 <= len(shape) <= 2 or shape[-1] != site.heads or not broadcasts(shape, (site.batch, site.heads)):
            raise ValueError(
                f"bias: alibi(slopes) has shape {shape}, expected ({site.heads},) or ({site.batch}, {site.heads})"
            )
        if self.align is None and site.q_len != site.k_len:
            raise ValueError(
                f"bias: alibi() with {site.q_len} queries and {site.k_len} keys needs its diagonal named: "
                f'align="start" or align="end"'
            )

    def table(self, site: Site, xp: Any, dtype: Any) -> Array:
        slopes = xp.asarray(self.slopes, dtype=dtype)
        slopes = slopes if slopes.ndim == 2 else slopes[None]
        offset = site.k_len - site.q_len if self.align == "end" else 0
        distance = xp.abs(_distances(site, xp) - offset)
        return -slopes[..., None] * xp.asarray(distance, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Relative(Bias):
    """See `relative`."""

    values: Array

    def check(self, site: Site) -> None:
        shape, length = tuple(self.values.shape), max(site.q_len + site.k_len - 1, 0)
        leading = broadcasts(shape[:-1], (site.batch, site.heads))
        if not 1 <= len(shape) <= 3 or shape[-1] != length or not leading:
            raise ValueError(
                f"bias: relative(table) has shape {shape}, expected (Sq + Sk - 1,) = ({length},) "
                f"after optional batch and head axes of {site.batch} or 1 and {site.heads} or 1"
            )

    def table(self, site: Site, xp: Any, dtype: Any) -> Array:
        values = xp.asarray(self.values, dtype=dtype)
        return values.reshape((1,) * (3 - values.ndim) + tuple(values.shape)) if values.ndim < 3 else values


@dataclass(frozen=True, eq=False)
class T5(Bias):
    """See `t5`."""

    weight: Array
    bidirectional: bool
    max_distance: int
    offset: int

    def check(self, site: Site) -> None:
        shape = tuple(self.weight.shape)
        if len(shape) != 2 or shape[1] != site.heads:
            raise ValueError(f"bias: t5(weight) has shape {shape}, expected (buckets, H) with H = {site.heads}")

    def table(self, site: Site, xp: Any, dtype: Any) -> Array:
        weight = xp.asarray(self.weight, dtype=dtype)
        distance = np.arange(1 - site.q_len, site.k_len) - self.offset
        buckets = t5_buckets(distance, weight.shape[0], self.bidirectional, self.max_distance)
        return weight[xp.asarray(buckets)].T[None]


def alibi(slopes: Array, align: Align | None = None) -> Bias:
    """Attention with linear biases (Press et al., 2022): -slope[h] * |j - (i + offset)| is added to the scores.

    Args:
        slopes: (Hq,) or (B, Hq), floats; a gradient flows to them.
        align: "start" (offset 0) or "end" (offset Sk - Sq); None only where Sq = Sk.

    Raises:
        ValueError: unknown `align`; at the call, a shape that does not fit. TypeError: not floats.
    """
    check_alignment("alibi", align, None)
    return Alibi(_floats("slopes", "alibi()", slopes), align)


def relative(table: Array) -> Bias:
    """Adds table[h, j - i + Sq - 1]: any bias that depends on the distance alone, with a gradient to the table.

    Args:
        table: floats (Sq + Sk - 1,), (Hq or 1, Sq + Sk - 1) or (B or 1, Hq or 1, Sq + Sk - 1).

    Raises:
        TypeError: not floats. At the call, ValueError: a shape that does not fit.
    """
    return Relative(_floats("table", "relative()", table))


def t5(weight: Array, *, bidirectional: bool = True, max_distance: int = 128, offset: int = 0) -> Bias:
    """The bucketed relative bias of T5 (Raffel et al., 2020): weight[bucket(j - i - offset), h] is added to the scores.

    Args:
        weight: floats (buckets, Hq), the embedding table of the model; a gradient flows to it.
        bidirectional: whether keys ahead have buckets of their own (encoder) or share that of distance 0 (decoder).
        max_distance: distance from which all keys share the last bucket.
        offset: position of query 0 on the key axis, for decoding with a cache.

    Raises:
        TypeError: not floats, or numbers that are no ints. ValueError: fewer than 4 buckets, or an odd number with
            `bidirectional`; a `max_distance` that leaves the far half of the buckets nothing.
    """
    weight = _floats("weight", "t5()", weight)
    buckets = int(weight.shape[0]) if weight.ndim else 0
    if buckets < 4 or (bidirectional and buckets % 2):
        raise ValueError(
            f"weight: t5() got {buckets} buckets, expected at least 4, and an even number when bidirectional"
        )
    for argument, number in (("max_distance", max_distance), ("offset", offset)):
        if not is_integer(number):
            raise TypeError(f"{argument}: t5() got {type(number).__name__}, expected an int")
    near = (buckets // 2 if bidirectional else buckets) // 2
    if max_distance <= near:
        raise ValueError(f"max_distance: t5() got {max_distance}, expected more than the {near} that have own buckets")
    return T5(weight, bool(bidirectional), int(max_distance), int(offset))


def t5_buckets(distance: np.ndarray, buckets: int, bidirectional: bool, max_distance: int) -> np.ndarray:
    """Bucket number of each distance j - i: one bucket each for the near half, logarithmic up to `max_distance`."""
    base = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base, near = np.where(distance > 0, buckets, 0), np.abs(distance)
    else:
        near = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in the models' own code: a bucket edge computed in float64 would move some distances.
    ratio = np.log(np.maximum(near, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (ratio * (buckets - exact)).astype(np.int64), buckets - 1)
    return base + np.where(near < exact, near, far)


def as_bias(value: Any) -> Bias:
    """A bias as it is, a float array as a dense bias.

    Raises:
        TypeError: neither; booleans are told to go to mask=.
    """
    return value if isinstance(value, Bias) else DenseBias(_floats("bias", "the array", value))


@dataclass(frozen=True, slots=True, eq=False)
class LoweredBias:
    """dense: 4-D arrays, each axis 1 or full; table: the sum of all relative biases (B', H', Sq + Sk - 1), or None."""

    dense: tuple[Array, ...] = ()
    table: Array | None = None


def lower_bias(bias: Bias | None, site: Site, xp: Any, accumulator: Any) -> LoweredBias:
    """Lower biases with the functions of q's framework `xp`, so that its own derivative carries gradients from the
    table on to slopes and weights. `accumulator` is the dtype of tables.

    Raises:
        ValueError: beginning with "bias:", when a shape does not fit.
    """
    parts = bias.parts() if bias is not None else ()
    for part in parts:
        part.check(site)
    dense = tuple(part.four(xp) for part in parts if isinstance(part, DenseBias))
    tables = [table for part in parts if (table := part.table(site, xp, accumulator)) is not None]
    return LoweredBias(dense, reduce(lambda a, b: a + b, tables) if tables else None)


def broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether each axis is 1 or full, counted from the last. Compared one by one: under torch's compiler sizes may be
    symbols, which `in` does not understand."""
    return all(size == 1 or size == whole for size, whole in zip(shape[::-1], full[::-1], strict=False))


def _distances(site: Site, xp: Any) -> Array:
    return xp.arange(1 - site.q_len, site.k_len)


def _floats(argument: str, name: str, value: Any) -> Array:
    value = as_array(argument, value)
    if family_of(value) is None:
        raise TypeError(f"{argument}: {name} got {type(value).__name__}, expected a float array")
    if dtype_name(value) not in ACCUMULATOR:
        hint = "; a boolean array goes to mask=" if dtype_name(value) == "bool" else ""
        raise TypeError(f"{argument}: {name} got dtype {dtype_name(value)}, expected {', '.join(ACCUMULATOR)}{hint}")
    return value
