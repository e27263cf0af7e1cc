"""What a named attention call consists of, and how it becomes arrays; the names themselves are in `catalog.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one call: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, k_len, head_dim), v of value_dim."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int


Random = np.random.Generator
Build = Callable[[Shape, Random], Any]


def _nothing(shape: Shape, rng: Random) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Preset:
    """One way in which a model calls attention.

    Attributes:
        name: how it is asked for; about: which model, which layer.
        shape: the model's own sizes; small: sizes for a test, with the same proportions where they matter.
        mask, bias, sinks: from a shape and a generator, the arguments of `tilewise.attention` or None.
        options: scale, softcap, dropout and layout, where they are not the default.
        follows: which lengths a sequence length that the user asks for replaces.
    """

    name: str
    about: str
    shape: Shape
    small: Shape
    mask: Build = _nothing
    bias: Build = _nothing
    sinks: Build = _nothing
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    follows: Literal["both", "queries", "keys", "none"] = "both"

    def at(self, seq: int | None = None, batch: int | None = None) -> Shape:
        """The model's shape with another sequence length or batch size.

        Raises:
            ValueError: `seq` or `batch` is below 1, or the lengths of this preset are fixed.
        """
        for argument, size in (("seq", seq), ("batch", batch)):
            if size is not None and size < 1:
                raise ValueError(f"{argument}: got {size}, expected at least 1")
        if seq is not None and self.follows == "none":
            raise ValueError(f"seq: got {seq}, but the lengths of {self.name!r} are fixed")
        q_len = seq if seq and self.follows in ("both", "queries") else self.shape.q_len
        k_len = seq if seq and self.follows in ("both", "keys") else self.shape.k_len
        return replace(self.shape, q_len=q_len, k_len=k_len, batch=batch or self.shape.batch)


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """NumPy arrays in the preset's layout, and the keyword arguments of `tilewise.attention`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]


def example(preset: Preset, shape: Shape | None = None, *, dtype: str = "float32", seed: int = 0) -> Example:
    """Random inputs for a preset, at its small shape unless another is given."""
    shape, rng = shape or preset.small, np.random.default_rng(seed)
    return _example(preset, shape, rng, lambda *sizes: rng.standard_normal(sizes).astype(dtype))


def outline(preset: Preset, shape: Shape | None = None, *, dtype: str = "float32") -> Example:
    """The same at the model's own shape with q, k and v of zeros that take no memory: enough for `tilewise.explain`."""
    zero = np.zeros((), dtype)
    rng = np.random.default_rng(0)
    return _example(preset, shape or preset.shape, rng, lambda *sizes: np.broadcast_to(zero, sizes))


def _example(preset: Preset, n: Shape, rng: Random, fill: Callable[..., np.ndarray]) -> Example:
    layout = preset.options.get("layout", "bhsd")
    q, k, v = (
        _laid_out(layout, fill, n.batch, heads, length, width)
        for heads, length, width in (
            (n.q_heads, n.q_len, n.head_dim),
            (n.kv_heads, n.k_len, n.head_dim),
            (n.kv_heads, n.k_len, n.value_dim),
        )
    )
    built = {"mask": preset.mask(n, rng), "bias": preset.bias(n, rng), "sinks": preset.sinks(n, rng)}
    return Example(q, k, v, {**{name: value for name, value in built.items() if value is not None}, **preset.options})


def _laid_out(
    layout: str, fill: Callable[..., np.ndarray], batch: int, heads: int, length: int, width: int
) -> np.ndarray:
    if layout == "bshd":
        return fill(batch, length, heads, width)
    return fill(length, heads, width) if layout == "thd" else fill(batch, heads, length, width)
