"""aten's flash-attention functions. Causal means bottom-right in all of them: the last query sees the last key."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Dropout
from ..torch_mha.checks import AtenError, expect
from .calls import Attend, Dense, Philox, dropout_of, expect_four, gradients, turned
from .debug import debug_mask
from .packed import packed_attend
from .positions import Band, Packed, alibi_bias, dense_mask, offset_of

FlashResult = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, Tensor, Tensor, Tensor]


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> FlashResult:
    """Attention of (B, H, S, D), as aten's function of this name.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D). value: (B, Hkv, Sk, Dv). One floating dtype.
        is_causal: bottom-right, query i sees the keys up to i + Sk - Sq.
        return_debug_mask: also give the probabilities (B, Hq, Sq, Sk), dropped ones negative; quadratic.
        scale: None is 1 / sqrt(D).

    Returns:
        output (B, Hq, Sq, Dv), logsumexp (B, Hq, Sq), None, None, Sq, Sk, rng_state (2,) and unused (), uint64, and the
        debug mask, which is empty where not asked for.

    Raises:
        ValueError (also a RuntimeError): not 4-D, or another number of values than of keys.
    """
    expect_four(query, key, value)
    expect(key.shape[2] == value.shape[2], "value: Key and Value must have the same sequence length")
    q_len, k_len = query.shape[2], key.shape[2]
    q, k, v = turned(query, key, value)
    out, lse, state, unused, debug = _flash_attention_forward(
        q, k, v, None, None, q_len, k_len, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, q_len, k_len, state, unused, debug


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of (B, S, H, D), or of packed (T, H, D) with cumulative lengths, as aten's function of this name.

    Args:
        query: (B, Sq, Hq, D) or (Tq, Hq, D). key: (B, Sk, Hkv, D) or (Tk, Hkv, D). value: as key, with Dv.
        cum_seq_q, cum_seq_k: (B + 1,) integers, both or neither.
        max_q, max_k: the longest lengths; packed results do not depend on them.
        is_causal: bottom-right, in each sequence.
        return_debug_mask: also give the probabilities, dropped ones negative; of dense inputs without windows alone.
        window_size_left, window_size_right: keys seen on either side, inclusive; None or -1 is unbounded.
        seqused_k: (B,) integers, how many keys of each sequence exist; positions are counted back from the last.
        alibi_slopes: (Hq,) or (B, Hq) floats: -slope * |i + Sk - Sq - j| is added, with a gradient to the slopes.
        block_table: must be None.
        num_splits: a hint about speed, on which no result depends.

    Returns:
        output as query, with Dv; softmax_logsumexp (B, Hq, Sq), or (Hq, Tq) of packed inputs; rng_state (2,) and
        unused (), uint64; and the debug mask, which is empty where not asked for.

    Raises:
        ValueError (also a RuntimeError): cumulative lengths for one side alone, ranks that do not fit, a block table.
    """
    expect(block_table is None, "block_table: got a tensor, expected None: keys are not paged here")
    philox = Philox.fresh(dropout_p, query.device)
    drop = philox.dropout(dropout_p)
    band = Band.of(is_causal, window_size_left, window_size_right)
    attend, (q, k, v) = _call(query, key, value, cum_seq_q, cum_seq_k, band, drop, scale, seqused_k, alibi_slopes)
    out, lse = attend(q, k, v)
    unused = torch.zeros((), dtype=torch.int64, device=query.device).view(torch.uint64)
    debug = query.new_empty(0)
    if return_debug_mask:
        simple = cum_seq_q is None and seqused_k is None and alibi_slopes is None
        if not simple:
            raise AtenError("return_debug_mask: got True with packed keys, seqused_k or ALiBi, expected False")
        debug = debug_mask(q, k, dense_mask(band, q.shape[2], k.shape[2], None), scale, drop)
    if cum_seq_q is None:
        return out.transpose(1, 2), lse, philox.pair(), unused, debug
    return out[0].transpose(0, 1), lse[0], philox.pair(), unused, debug


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to query, key and value of `_scaled_dot_product_flash_attention`, in their shapes.

    Args:
        grad_out, out: (B, Hq, Sq, Dv). query, key, value, is_causal, scale: as there.
        logsumexp: (B, Hq, Sq). It and `out` may be those of a larger whole that this call was merged into.
        cum_seq_q, cum_seq_k, max_q, max_k: not read; the sizes say them.
        philox_seed, philox_offset: what the forward function returned.
    """
    drop = dropout_of(dropout_p, philox_seed, philox_offset, query.device)
    mask = dense_mask(Band.of(is_causal, None, None), query.shape[2], key.shape[2], None)
    return gradients(Dense(mask, drop, scale), grad_out, (query, key, value), out, logsumexp)


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to query, key and value of `_flash_attention_forward`, in their shapes; arguments as there.

    `out` and `logsumexp` may be those of a larger whole that the call was merged into.
    """
    drop = dropout_of(dropout_p, rng_state, unused, query.device)
    band = Band.of(is_causal, window_size_left, window_size_right)
    attend, inputs = _call(query, key, value, cum_seq_q, cum_seq_k, band, drop, scale, None, None)
    if cum_seq_q is None:
        return turned(*gradients(attend, grad_out.transpose(1, 2), inputs, out.transpose(1, 2), logsumexp))
    grad_out, out = (array.transpose(0, 1)[None] for array in (grad_out, out))
    found = gradients(attend, grad_out, inputs, out, logsumexp[None])
    return tuple(array[0].transpose(0, 1) for array in found)


def _call(
    query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, band: Band,
    drop: Dropout | None, scale: float | None,
    used: Tensor | None, slopes: Tensor | None,
) -> tuple[Attend, tuple[Tensor, ...]]:  # fmt: skip
    """The call, and its inputs in (B, H, S, D), or in (1, H, T, D) where they are packed."""
    if (cum_q is None) != (cum_k is None):
        name = "cum_seq_q" if cum_q is None else "cum_seq_k"
        raise AtenError(
            f"{name}: cumulative_sequence_length_q and cumulative_sequence_length_k must be both set or both not set"
        )
    if cum_q is not None and cum_k is not None:
        for name, array in (("query", query), ("key", key), ("value", value)):
            expect(
                array.dim() == 3, f"{name}: has shape {tuple(array.shape)}, expected (T, H, D) with cumulative lengths"
            )
        inputs = tuple(array.transpose(0, 1)[None] for array in (query, key, value))
        packed = Packed(cum_q, cum_k, used)
        return packed_attend(packed, band, query.shape[0], dropout=drop, scale=scale, slopes=slopes), inputs
    expect_four(query, key, value)
    inputs = turned(query, key, value)
    q_len, k_len = query.shape[1], key.shape[1]
    fixed = None
    if slopes is not None:
        fixed = alibi_bias(slopes, offset_of(band, q_len, k_len, used), q_len, k_len)
    return Dense(dense_mask(band, q_len, k_len, used), drop, scale, fixed), inputs
