"""Rotary position embedding (Su et al., RoFormer, 2021): pairs of features turned by an angle that grows with position.

Made of torch operations, so every derivative, transform and compiler of torch works on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._arrays import as_array, torch_of
from ...masks.primitives.positions import is_integer
from ...validate.operand import real
from .scaling import LinearScaling, Llama3Scaling, NtkScaling, Scaling, YarnScaling

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "NtkScaling",
    "YarnScaling",
    "rotary",
    "rotary_frequencies",
    "rotary_tables",
]

# Place of the sequence axis in each layout.
_AXIS = {"bhsd": 2, "bshd": 1, "thd": 0}
_SHAPES = {"bhsd": "(B, H, S, D)", "bshd": "(B, S, H, D)", "thd": "(T, H, D)"}


def rotary_frequencies(
    dims: int,
    *,
    theta: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The angle per position of each pair of features, (dims/2,): theta^(-2 i / dims), scaled.

    Args:
        dims: number of features that are turned, even.
        theta: base of the frequencies.
        scaling: `LinearScaling`, `NtkScaling`, `Llama3Scaling` or `YarnScaling`.
        dtype, device: of the result; float32 or float64.

    Raises:
        ValueError: an odd or negative `dims`, or a `theta` that is not positive. TypeError: no scaling of these, or no
            numbers.
    """
    if not is_integer(dims):
        raise TypeError(f"dims: got {type(dims).__name__}, expected an int")
    if dims < 0 or dims % 2:
        raise ValueError(f"dims: got {dims}, expected an even number of features")
    theta = real("theta", theta)
    if not theta > 0:
        raise ValueError(f"theta: got {theta}, expected a positive number")
    exponents = torch.arange(0, dims, 2, dtype=torch.int64, device=device).to(dtype) / max(dims, 1)
    base = 1.0 / theta**exponents
    if scaling is not None and not isinstance(scaling, Scaling):
        raise TypeError(f"scaling: got {type(scaling).__name__}, expected LinearScaling, NtkScaling, … or None")
    return base if scaling is None else scaling.frequencies(base, theta)


