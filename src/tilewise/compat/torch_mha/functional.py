"""`multi_head_attention_forward`: all of `nn.MultiheadAttention` as a function of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ..._api import attention
from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.primitives import causal
from ..torch_seeds import fresh_seed
from .checks import ShapeError
from .masking import Masking, of_keys, of_scores, of_symbol, with_more_keys
from .projections import project
from .shapes import check_call, check_masks
from .weights import attention_weights


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | Mask | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention as `torch.nn.functional.multi_head_attention_forward`, in linear memory.

    Args:
        query: (L, B, E), or (L, E) unbatched. key: (S, B, Ek). value: (S, B, Ev); Ek = Ev = E unless the weights are
            separate.
        embed_dim_to_check: E. num_heads: H, a divisor of E.
        in_proj_weight: (3 E, E). in_proj_bias: (3 E,) or None.
        bias_k, bias_v: (1, 1, E), one more key and value, or None.
        add_zero_attn: one more key and value of zeros.
        dropout_p: probability to drop a weight, when `training`. With `need_weights` torch's own generator draws the
            pattern as torch draws it; without, it draws the seed of ours, since torch's pattern is quadratic.
        out_proj_weight: (E, E). out_proj_bias: (E,) or None.
        key_padding_mask: (B, S), or (S,) unbatched: booleans, True = ignore, or floats added to the scores.
        need_weights: also give the weights, in quadratic memory.
        attn_mask: (L, S) or (B * H, L, S): booleans, True = ignore, or floats added to the scores, with a gradient. Or
            a tilewise mask, whose own sense holds: `tilewise.causal()`. Booleans and floats may be mixed.
        use_separate_proj_weight: project with q_proj_weight (E, E), k_proj_weight (E, Ek), v_proj_weight (E, Ev).
        static_k, static_v: (B * H, S, E / H), used in place of the projected keys or values.
        average_attn_weights: give the weights' mean over the heads.
        is_causal: a hint that `attn_mask`, which must be given, is causal. As in torch it replaces the mask where there
            is no `key_padding_mask` and no weights are wanted, and is ignored elsewhere.

    Returns:
        The output (L, B, E) or (L, E), and the weights (B, L, S), (B, H, L, S) where not averaged, without B for
        unbatched inputs; None where not asked for. S counts added keys. A query that sees no key gets zeros before the
        last projection (torch: NaN).

    Raises:
        ValueError (also an AssertionError, which torch raises): shapes or weights that do not fit.
        RuntimeError: a mask that does not fit, or `is_causal` without `attn_mask`.
    """
    batched = check_call(query, key, value, key_padding_mask, attn_mask, num_heads, embed_dim_to_check)
    if not batched:
        query, key, value = (array.unsqueeze(1) for array in (query, key, value))
        key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "attn_mask: got None with is_causal=True. Need attn_mask if specifying the is_causal hint, which "
            "nn.Transformer.generate_square_subsequent_mask makes; or attn_mask=tilewise.causal()"
        )
    q_len, batch = query.shape[:2]
    hinted = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if hinted else attn_mask
    q, k, v = project(
        query, key, value, in_proj_weight, in_proj_bias, use_separate_proj_weight,
        (q_proj_weight, k_proj_weight, v_proj_weight),
    )  # fmt: skip
    check_masks(key_padding_mask, attn_mask, batch, num_heads, q_len, key.shape[0], static_k)

    keys = _Keys.of(k, v, num_heads, bias_k, bias_v, static_k, static_v, add_zero_attn)
    masking = _masking(attn_mask, key_padding_mask, batch, num_heads, q_len, keys.added)
    if hinted:
        masking = of_symbol(causal("start"))
    heads = q.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)  # (B, H, L, D)
    out, weights = _attend(heads, keys, masking, dropout_p if training else 0.0, need_weights)

    out = linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    return out if batched else out.squeeze(1), weights


@dataclass(frozen=True, eq=False)
class _Keys:
    """k, v (B, H, S, D), and how many of the last keys were added to the caller's."""

    k: Tensor
    v: Tensor
    added: int

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        num_heads: int,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        static_k: Tensor | None,
        static_v: Tensor | None,
        add_zero_attn: bool,
    ) -> _Keys:
        """From projected k, v (S, B, E), with the key of the bias appended, then the key of zeros."""
        if (bias_k is None) != (bias_v is None):
            set_one, other = ("bias_k", "bias_v") if bias_v is None else ("bias_v", "bias_k")
            raise ShapeError(f"{other}: {set_one} is set but {other} is None; expected both or neither")
        count = 0
        if bias_k is not None and bias_v is not None:
            for name, static in (("key", static_k), ("value", static_v)):
                if static is not None:
                    raise ShapeError(f"static_{name[0]}: bias cannot be added to static {name}.")
            k, v = (
                torch.cat([rows, bias.to(rows.dtype).expand(1, *rows.shape[1:])])
                for rows, bias in ((k, bias_k), (v, bias_v))
            )
            count = 1
        batch = k.shape[1]
        k, v = (rows.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for rows in (k, v))
        k, v = (
            _static(name, static, rows, batch, num_heads)
            for name, static, rows in (("static_k", static_k, k), ("static_v", static_v, v))
        )
        if add_zero_attn:
            k, v = (torch.cat([rows, rows.new_zeros(*rows.shape[:2], 1, rows.shape[3])], 2) for rows in (k, v))
            count += 1
        return cls(k, v, count)


def _static(name: str, static: Tensor | None, rows: Tensor, batch: int, heads: int) -> Tensor:
    """The given keys or values (B * H, S, D) as (B, H, S, D), or `rows` where none are given."""
    if static is None:
        return rows
    if static.dim() != 3 or static.shape[0] != batch * heads or static.shape[2] != rows.shape[-1]:
        raise ShapeError(
            f"{name}: has shape {tuple(static.shape)}; expecting {name}.size(0) of {batch * heads} and "
            f"{name}.size(2) of {rows.shape[-1]}"
        )
    return static.unflatten(0, (batch, heads))


def _masking(
    attn_mask: Tensor | Mask | None, key_padding_mask: Tensor | None, batch: int, heads: int, q_len: int, added: int
) -> Masking:
    masking = Masking()
    if isinstance(attn_mask, Mask):
        if added:
            raise ValueError(
                "attn_mask: got a tilewise mask with bias_k or add_zero_attn, which add keys that it does not know; "
                "expected a tensor"
            )
        masking += of_symbol(attn_mask)
    elif attn_mask is not None:
        mask = with_more_keys(attn_mask, added)
        masking += of_scores(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if key_padding_mask is not None:
        masking += of_keys(with_more_keys(key_padding_mask, added), q_len)
    return masking


def _attend(q: Tensor, keys: _Keys, masking: Masking, p: float, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """out (B, H, L, D), and the weights (B, H, L, S) after dropout, where wanted."""
    weights = None
    if need_weights:
        batch, heads, q_len, head_dim = q.shape
        hidden = masking.hidden(batch, heads, q_len, keys.k.shape[2], q.device)
        weights = attention_weights(q, keys.k, scale=head_dim**-0.5, added=masking.added, hidden=hidden)
        if p:
            # The matrix is there, so torch's own dropout thins it, with the very pattern that torch would draw.
            weights = dropout(weights, p)
            return weights @ keys.v, weights
    drop = Dropout(p, fresh_seed(q.device)) if p else None
    return attention(q, keys.k, keys.v, mask=masking.mask, bias=masking.bias, dropout=drop), weights
