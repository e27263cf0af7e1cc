"""Queries, keys and values, and the layout they come in."""

from __future__ import annotations

from typing import NamedTuple

from .._arrays import Array, Family, dtype_name, family_of
from ..problem import ACCUMULATOR
from .operand import check_strided

# Axis names per layout; letters as in semantics: batch, heads, sequence, (head) dimension, tokens.
LAYOUTS = {"bhsd": "(B, H, S, D)", "bshd": "(B, S, H, D)", "thd": "(T, H, D)"}


class Arrays(NamedTuple):
    """Queries, keys and values that fit each other: views (B, H, S, D) of one framework; sizes are B, Hq, Sq, Sk."""

    family: Family
    q: Array
    k: Array
    v: Array
    sizes: tuple[int, int, int, int]


def check_arrays(q: Array, k: Array, v: Array, layout: str) -> Arrays:
    """Check q, k, v and the layout.

    Raises:
        ValueError, TypeError: whose first word is the argument, with what was got and what was expected.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    family = _family(q, k, v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_strided(name, array)
    _check_dtypes(q, k, v)
    _check_devices(family, q, k, v)
    _check_sizes(family, q, k, v)
    q, k, v = _bhsd("q", q, layout), _bhsd("k", k, layout), _bhsd("v", v, layout)
    return Arrays(family, q, k, v, _check_shapes(q, k, v))


def restore(out: Array, lse: Array, layout: str) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) as the caller's layout has them; views, no copies."""
    if layout == "bshd":
        return _swap(out, 1, 2), lse
    if layout == "thd":
        return _swap(out[0], 0, 1), lse[0]
    return out, lse


def _family(q: Array, k: Array, v: Array) -> Family:
    families: dict[str, Family] = {}
    for name, array in (("q", q), ("k", k), ("v", v)):
        family = family_of(array)
        if family is None:
            raise TypeError(
                f"{name}: got {type(array).__name__}, expected a NumPy array, a torch tensor or a jax array"
            )
        families[name] = family
        if family != families["q"]:
            raise TypeError(f"{name}: is a {family} array, but q is a {families['q']} array; expected one framework")
    return families["q"]


def _check_dtypes(q: Array, k: Array, v: Array) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        dtype = dtype_name(array)
        if dtype not in ACCUMULATOR:
            raise TypeError(f"{name}: got dtype {dtype}, expected {', '.join(ACCUMULATOR)}")
        if dtype != dtype_name(q):
            raise TypeError(f"{name}: got dtype {dtype}, but q has {dtype_name(q)}; q, k and v must share a dtype")


def _check_devices(family: Family, q: Array, k: Array, v: Array) -> None:
    if family != "torch":
        return  # NumPy has one device; jax places and reports by itself
    for name, array in (("k", k), ("v", v)):
        if array.device != q.device:
            raise ValueError(f"{name}: is on {array.device}, but q is on {q.device}; expected one device")


def _check_sizes(family: Family, q: Array, k: Array, v: Array) -> None:
    if family != "jax":
        return  # NumPy's sizes are numbers; torch's open ones are served
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not all(isinstance(size, int) for size in array.shape):
            raise ValueError(
                f"{name}: has shape ({', '.join(map(str, array.shape))}), whose sizes are left open, "
                "expected known sizes: export a jax program for each shape"
            )


def _bhsd(name: str, array: Array, layout: str) -> Array:
    rank = len(LAYOUTS[layout].split(","))
    if array.ndim != rank:
        raise ValueError(
            f"{name}: has shape {tuple(array.shape)}, expected {rank} axes {LAYOUTS[layout]} for layout={layout!r}"
        )
    if layout == "bhsd":
        return array
    return _swap(array, 1, 2) if layout == "bshd" else _swap(array, 0, 1)[None]


def _swap(array: Array, a: int, b: int) -> Array:
    return array.swapaxes(a, b)


def _check_shapes(q: Array, k: Array, v: Array) -> tuple[int, int, int, int]:
    (batch, q_heads, q_len, head_dim), (_, kv_heads, k_len, _) = q.shape, k.shape
    if head_dim < 1:
        raise ValueError(f"q: has head dimension {head_dim}, expected at least 1")
    if v.shape[3] < 1:
        raise ValueError(f"v: has head dimension {v.shape[3]}, expected at least 1")
    for name, what, axis, got, expected in (
        ("k", "batch size", 0, k, batch),
        ("v", "batch size", 0, v, batch),
        ("k", "head dimension", 3, k, head_dim),
        ("v", "heads", 1, v, kv_heads),
        ("v", "keys", 2, v, k_len),
    ):
        if got.shape[axis] != expected:
            other = "k" if what in ("heads", "keys") else "q"
            raise ValueError(f"{name}: has {got.shape[axis]} as {what}, expected {expected} as {other} has")
    if (q_heads % kv_heads) if kv_heads else q_heads:
        raise ValueError(f"k: has {kv_heads} heads, expected a divisor of q's {q_heads} heads")
    return batch, q_heads, q_len, k_len