def rotary_tables(
    positions: Tensor | np.ndarray | list[int],
    dims: int,
    *,
    theta: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (S, dims/2) or (B, S, dims/2): made once, they serve all layers of a model.

    Args:
        positions: integers or floats (S,) or (B, S), a tensor, array or list.
        dims, theta, scaling: as for `rotary_frequencies`; a scaling's magnitude is multiplied in.
        dtype: of the result. Angles are computed in float32, in float64 for float64, and rounded last.

    Raises:
        ValueError, TypeError: as `rotary_frequencies`; positions that are no array of real numbers.
    """
    positions = _tensor("positions", positions)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = rotary_frequencies(dims, theta=theta, scaling=scaling, dtype=exact, device=positions.device)
    # Never in a half type, which would lose whole turns.
    angles = positions.to(exact)[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.magnitude != 1.0:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    return cos.to(dtype), sin.to(dtype)


def rotary(
    x: Tensor,
    positions: Tensor | np.ndarray | list[int] | float | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    theta: float = 10000.0,
    scaling: Scaling | None = None,
    dims: int | None = None,
    layout: str = "bhsd",
    inverse: bool = False,
) -> Tensor:
    """Queries or keys with their positions turned into them.

    Args:
        x: (B, H, S, D), float64, float32, float16 or bfloat16.
        positions: integers (S,) or (B, S), (T,) for layout "thd", in a tensor, array or list; a number is the position
            of the first; None is 0.
        cos, sin: tables in place of positions, theta and scaling: (S, dims/2) or (B, S, dims/2), as `rotary_tables`
            makes them, or of the full width dims, where both features of a pair have the same value.
        interleaved: pairs are features (2i, 2i + 1), as in GPT-J and RoFormer; else (i, i + dims/2), as in Llama and
            GPT-NeoX.
        theta, scaling: as for `rotary_frequencies`.
        dims: how many of the first features are turned, even; the others pass. None is all.
        layout: "bhsd"; "bshd" takes (B, S, H, D), "thd" takes (T, H, D).
        inverse: undo it: turn back, and divide by the scaling's magnitude.

    Returns:
        x's shape and dtype. Angles are computed in float32 (float64 for float64); the tables are rounded to x's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """
    _check(x, layout)
    width = x.shape[-1]
    dims = width if dims is None else dims
    if not is_integer(dims):
        raise TypeError(f"dims: got {type(dims).__name__}, expected an int or None")
    if not 0 <= dims <= width or dims % 2:
        raise ValueError(f"dims: got {dims}, expected an even number up to x's {width} features")
    if (cos is None) != (sin is None):
        raise ValueError(f"{'sin' if sin is None else 'cos'}: got None beside a table, expected both or neither")
    if cos is None or sin is None:
        cos, sin = _tables(x, positions, layout, dims, theta, scaling, inverse)
    elif positions is not None:
        raise ValueError("positions: got positions beside tables, expected one of them")
    cos, sin = (_beside(name, table, x, dims, interleaved, layout) for name, table in (("cos", cos), ("sin", sin)))
    turned = _turn(x[..., :dims], cos, -sin if inverse else sin, interleaved)
    return turned if dims == width else torch.cat([turned, x[..., dims:]], -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (…, dims), tables that broadcast to (…, dims/2)."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)


def _tables(
    x: Tensor,
    positions: Tensor | np.ndarray | list[int] | float | None,
    layout: str,
    dims: int,
    theta: float,
    scaling: Scaling | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    first = 0 if positions is None else positions
    if isinstance(first, int | float | np.number | torch.SymInt):
        first = torch.arange(first, first + x.shape[_AXIS[layout]], device=x.device)
    else:
        first = _tensor("positions", first)
        _check_leading("positions", tuple(first.shape), tuple(first.shape), x, layout)
    cos, sin = rotary_tables(first.to(x.device), dims, theta=theta, scaling=scaling, dtype=x.dtype)
    if inverse and scaling is not None:
        cos, sin = cos / scaling.magnitude**2, sin / scaling.magnitude**2
    return cos, sin


def _beside(name: str, table: Tensor, x: Tensor, dims: int, interleaved: bool, layout: str) -> Tensor:
    """A table (S, …) or (B, S, …), of half or full width, in x's dtype and shaped to broadcast with x's pairs."""
    table = _tensor(name, table)
    _check_leading(name, tuple(table.shape[:-1]), tuple(table.shape), x, layout)
    width = table.shape[-1]
    if width not in (dims // 2, dims):
        raise ValueError(f"{name}: has shape {tuple(table.shape)}, expected {dims // 2} or {dims} as its last size")
    if width == dims and dims:
        table = table[..., ::2] if interleaved else table[..., : dims // 2]
    table = table.to(x.dtype)
    if layout == "thd":
        return table.reshape(x.shape[0], 1, -1)
    table = table if table.ndim == 3 else table[None]
    return table[:, None] if layout == "bhsd" else table[:, :, None]


def _tensor(name: str, value: Any) -> Tensor:
    """The argument of that name as a tensor: a tensor, array or list of real numbers."""
    value = as_array(name, value)
    value = torch_of(value) if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" else value
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"{name}: got {getattr(value, 'dtype', type(value).__name__)}, expected an array of real numbers"
        )
    return value


def _check_leading(name: str, leading: tuple[int, ...], shape: tuple[int, ...], x: Tensor, layout: str) -> None:
    length, batch = x.shape[_AXIS[layout]], 1 if layout == "thd" else x.shape[0]
    if leading not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"{name}: has shape {shape}, expected axes (S,) or (B, S) with S = {length} and B = {batch} or 1, "
            f"as x {tuple(x.shape)} has for layout={layout!r}"
        )


def _check(x: Tensor, layout: str) -> None:
    if layout not in _AXIS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, _AXIS))}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: got {getattr(x, 'dtype', type(x).__name__)}, expected a tensor of floats")
    if x.ndim != len(_SHAPES[layout].split(",")):
        raise ValueError(f"x: has shape {tuple(x.shape)}, expected {_SHAPES[layout]} for layout={layout!r}")
