"""The native forward pass inside jax programs: a call into the compiled core through XLA's foreign function interface.

The operands' order and the attributes are those stated at the top of `native/bind/xla_ffi.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..contract import Dropout
from ..kernels.portable.jax_scan import Facts, Smooth
from ..masks.lower import TileBits
from ..problem import AttentionProblem

Array = Any

_TARGET = "tilewise_forward"


def forward(problem: AttentionProblem, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq), by the native kernel on the CPU."""
    _register()
    mask, dropout = facts.mask, facts.dropout
    given = {
        "ranges": (mask.ranges.starts, mask.ranges.stops) if mask.ranges is not None else (),
        "labels": _labels(mask.q_labels, mask.k_labels) if mask.q_labels is not None else (),
        "mask": (mask.dense,) if mask.dense is not None else (),
        "bits": facts.bits or (),
        "biases": smooth.dense,
        "table": (smooth.table,) if smooth.table is not None else (),
        "sinks": (smooth.sinks,) if smooth.sinks is not None else (),
        "seed": (dropout.seed,) if dropout is not None else (),
    }
    kinds = tuple(kind for kind, group in given.items() for _ in group)
    operands = (jnp.asarray(array) for group in given.values() for array in group)
    static = None if dropout is None else Dropout(dropout.p, None, dropout.stream)
    out, lse = _foreign(problem, kinds, static)(smooth.q, smooth.k, smooth.v, *operands)
    # A zero that costs nothing: inside `shard_map` the results must be known to vary where the operands do.
    zero = sum(jnp.zeros_like(x, shape=()) for x in jax.tree.leaves(smooth[:3]))
    return out + zero, lse + zero


def words_of(bits: TileBits) -> tuple[np.ndarray, np.ndarray]:
    """The tile index, and the tiles' 64-bit words as pairs (low, high): jax has no 64-bit integers unless asked."""
    return bits.index, np.ascontiguousarray(bits.words, "<u8").view("<u4").reshape(*bits.words.shape, 2)


# The bit of `present` for each kind of operand; biases are counted instead.
_PRESENT = {"ranges": 1, "labels": 2, "mask": 4, "bits": 8, "biases": 0, "table": 16, "sinks": 32, "seed": 64}


@lru_cache(maxsize=1024)
def _foreign(
    problem: AttentionProblem, kinds: tuple[str, ...], dropout: Dropout | None
) -> Callable[..., tuple[Array, Array]]:
    """A function of q, k, v and operands of these kinds, with a rule of its own for `vmap`."""
    bshd = problem.layout == "bshd"
    attributes = {
        "present": np.int64(sum(_PRESENT[kind] for kind in set(kinds))),
        "bias_count": np.int64(kinds.count("biases")),
        "layout": np.int64(bshd),
        "scale": np.float64(problem.scale),
        "softcap": np.float64(problem.softcap or 0.0),
        "bits_q_offset": np.int64(0),
        "dropout_threshold": np.int64(dropout.threshold if dropout else 0),
        "dropout_inverse_keep": np.float64(dropout.inverse_keep if dropout else 1.0),
        "dropout_stream": np.uint64(dropout.stream if dropout else 0).astype(np.int64),
        "threads": np.int64(0),
    }

    @jax.custom_batching.custom_vmap
    def call(q: Array, k: Array, v: Array, *operands: Array) -> tuple[Array, Array]:
        batch, heads, length, _ = q.shape
        # Memory of a "bshd" caller is read as it lies: these transposes undo those of the door, and XLA drops both.
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v)) if bshd else (q, k, v)
        out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
        lse = jax.ShapeDtypeStruct((batch, heads, length), problem.accumulator)
        out, lse = jax.ffi.ffi_call(_TARGET, (out, lse))(q, k, v, *operands, **attributes)
        return (out.swapaxes(1, 2) if bshd else out), lse

    @call.def_vmap
    def _vmap(size: int, mapped: list[bool], *args: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        plan = [_Mapped(kind, x, flag) for kind, x, flag in zip(("q", "k", "v", *kinds), args, mapped, strict=True)]
        batch = args[0].shape[1 if mapped[0] else 0]
        if all(part.folds(batch) for part in plan):
            out, lse = call(*(part.folded(size, batch) for part in plan))
            return (out.reshape(size, batch, *out.shape[1:]), lse.reshape(size, batch, *lse.shape[1:])), (True, True)

        def one(moving: list[Array]) -> tuple[Array, Array]:
            rest = iter(moving)
            return call(*(next(rest) if part.mapped else part.array for part in plan))

        return jax.lax.map(one, [part.array for part in plan if part.mapped]), (True, True)

    return call


@dataclass(frozen=True, slots=True, eq=False)
class _Mapped:
    """An operand under `vmap`, with the mapped axis first where it is mapped."""

    kind: str
    array: Array
    mapped: bool

    def folds(self, batch: int) -> bool:
        """Whether the mapped axis can become a part of the batch axis without copying anything of Sq x Sk."""
        if self.kind == "seed":
            return False  # dropout counts batch rows, and those of every mapped call begin at 0
        if self.kind == "sinks" or (self.kind == "bits" and self.mapped):
            return not self.mapped
        if self.kind in ("mask", "biases", "bits"):
            rows = self.array.shape[1 if self.mapped else 0]
            return rows == batch if self.mapped else rows == 1
        return True

    def folded(self, size: int, batch: int) -> Array:
        """(size * batch, …), or as it is where it is the same for all."""
        x = self.array
        if not self.mapped:
            if self.kind == "sinks" or (self.kind not in "qkv" and x.shape[0] == 1) or self.kind == "bits":
                return x
            x = jnp.broadcast_to(x, (size, *x.shape))
        x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        return x.reshape(size * batch, *x.shape[2:])


@lru_cache(maxsize=1)
def _register() -> None:
    """Tell XLA of the handler, at the first call that needs it: a handler refused before jax has started breaks jax."""
    from .. import _native

    jax.devices("cpu")
    try:
        jax.ffi.register_ffi_target(_TARGET, _native.xla_handler(), platform="cpu")
    except Exception as error:
        raise RuntimeError(
            f"kernel: this jaxlib refused tilewise's native kernel ({error}); pass kernel='portable'"
        ) from error


def _labels(q: Array, k: Array) -> tuple[Array, Array]:
    """Labels as 32-bit integers that agree where those given agree."""
    q, k = jnp.asarray(q), jnp.asarray(k)
    if q.dtype.itemsize > 4 or k.dtype.itemsize > 4:
        order = jnp.sort(jnp.concatenate([q.ravel(), k.ravel()]))
        q, k = (jnp.searchsorted(order, x.ravel()).reshape(x.shape) for x in (q, k))
    return q.astype(jnp.int32), k.astype(jnp.int32)
