"""The backward pass in compiled code, for NumPy arrays and torch CPU tensors.

Method: probabilities made again from lse, tile by tile (Dao et al., FlashAttention, 2022); see `native/README.md`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np

from ..._arrays import Array, dtype_name, family_of
from ...contract import Gradients, Operands, Plan
from ...problem import AttentionProblem
from .buffers import broadcast_strides, cast, memory, packed
from .call import call_of, empty_like_layout, slabs, tensor
from .facts import Alive

_NOT_WANTED = (0, 0, 0, 0)


def backward(plan: Plan, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array | None) -> Gradients:
    """The gradients that the problem wants, in the shapes and dtypes of the operands.

    Args:
        plan: of a problem on the CPU; its `gradients` say what is wanted.
        operands: those of the forward pass.
        out (B, Hq, Sq, Dv), lse (B, Hq, Sq): its results; d_out, d_lse: their gradients, d_lse may be None.

    Raises:
        ValueError, RuntimeError, MemoryError: from the core, beginning with the argument's name.
    """
    from ... import _native  # pyright: ignore[reportAttributeAccessIssue]  # absent in a pure Python install

    p, wanted = plan.problem, plan.problem.gradients
    alive: Alive = []
    # Slabs of rows add to keys and values; one call writes them.
    adds = operands.mask.lazy is not None
    keys = _zeros if adds else empty_like_layout
    dtype = p.accumulator if adds else p.result
    found = Gradients(
        q=empty_like_layout(p, operands.q, p.q_heads, p.q_len, p.head_dim, p.result) if "q" in wanted else None,
        k=keys(p, operands.k, p.kv_heads, p.k_len, p.head_dim, dtype) if "k" in wanted else None,
        v=keys(p, operands.v, p.kv_heads, p.k_len, p.value_dim, dtype) if "v" in wanted else None,
    )
    want_bias, want_table = "bias" in wanted, "table" in wanted and operands.table is not None
    sums = [_Sum.of_bias(p, tuple(bias.shape)) for bias in operands.dense] if want_bias else []
    table = _Sum.of_table(p) if want_table else None
    sinks = np.zeros(p.q_heads, p.accumulator) if "sinks" in wanted and operands.sinks is not None else None
    d_lse = None if d_lse is None else packed(cast(d_lse, p.accumulator), 3)
    call = {
        **call_of(p, operands, out, lse, alive),
        "d_out": tensor(cast(d_out, p.dtype), alive),
        "d_lse": 0 if d_lse is None else d_lse.address,
        "d_q": _NOT_WANTED if found.q is None else tensor(found.q, alive),
        "d_k": _NOT_WANTED if found.k is None else tensor(found.k, alive),
        "d_v": _NOT_WANTED if found.v is None else tensor(found.v, alive),
        "adds": adds,
        "gather": tuple(part.place for part in (*sums, *([table] if table else []))),
        "d_sinks": 0 if sinks is None else memory(sinks).address,
    }
    for part, bits in slabs(operands.mask, p):
        _native.backward(rows=part, bits=bits, **call)
    return Gradients(
        q=found.q,
        k=None if found.k is None else cast(found.k, p.result),
        v=None if found.v is None else cast(found.v, p.result),
        dense=tuple(part.result(bias) for part, bias in zip(sums, operands.dense, strict=True))
        if want_bias
        else (None,) * len(operands.dense),
        table=None if table is None else table.result(operands.table),
        sinks=None if sinks is None else _like(sinks, operands.sinks),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """A sum of the scores' gradients on its way: (B or 1, Hq or 1, rows, keys) or (B, Hq, diagonals).

    Attributes:
        array: zeros that the core adds to. Where the bias has one row or one key, batch rows and heads are kept apart,
            in memory linear in Sq + Sk, and summed at the end.
        place: its address and strides over (b, h, i, j).
    """

    array: np.ndarray
    place: tuple[int, ...] = field(default=())

    @staticmethod
    def of_bias(p: AttentionProblem, shape: tuple[int, ...]) -> _Sum:
        batch, heads, q_len, k_len = shape
        if q_len == 1 or k_len == 1:
            batch, heads = p.batch, p.q_heads
            # Where both are one, the rows are kept apart too: a segment of keys must not meet another's sums.
            q_len = p.q_len if k_len == 1 else 1
        array = np.zeros((batch, heads, q_len, k_len), p.accumulator)
        found = memory(array)
        return _Sum(array, (found.address, *broadcast_strides(found, 4)))

    @staticmethod
    def of_table(p: AttentionProblem) -> _Sum:
        array = np.zeros((p.batch, p.q_heads, max(0, p.q_len + p.k_len - 1)), p.accumulator)
        found = memory(array)
        first = found.address + (p.q_len - 1) * array.itemsize
        return _Sum(array, (first, *broadcast_strides(found, 2), -1, 1))

    def result(self, operand: Array) -> Array:
        """Summed over the axes that the operand has as 1, in its family and dtype."""
        axes = tuple(
            n for n, (size, full) in enumerate(zip(operand.shape, self.array.shape, strict=True)) if size != full
        )
        return _like(self.array.sum(axes, keepdims=True) if axes else self.array, operand)


def _zeros(p: AttentionProblem, like: Array, heads: int, length: int, width: int, dtype: str) -> Array:
    """Zeros in the problem's layout."""
    array = empty_like_layout(p, like, heads, length, width, dtype)
    if family_of(array) == "torch":
        array.zero_()  # in one stroke, where an assignment copies a number many times
    else:
        array[...] = 0
    return array


def _like(array: np.ndarray, operand: Array) -> Array:
    if family_of(operand) == "torch":
        return cast(sys.modules["torch"].from_numpy(np.ascontiguousarray(array)), dtype_name(operand))
    return array.astype(operand.dtype, copy=False)
