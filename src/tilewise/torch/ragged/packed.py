"""Attention within each sequence of packed rows, which gets the very bits of the call on its own.

Where the compiled kernel can, it takes all sequences in one call. Elsewhere there is a call for each, or for the small
ones of equal lengths: these share one as rows of its batch, which kernels keep apart; sequences of different lengths
share none, since a row's sum would be cut into other tiles.
Nothing is padded, and rows that no sequence holds are never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import _api
from ...contract import Dropout
from ...masks.algebra import Mask, as_mask
from ...masks.biases import Bias, as_bias
from ..call import autocast
from . import together
from .biases import bias_of, per_sequence, told_apart
from .facts import Lengths
from .masks import Members, mask_of
from .sequences import Sequences, put, take

_LARGE = 2**15  # elements of a sequence from which on a call of its own costs less than bringing its rows together
_STREAMS = 2**32  # what separates the dropout of two sequences, modulo 2^64 as in one call for all


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The options of `tilewise.attention`; masks and biases in each sequence's own coordinates."""

    mask: Mask | None
    bias: Bias | None
    scale: float | None
    softcap: float | None
    sinks: Any
    dropout: Dropout | None
    kernel: str | None
    allow_quadratic: bool


def options_of(*, mask: Any, bias: Any, dropout: Any, **others: Any) -> Options:
    """The options as a caller gave them.

    Raises:
        TypeError: a mask, bias or dropout that is none; the rest is checked by `tilewise.attention`.
    """
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout: got {type(dropout).__name__}, expected tilewise.Dropout(p, seed) or None")
    mask = None if mask is None else as_mask(mask)
    return Options(mask=mask, bias=None if bias is None else as_bias(bias), dropout=dropout, **others)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_sequences: Sequences, k_sequences: Sequences, options: Options, max_q: int
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, Dv) and lse (Tq, Hq) of q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv).

    `max_q` is the number of queries for which relative tables were made.
    """
    q, k, v = autocast(q, k, v)
    lengths = Lengths(*q_sequences.arrays(), *k_sequences.arrays(), q.shape[0])

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend_one_by_one(q, k, v, q_sequences, k_sequences, options, max_q)
        return out, lse.transpose(0, 1)

    found = together.attend(q, k, v, lengths, options, max_q, one_by_one)
    out, lse = one_by_one(q, k, v) if found is None else found
    return out, lse.transpose(0, 1)


def attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, q_sequences: Sequences, k_sequences: Sequences, options: Options, max_q: int
) -> tuple[Tensor, Tensor]:
    """The same by a call for each sequence, or for the small ones of equal lengths."""
    large = q.numel() + k.numel() + v.numel() > _LARGE * len(q_sequences)
    alone = large or options.dropout is not None or told_apart(options.bias)
    # Where there is no query, one empty call keeps the result differentiable.
    groups = list(_groups(q_sequences, k_sequences, alone)) or [Members((), len(q_sequences), 0, 0)]
    order = [n for group in groups for n in group.numbers]
    q_rows, k_rows = q_sequences.rows(order), k_sequences.rows(order)
    # Split, not sliced: the gradient of a slice is as large as the whole.
    q_sizes = [len(group.numbers) * group.q_len for group in groups]
    k_sizes = [len(group.numbers) * group.k_len for group in groups]
    q_pieces = take(q, q_rows).split(q_sizes)
    k_pieces, v_pieces = (take(x, k_rows).split(k_sizes) for x in (k, v))
    biases = None if options.bias is None else per_sequence(options.bias, len(q_sequences))
    outs, lses = [], []
    for group, q_piece, k_piece, v_piece in zip(groups, q_pieces, k_pieces, v_pieces, strict=True):
        q_shape, k_shape = ((len(group.numbers) or 1, length) for length in (group.q_len, group.k_len))
        operands = (q_piece.unflatten(0, q_shape), k_piece.unflatten(0, k_shape), v_piece.unflatten(0, k_shape))
        out, lse = _api.attention(
            *operands, layout="bshd", return_lse=True, **_of_one_call(options, biases, group, max_q)
        )
        outs.append(out.flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    tokens = q.shape[0]
    return put(torch.cat(outs), q_rows, tokens, 0.0), put(torch.cat(lses), q_rows, tokens, float("-inf"))


def _groups(q_sequences: Sequences, k_sequences: Sequences, alone: bool) -> Iterator[Members]:
    """The sequences that have queries, those of the same lengths together unless `alone`."""
    batch = len(q_sequences)
    found: dict[tuple[int, ...], list[int]] = {}
    for n, lengths in enumerate(zip(q_sequences.lengths, k_sequences.lengths, strict=True)):
        if lengths[0]:
            found.setdefault((*lengths, n) if alone else lengths, []).append(n)
    for (q_len, k_len, *_), numbers in found.items():
        yield Members(numbers, batch, q_len, k_len)


def _of_one_call(options: Options, biases: list[Bias] | None, group: Members, max_q: int) -> dict[str, Any]:
    """The options of one call."""
    if not group.numbers:
        return {}
    first, dropout = group.numbers[0], options.dropout
    if dropout is not None:  # the sequence is alone
        dropout = replace(dropout, stream=(dropout.stream + first * _STREAMS) % 2**64)
    return {
        "mask": None if options.mask is None else mask_of(options.mask, group),
        "bias": None if biases is None else bias_of(biases[first], group, max_q),
        "scale": options.scale,
        "softcap": options.softcap,
        "sinks": options.sinks,
        "dropout": dropout,
        "kernel": options.kernel,
        "allow_quadratic": options.allow_quadratic,
    }
