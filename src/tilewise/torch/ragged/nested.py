"""Nested tensors: each sequence a tensor of its own, in torch's jagged or strided layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.biases import Bias
from . import traced
from .packed import Options, attend, options_of
from .sequences import Sequences, take
from .traced import Bounds
from .uncompiled import uncompiled


def nested_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
    kernel: str | None = None,
    allow_quadratic: bool = False,
) -> Any:
    """Attention of nested tensors, with every mask and bias, in memory linear in their rows: nothing is padded.

    Masks, biases and dropout are those of `varlen_attention`: in each sequence's own coordinates, with arrays made for
    the longest sequence.

    Args:
        q: (B, Hq, j, D) with a ragged j, or (B, j, D) for one head; jagged or strided layout, transposed, narrowed and
            with holes as it may be. Or a plain tensor, whose sequences are of one length.
        k: (B, Hkv, i, D), v: (B, Hkv, i, Dv), likewise; their lengths i are their own, and equal to one another.
        mask, bias, scale, softcap, sinks, dropout, kernel, allow_quadratic: as of `varlen_attention`.
        return_lse: also return lse.

    Returns:
        out (B, Hq, j, Dv), nested as q is (with a jagged q's own offsets, so that both can be added); with
        `return_lse` the pair (out, lse), lse (B, Hq, j), nested likewise. Gradients flow to nested leaves.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with its name.
    """
    nested = {name: _rows_of(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    for name, x in (("k", k), ("v", v)):
        if x.dim() != q.dim():
            raise ValueError(f"{name}: has {x.dim()} axes, expected {q.dim()} as q has")
    options = options_of(
        mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, kernel=kernel,
        allow_quadratic=allow_quadratic,
    )  # fmt: skip
    queries, keys, values = nested["q"], nested["k"], nested["v"]
    if torch.compiler.is_compiling() and traced.is_traceable(options) and _stand_alike(k, v):
        q_bounds, k_bounds = (Bounds(x.starts, x.lengths) for x in (queries, keys))
        out, lse = traced.attend(queries.rows, keys.rows, values.rows, q_bounds, k_bounds, options)
    else:
        out, lse = _one_by_one(queries, keys, values, options)
    return (queries.alike(out), queries.alike(lse)) if return_lse else queries.alike(out)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A nested tensor as the rows of all its sequences.

    Attributes:
        rows: (T, H, D).
        starts, lengths: (B,) integers; sequence n is the rows [starts[n], starts[n] + lengths[n]).
        alike: other rows, (T, H, …), nested in the same way.
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    alike: Callable[[Tensor], Tensor]

    def sequences(self) -> Sequences:
        """Where the sequences stand, read on the host."""
        return Sequences(tuple(self.starts.tolist()), tuple(self.lengths.tolist()))


@uncompiled
def _one_by_one(q: Rows, k: Rows, v: Rows, options: Options) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, Dv) and lse (Tq, Hq)."""
    k_rows, v_rows = k.rows, v.rows
    q_sequences, k_sequences, v_sequences = (x.sequences() for x in (q, k, v))
    for name, sequences in (("k", k_sequences), ("v", v_sequences)):
        if len(sequences) != len(q_sequences):
            raise ValueError(f"{name}: holds {len(sequences)} sequences, expected {len(q_sequences)} as q does")
    if v_sequences.lengths != k_sequences.lengths:
        raise ValueError(f"v: has lengths {v_sequences.lengths}, expected {k_sequences.lengths} as k has")
    if v_sequences != k_sequences:  # other holes: bring both to none
        k_rows, v_rows = _without_holes(k_rows, k_sequences), _without_holes(v_rows, v_sequences)
        stops = accumulate(k_sequences.lengths)
        starts = tuple(stop - length for stop, length in zip(stops, k_sequences.lengths, strict=True))
        k_sequences = Sequences(starts, k_sequences.lengths)
    return attend(q.rows, k_rows, v_rows, q_sequences, k_sequences, options, q_sequences.longest)


def _stand_alike(k: Tensor, v: Tensor) -> bool:
    """Whether keys and values are known to stand in the same rows: one raggedness has one symbol."""
    if not (k.is_nested and v.is_nested):
        return not k.is_nested and not v.is_nested and k.shape[-2] == v.shape[-2]
    no_holes = k.layout == v.layout == torch.jagged and k.lengths() is None and v.lengths() is None
    return no_holes and k.shape[-2] == v.shape[-2]


def _without_holes(rows: Tensor, sequences: Sequences) -> Tensor:
    return take(rows, sequences.rows(range(len(sequences))))


def _rows_of(name: str, x: Tensor) -> Rows:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch tensor")
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: has {x.dim()} axes, expected 4 (B, H, j, D) or 3 (B, j, D)")
    if not x.is_nested:
        return _plain(x)
    return _jagged(name, x) if x.layout == torch.jagged else _strided(name, x)


def _plain(x: Tensor) -> Rows:
    batch, length = x.shape[0], x.shape[-2]
    heads = x.dim() == 4
    rows = (x.transpose(1, 2) if heads else x.unsqueeze(2)).flatten(0, 1)

    def alike(rows: Tensor) -> Tensor:
        full = rows.unflatten(0, (batch, length))
        return full.transpose(1, 2) if heads else full.squeeze(2)

    lengths = torch.full((batch,), length, device="cpu")
    return Rows(rows, lengths.cumsum(0) - lengths, lengths, alike)


def _jagged(name: str, x: Tensor) -> Rows:
    heads = x.dim() == 4
    if x._ragged_idx != x.dim() - 2:
        raise ValueError(f"{name}: is ragged in axis {x._ragged_idx}, expected {x.dim() - 2}, that of the sequence")
    rows = x.transpose(1, 2).values() if heads else x.values().unsqueeze(1)
    offsets, lengths = x.offsets(), x.lengths()

    def alike(rows: Tensor) -> Tensor:
        # The same offsets (with holes: lengths) stand for the same raggedness: only so can both be added.
        nested = torch.nested.nested_tensor_from_jagged(rows if heads else rows.squeeze(1), offsets, lengths)
        return nested.transpose(1, 2) if heads else nested

    return Rows(rows, offsets[:-1], offsets.diff() if lengths is None else lengths, alike)


def _strided(name: str, x: Tensor) -> Rows:
    heads = x.dim() == 4
    parts = [part.transpose(0, 1) if heads else part.unsqueeze(1) for part in x.unbind()]
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"{name}: has sequences of heads and widths {sorted(shapes)}, expected one of each")
    sizes = [part.shape[0] for part in parts]

    def alike(rows: Tensor) -> Tensor:
        pieces = rows.split(sizes)
        return torch.nested.as_nested_tensor([p.transpose(0, 1) if heads else p.squeeze(1) for p in pieces])

    lengths = torch.tensor(sizes, device="cpu")
    return Rows(torch.cat(parts), lengths.cumsum(0) - lengths, lengths, alike)
