"""The native kernel inside jax programs: calls into the compiled core through XLA's foreign function interface.

The operands' order and the attributes are those stated at the top of `native/bind/xla_ffi.cpp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.portable.jax_scan import Facts, Smooth
from ..masks.lower import TileBits
from ..philox import number_of
from ..problem import AttentionProblem

Array = Any


def forward(problem: AttentionProblem, smooth: Smooth, facts: Facts) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq), by the native kernel on the CPU."""
    call, operands = _Call.of(problem, smooth, facts)
    p = problem
    out = call.tensor(p.q_heads, p.q_len, p.value_dim, p.result)
    out, lse = call("tilewise_forward", [out, call.rows], operands)
    return call.turned(out), lse


def backward(
    problem: AttentionProblem,
    wanted: tuple[bool, ...],
    smooth: Smooth,
    facts: Facts,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> list[Array]:
    """Gradients of the wanted leaves of `smooth` in their shapes, by the native kernel on the CPU.

    Those of q, k and v are in the result's dtype, the others in the accumulator's.
    """
    call, operands = _Call.of(problem, smooth, facts)
    p, biases = problem, len(smooth.dense)
    q, k, v = wanted[:3]
    dense, rest = wanted[3 : 3 + biases], iter(wanted[3 + biases :])
    table, sinks = (x is not None and next(rest) for x in (smooth.table, smooth.sinks))
    bits = {
        1: q and call.tensor(p.q_heads, p.q_len, p.head_dim, p.result),
        2: k and call.tensor(p.kv_heads, p.k_len, p.head_dim, p.result),
        4: v and call.tensor(p.kv_heads, p.k_len, p.value_dim, p.result),
        16: table and jax.ShapeDtypeStruct((p.batch, p.q_heads, p.q_len + p.k_len - 1), p.accumulator),
        32: sinks and jax.ShapeDtypeStruct((p.q_heads,), p.accumulator),
        **{
            256 << n: wants and jax.ShapeDtypeStruct(_gathered(p, bias.shape), p.accumulator)
            for n, (wants, bias) in enumerate(zip(dense, smooth.dense, strict=True))
        },
    }
    types = {bit: shape for bit, shape in bits.items() if shape}
    if not types:
        return []
    more = (call.turned(out.astype(p.dtype)), lse, call.turned(d_out.astype(p.dtype)), d_lse.astype(p.accumulator))
    found = call("tilewise_backward", list(types.values()), (*operands, *more), wanted=np.int64(sum(types)))
    results = dict(zip(types, found, strict=True))
    results.update({bit: call.turned(results[bit]) for bit in (1, 2, 4) if bit in results})
    # In the order of the leaves: the biases stand before the table and the sinks.
    order = [1, 2, 4, *(256 << n for n in range(biases)), 16, 32]
    like = [smooth.q, smooth.k, smooth.v, *smooth.dense, smooth.table, smooth.sinks]
    return [_summed(results[bit], x.shape) for bit, x in zip(order, like, strict=True) if bit in results]


def tangent(
    problem: AttentionProblem, smooth: Smooth, facts: Facts, out: Array, lse: Array, moving: Smooth
) -> tuple[Array, Array]:
    """Tangents of out and lse in their shapes and dtypes along `moving`, by the native kernel on the CPU."""
    call, operands = _Call.of(problem, smooth, facts)
    p = problem
    tensors = {1: moving.q, 2: moving.k, 4: moving.v}
    others = {**{256 << n: d for n, d in enumerate(moving.dense)}, 16: moving.table, 32: moving.sinks}
    given = {bit: call.turned(x) for bit, x in tensors.items() if x is not None}
    given |= {bit: x for bit, x in others.items() if x is not None}
    types = [call.tensor(p.q_heads, p.q_len, p.value_dim, p.result), call.rows]
    rows = (call.turned(out.astype(p.result)), lse)
    d_out, d_lse = call("tilewise_tangent", types, (*operands, *rows, *given.values()), moving=np.int64(sum(given)))
    return call.turned(d_out), d_lse


def _gathered(p: AttentionProblem, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which the core sums the gradient of a bias of this shape.

    Where it has one row or one key, batch rows and heads are kept apart, in memory linear in Sq + Sk; where both are
    one, the rows too.
    """
    batch, heads, q_len, k_len = shape
    if q_len == 1 or k_len == 1:
        return p.batch, p.q_heads, p.q_len if k_len == 1 else 1, k_len
    return batch, heads, q_len, k_len


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` summed over the axes that are larger than in `shape`."""
    axes = tuple(n for n, (size, wanted) in enumerate(zip(x.shape, shape, strict=True)) if size != wanted)
    return x.sum(axes, keepdims=True) if axes else x


def words_of(bits: TileBits) -> tuple[np.ndarray, np.ndarray]:
    """The tile index, and the tiles' 64-bit words as pairs (low, high): jax has no 64-bit integers unless asked."""
    return bits.index, np.ascontiguousarray(bits.words, "<u8").view("<u4").reshape(*bits.words.shape, 2)


# The bit of `present` for each kind of operand; biases are counted instead.
_PRESENT = {"ranges": 1, "labels": 2, "mask": 4, "bits": 8, "biases": 0, "table": 16, "sinks": 32, "seed": 64}


@dataclass(frozen=True, slots=True)
class _Call:
    """What all handlers take: attributes, and how arrays lie in memory."""

    problem: AttentionProblem
    attributes: dict[str, Any]

    @classmethod
    def of(cls, problem: AttentionProblem, smooth: Smooth, facts: Facts) -> tuple[_Call, tuple[Array, ...]]:
        """The call, and the operands that all handlers take."""
        mask, dropout = facts.mask, facts.dropout
        strides = _strides(problem, facts) if dropout is not None else (0, 0, 0, 0)
        given = {
            "ranges": (mask.ranges.starts, mask.ranges.stops) if mask.ranges is not None else (),
            "labels": _labels(mask.q_labels, mask.k_labels) if mask.q_labels is not None else (),
            "mask": (mask.dense,) if mask.dense is not None else (),
            "bits": facts.bits or (),
            "biases": smooth.dense,
            "table": (smooth.table,) if smooth.table is not None else (),
            "sinks": (smooth.sinks,) if smooth.sinks is not None else (),
            "seed": (_seed_and_first(problem, facts),) if dropout is not None else (),
        }
        attributes = {
            "present": np.int64(sum(_PRESENT[kind] for kind, group in given.items() if group)),
            "bias_count": np.int64(len(smooth.dense)),
            "layout": np.int64(problem.layout == "bshd"),
            "scale": np.float64(problem.scale),
            "softcap": np.float64(problem.softcap or 0.0),
            "bits_q_offset": np.int64(0),
            "dropout_threshold": np.int64(dropout.threshold if dropout else 0),
            "dropout_inverse_keep": np.float64(dropout.inverse_keep if dropout else 1.0),
            "dropout_stream": np.uint64(dropout.stream if dropout else 0).astype(np.int64),
            **{f"dropout_stride_{axis}": np.int64(stride) for axis, stride in zip("bhij", strides, strict=True)},
            "threads": np.int64(0),
            "part": np.int64(problem.part),
            "row_invariant": np.int64(problem.invariance == "row"),
        }
        call = cls(problem, attributes)
        tensors = (call.turned(x) for x in smooth[:3])
        return call, (*tensors, *(jnp.asarray(array) for group in given.values() for array in group))

    def __call__(self, target: str, results: list[Any], operands: tuple[Array, ...], **more: Any) -> list[Array]:
        _register()
        attributes = {**self.attributes, **more}
        if hasattr(jax, "ffi"):
            return list(jax.ffi.ffi_call(target, results)(*operands, **attributes))
        return list(_early_ffi().ffi_call(target, results, *operands, **attributes))

    def turned(self, x: Array) -> Array:
        """(B, H, S, D) as it lies in memory, and back: these transposes undo those of the door, and XLA drops both."""
        return x.swapaxes(1, 2) if self.problem.layout == "bshd" else x

    def tensor(self, heads: int, length: int, width: int, dtype: str) -> jax.ShapeDtypeStruct:
        """The type of a (B, heads, length, width) result as it lies in memory."""
        axes = (length, heads) if self.problem.layout == "bshd" else (heads, length)
        return jax.ShapeDtypeStruct((self.problem.batch, *axes, width), dtype)

    @property
    def rows(self) -> jax.ShapeDtypeStruct:
        """The type of lse."""
        p = self.problem
        return jax.ShapeDtypeStruct((p.batch, p.q_heads, p.q_len), p.accumulator)


def _strides(problem: AttentionProblem, facts: Facts) -> tuple[int, ...]:
    """What the next batch row, head, query and key add to a pair's number, as signed 64-bit integers."""
    _, strides = facts.dropout.numbering(facts.mask.site.heads, problem.q_len, problem.k_len)
    return tuple((stride + 2**63) % 2**64 - 2**63 for stride in strides)


def _seed_and_first(problem: AttentionProblem, facts: Facts) -> Array:
    """The words of the seed, and of the number of the call's first pair; (4,) uint32."""
    places = (*(facts.corner or (0, 0)), 0, 0)
    first = number_of(facts.dropout, places, facts.mask.site.heads, problem.q_len, problem.k_len, jnp, wide=False)
    return jnp.concatenate([facts.dropout.seed, *first])


def _early_ffi() -> Any:
    """Where jax has its foreign functions before 0.5."""
    return import_module("jax.extend.ffi")


@lru_cache(maxsize=1)
def _register() -> None:
    """Tell XLA of the handlers, at the first call that needs them: one refused before jax has started breaks jax."""
    from .. import _native

    jax.devices("cpu")
    try:
        ffi = jax.ffi if hasattr(jax, "ffi") else _early_ffi()
        ffi.register_ffi_target("tilewise_forward", _native.xla_forward(), platform="cpu")
        ffi.register_ffi_target("tilewise_backward", _native.xla_backward(), platform="cpu")
        ffi.register_ffi_target("tilewise_tangent", _native.xla_tangent(), platform="cpu")
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
