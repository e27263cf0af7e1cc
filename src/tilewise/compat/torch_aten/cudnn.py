"""aten's cuDNN attention functions. Causal means top-left in all of them: query i sees the keys up to i."""

from __future__ import annotations

from torch import Tensor

from ...contract import Dropout
from ..torch_mha.checks import AtenError, expect
from .calls import Attend, Dense, Philox, dropout_of, gradients
from .packed import packed_attend
from .positions import Band, Packed, dense_mask

CudnnResult = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, int, Tensor, Tensor, None]


def _scaled_dot_product_cudnn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> CudnnResult:
    """Attention of (B, H, S, D); everything as in `_cudnn_attention_forward`."""
    expect(query.dim() == 4, f"query: has shape {tuple(query.shape)}, expected (B, H, S, D)")
    expect(key.dim() == 4, f"key: has shape {tuple(key.shape)}, expected (B, H, S, D)")
    return _cudnn_attention_forward(
        query, key, value, attn_bias, None, None, query.shape[2], key.shape[2], compute_log_sumexp, dropout_p,
        is_causal, return_debug_mask, scale=scale,
    )  # fmt: skip


def _cudnn_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> CudnnResult:
    """Attention of (B, H, S, D), or of packed (T, H, D) with cumulative lengths, as aten's function of this name.

    Args:
        query: (B, Hq, Sq, D) or (Tq, Hq, D). key: (B, Hkv, Sk, D) or (Tk, Hkv, D). value: as key, with Dv.
        attn_bias: floats added to the scores, (Sq, Sk), (1 or Hq, Sq, Sk) or (B or 1, Hq or 1, Sq, Sk), of packed
            inputs with the longest lengths; or None.
        cum_seq_q, cum_seq_k: (B + 1,) integers, both or neither.
        max_q, max_k: the longest lengths.
        is_causal: top-left, in each sequence.
        return_debug_mask: as in aten, no debug mask is given.

    Returns:
        output as query, with Dv; logsumexp (B, Hq, Sq), or (Hq, Tq) of packed inputs, None unless
        `compute_log_sumexp`; cum_seq_q; cum_seq_k; max_q; max_k; philox_seed and philox_offset, 0-D int64; None.

    Raises:
        ValueError (also a RuntimeError): a bias of another rank, or cumulative lengths for one side alone.
    """
    philox = Philox.fresh(dropout_p, query.device)
    attend, inputs = _call(
        query, key, value, attn_bias, cum_seq_q, cum_seq_k, is_causal, philox.dropout(dropout_p), scale
    )
    out, lse = attend(*inputs)
    if cum_seq_q is not None:
        out, lse = out[0].transpose(0, 1), lse[0]
    found = lse if compute_log_sumexp else None
    return out, found, cum_seq_q, cum_seq_k, max_q, max_k, philox.seed, philox.offset, None


def _cudnn_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to query, key and value of `_cudnn_attention_forward`, in their shapes; arguments as there.

    `out` and `logsumexp`, which may have a last axis of 1, may be those of a larger whole that the call was merged
    into.
    """
    drop = dropout_of(dropout_p, philox_seed, philox_offset, query.device)
    attend, inputs = _call(query, key, value, attn_bias, cum_seq_q, cum_seq_k, is_causal, drop, scale)
    if cum_seq_q is None:
        return gradients(attend, grad_out, inputs, out, logsumexp.reshape(out.shape[:3]))[:3]
    grad_out, out = (array.transpose(0, 1)[None] for array in (grad_out, out))
    found = gradients(attend, grad_out, inputs, out, logsumexp.reshape(out.shape[:3]))
    return tuple(array[0].transpose(0, 1) for array in found[:3])


_scaled_dot_product_cudnn_attention_backward = _cudnn_attention_backward


def _call(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cum_q: Tensor | None, cum_k: Tensor | None,
    is_causal: bool, drop: Dropout | None, scale: float | None,
) -> tuple[Attend, tuple[Tensor, ...]]:  # fmt: skip
    """The call, and its inputs in (B, H, S, D), or in (1, H, T, D) where they are packed."""
    if bias is not None and bias.dim() not in (2, 3, 4):
        raise AtenError(
            f"attn_bias: cuDNN SDPA expects either a 2D, 3D, or 4D attn_bias but got {bias.dim()}D, "
            f"of shape {tuple(bias.shape)}"
        )
    if (cum_q is None) != (cum_k is None):
        name = "cum_seq_q" if cum_q is None else "cum_seq_k"
        raise AtenError(f"{name}: got None, expected cumulative lengths of queries and keys, or of neither")
    biases = () if bias is None else (bias,)
    band = Band.of(is_causal, None, None, end=False)
    rank = 4 if cum_q is None else 3
    for name, array in (("query", query), ("key", key), ("value", value)):
        expect(array.dim() == rank, f"{name}: has shape {tuple(array.shape)}, expected {rank} axes")
    if cum_q is None or cum_k is None:
        mask = dense_mask(band, query.shape[2], key.shape[2], None)
        return Dense(mask, drop, scale), (query, key, value, *biases)
    inputs = (*(array.transpose(0, 1)[None] for array in (query, key, value)), *biases)
    packed = Packed(cum_q, cum_k)
    return packed_attend(packed, band, query.shape[0], dropout=drop, scale=scale, biased=bool(biases)), inputs
