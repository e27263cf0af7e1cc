"""aten's memory-efficient attention functions (CUTLASS). Causal means top-left unless the mask type says otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...contract import Dropout
from ..torch_mha.checks import AtenError, expect
from .calls import Attend, Dense, Philox, dropout_of, expect_four, gradients, turned
from .packed import packed_attend
from .positions import Band, Packed, dense_mask


def _scaled_dot_product_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of (B, H, S, D) with a bias, as aten's function of this name; for any B, with dropout, too.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D). value: (B, Hkv, Sk, Dv). One floating dtype.
        attn_bias: floats that broadcast to (B, Hq, Sq, Sk), added to the scores, or None.
        compute_log_sumexp: without it the log-sum-exp has no elements, (B, Hq, 0).
        is_causal: top-left, query i sees the keys up to i.

    Returns:
        output (B, Hq, Sq, Dv), log_sumexp (B, Hq, Sq), philox_seed and philox_offset, 0-D int64.
    """
    expect_four(query, key, value)
    q, k, v = turned(query, key, value)
    out, lse, seed, offset, _, _ = _efficient_attention_forward(
        q, k, v, attn_bias, None, None, None, None, dropout_p, int(is_causal), compute_log_sumexp,
        scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse, seed, offset


def _efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Tensor | None = None,
    window_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Attention of (B, S, H, D), packed with B = 1 where cumulative lengths are given, as aten's function of this name.

    Args:
        query: (B, Sq, Hq, D). key: (B, Sk, Hkv, D). value: (B, Sk, Hkv, Dv).
        bias: floats that broadcast to (B, Hq, Sq, Sk); for packed inputs B counts sequences, and Sq and Sk are the
            longest lengths.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) integers, both or neither.
        max_seqlen_q, max_seqlen_k: the longest lengths of packed inputs.
        custom_mask_type: 0 none, 1 causal top-left, 2 causal bottom-right, in each sequence.
        compute_log_sumexp: without it the log-sum-exp has no elements.
        seqlen_k: (B,) or (sequences,), how many keys exist; bottom-right counts from the last of them.
        window_size: keys that a query sees, its own position the last of them; None or 0 is unbounded.

    Returns:
        output (B, Sq, Hq, Dv); logsumexp (B, Hq, Sq), of packed inputs (sequences, Hq, max_seqlen_q), -inf past a
        sequence's end; philox_seed and philox_offset, 0-D int64; the longest lengths of queries and keys.

    Raises:
        ValueError (also a RuntimeError): an unknown mask type, cumulative lengths for one side alone, or with B > 1.
    """
    philox = Philox.fresh(dropout_p, query.device)
    attend, packed, inputs = _call(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, custom_mask_type,
        philox.dropout(dropout_p), scale, seqlen_k, window_size,
    )  # fmt: skip
    out, lse = attend(*inputs)
    q_len, k_len = query.shape[1], key.shape[1]
    if packed is not None and max_seqlen_q is not None:
        q_len, lse = max_seqlen_q, packed.padded(lse[0], max_seqlen_q)
    lse = lse if compute_log_sumexp else lse[..., :0]
    return out.transpose(1, 2), lse, philox.seed, philox.offset, q_len, k_len if max_seqlen_k is None else max_seqlen_k


def _scaled_dot_product_efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients to query, key, value and attn_bias of `_scaled_dot_product_efficient_attention`, None where not wanted.

    Args:
        grad_out_, out: (B, Hq, Sq, Dv). logsumexp: (B, Hq, at least Sq). Both may be those of a larger whole.
        philox_seed, philox_offset: what the forward function returned.
        grad_input_mask: which of the four are wanted.
    """
    expect_four(query, key, value)
    drop = dropout_of(dropout_p, philox_seed, philox_offset, query.device)
    mask = dense_mask(_band(int(is_causal), None), query.shape[2], key.shape[2], None)
    inputs = (query, key, value) if attn_bias is None else (query, key, value, attn_bias)
    found = gradients(Dense(mask, drop, scale), grad_out_, inputs, out, logsumexp[..., : query.shape[2]])
    found = (*found, None)[:4]
    return tuple(value if wanted else None for value, wanted in zip(found, grad_input_mask, strict=True))


def _efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: int | None = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients to query, key, value and bias of `_efficient_attention_forward`; arguments as there.

    Args:
        logsumexp: as the forward function gave it, or with more places than queries. It and `out` may be those of a
            larger whole.
        bias_requires_grad: whether the last of the four is wanted; else it is None.
        num_splits_key, shared_storage_dqdkdv: hints about speed, on which no result depends.
    """
    drop = dropout_of(dropout_p, philox_seed, philox_offset, query.device)
    attend, packed, inputs = _call(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, custom_mask_type, drop, scale, None,
        window_size,
    )  # fmt: skip
    q_len = query.shape[1]
    lse = logsumexp[..., :q_len] if packed is None else packed.unpadded(logsumexp, q_len)[None]
    grad_out, out = turned(grad_out_, out)
    found = gradients(attend, grad_out, inputs, out, lse)
    return (*turned(*found[:3]), found[3] if bias_requires_grad and bias is not None else None)


def _band(mask_type: int, window_size: int | None) -> Band:
    expect(mask_type in (0, 1, 2), f"custom_mask_type: got {mask_type}, expected 0, 1 or 2")
    left = window_size - 1 if window_size else None
    return Band.of(mask_type != 0, left, None, end=mask_type == 2)


def _call(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int | None, mask_type: int, drop: Dropout | None, scale: float | None, used: Tensor | None,
    window_size: int | None,
) -> tuple[Attend, Packed | None, tuple[Tensor, ...]]:  # fmt: skip
    """The call, how its sequences are packed, and its inputs in (B, H, S, D)."""
    expect_four(query, key, value)
    band = _band(mask_type, window_size)
    inputs = turned(query, key, value)
    inputs = inputs if bias is None else (*inputs, bias)
    if (cu_q is None) != (cu_k is None):
        name = "cu_seqlens_q" if cu_q is None else "cu_seqlens_k"
        raise AtenError(f"{name}: got None, expected cumulative lengths of queries and keys, or of neither")
    if cu_q is None or cu_k is None:
        return Dense(dense_mask(band, query.shape[1], key.shape[1], used), drop, scale), None, inputs
    expect(query.shape[0] == 1, f"query: has batch size {query.shape[0]}, cu_seqlens only supports batch size 1")
    expect(max_q is not None, "max_seqlen_q: got None, expected the longest length, as cu_seqlens_q is given")
    packed = Packed(cu_q, cu_k, used)
    attend = packed_attend(packed, band, query.shape[1], dropout=drop, scale=scale, biased=bias is not None)
    return attend, packed, inputs
