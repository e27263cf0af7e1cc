"""Where query 0 stands on the key axis: the one convention shared by `causal` and `window`."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..._arrays import Array, as_array, dtype_name, family_of, to_numpy
from ..site import Site

Align = Literal["start", "end"]


def check_alignment(name: str, align: object, offset: object) -> None:
    """Raise if `align` is no alignment or the diagonal is named twice. Called when the mask is written."""
    if align not in (None, "start", "end"):
        raise ValueError(f'align: {name}() got {align!r}, expected "start", "end" or None')
    if align == "end" and offset is not None:
        raise ValueError(f'offset: {name}() got align="end" and an offset, which both place query 0; give one of them')
    if offset is not None:
        check_integers("offset", f"{name}()", offset)


def check_site(name: str, site: Site, align: Align | None, offset: Array | int | None) -> None:
    """Raise if the diagonal is not named where it must be, or the offset's shape does not fit the batch."""
    if align is None and offset is None and site.q_len != site.k_len:
        raise ValueError(
            f"mask: {name}() with {site.q_len} queries and {site.k_len} keys needs its diagonal named: "
            f'"start" lets query 0 stand at key 0, "end" lets the last query stand at the last key'
        )
    check_per_batch(f"{name}(offset=)", site, offset)


def edge_of(site: Site, align: Align | None, offset: Array | int | None, shift: int = 0) -> Array | int:
    """Where the position of query 0 plus `shift` stands on the key axis: an int, or (B, 1, 1, 1) as `per_batch`."""
    if offset is None:
        offset = site.k_len - site.q_len if align == "end" else 0
    return per_batch(site, offset, shift)


def per_batch(site: Site, value: Array | int, shift: int = 0) -> Array | int:
    """value + shift: an int for an int, (B, 1, 1, 1) for one value per batch row, (1, 1, 1, 1) for a scalar array.

    The sum is clipped to -(Sq + Sk) … Sq + Sk, beyond which no pair is told apart, and only then: an offset far away
    and a window as wide may well meet.
    """
    bound = site.q_len + site.k_len
    if isinstance(value, int):
        return max(-bound, min(bound, value + shift))
    if site.concrete:
        exact = to_numpy(value).astype(object) + shift  # Python's integers: any offset, any width, one per batch row
        return np.clip(exact, -bound, bound).astype(site.index).reshape(-1, 1, 1, 1)
    # Traced integers have 32 bits: beyond a quarter of their span, far is far.
    far = 2**62 - 1 if 8 * bound >= 2**31 else 2**30 - 1
    near = site.integers(value, far) + max(-far, min(far, shift))
    return site.integers(near).reshape(-1, 1, 1, 1)


def rows_of(value: Array | int | None) -> int:
    """Number of batch rows that a value per batch row tells apart."""
    shape = getattr(value, "shape", ())
    return int(shape[0]) if shape else 1


def at_batch(value: Array | int, b: Array) -> Array | int:
    """The value of `per_batch` for the batch rows `b`, an integer array of any shape."""
    return value if isinstance(value, int) or value.shape[0] == 1 else value.reshape(-1)[b]


def as_operand(name: str, value: Array | int | list[int] | None) -> Array | int | None:
    """The argument of that name: lists become arrays, NumPy's integer scalars ints; all else stays."""
    if isinstance(value, np.integer):
        return int(value)
    return as_array(name, value)


def check_per_batch(what: str, site: Site, value: Array | int | None) -> None:
    """Raise unless `value` is None, an int, a scalar array or one value per batch row."""
    shape = tuple(getattr(value, "shape", ()))
    if shape not in ((), (1,), (site.batch,)):
        raise ValueError(f"mask: {what} has shape {shape}, expected an int or one per batch row, ({site.batch},)")


def is_integer(value: Any) -> bool:
    """Whether `value` is an int and no bool; so is the length that torch's export leaves open."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | np.integer) or type(value).__name__ == "SymInt"


def check_integers(argument: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is an int or an array of integers."""
    if not is_integer(value) and family_of(value) is None:
        raise TypeError(f"{argument}: {name} got {type(value).__name__}, expected an int or an array of integers")
    if family_of(value) is not None and not dtype_name(value).startswith(("int", "uint")):
        raise TypeError(f"{argument}: {name} got dtype {dtype_name(value)}, expected integers")
