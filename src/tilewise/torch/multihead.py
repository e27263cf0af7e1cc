"""`MultiheadAttention`: `nn.MultiheadAttention` in linear memory, by replacing one name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..compat.torch_mha import multi_head_attention_forward
from ..compat.torch_mha.checks import ShapeError
from ..compat.torch_mha.nested import NestedCall
from ..masks.algebra import Mask


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, whose constructor, parameters, initialisation and checkpoints it shares (torch 2.13).

    It computes by tilewise's kernels in training as in evaluation. Memory is linear in the lengths for every mask,
    unless weights are asked for; all derivatives exist; a query that sees no key gets zeros before the last projection
    instead of NaN; and masks may also be written in tilewise's language.

    Inside `nn.TransformerEncoderLayer` replace `layer.self_attn`. That layer has a fused path for evaluation which
    would not ask its attention at all; it is not taken while hooks are attached, so an idle one is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(_idle)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self._forward_pre_hooks:
            self.register_forward_pre_hook(_idle)

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """The same module, computed by tilewise: it holds the very parameters of the one given."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        # Copies of the registries, so that the original keeps its own.
        state = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}
        twin.__setstate__(state)
        return twin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projected queries, keys and values.

        Args:
            query: (L, B, E), with `batch_first` (B, L, E), or (L, E) unbatched; or, with `batch_first`, nested
                (B, ragged, E) of either layout. key, value: likewise with S, `kdim` and `vdim`; if nested, their
                lengths may be others than those of query, and L and S below are the longest.
            key_padding_mask: (B, S), or (S,) unbatched: booleans, True = ignore, or floats added to the scores.
            need_weights: also give the weights, the one thing here that takes quadratic memory.
            attn_mask: (L, S) or (B * H, L, S): booleans, True = ignore, or floats added to the scores, with a gradient;
                or a tilewise mask such as `tilewise.causal()`, in which True means "attend".
            average_attn_weights: give the weights' mean over the heads.
            is_causal: a hint that `attn_mask` is causal, as `multi_head_attention_forward` explains.

        Returns:
            The output, in the layout of query, nested if it is, and the weights (B, L, S), or (B, H, L, S) where not
            averaged, without B for unbatched inputs; None where not asked for.

        Raises:
            ValueError (also an AssertionError, which torch raises): shapes that do not fit, or nested inputs without
                `batch_first`. RuntimeError: an `attn_mask` that does not fit or is missing.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if not self.batch_first:
                raise ShapeError("query: is nested, which needs batch_first=True; batch_first was not True")
            call = NestedCall.of(query, key, value)
            padding = call.key_padding(key_padding_mask)
            found = MultiheadAttention.forward(
                self, *call.padded, padding, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return call.restored(*found)
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = _turned(query, key, value)
        out, weights = multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return out.transpose(0, 1) if turned else out, weights


def _idle(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that changes nothing; that there is one matters (see `MultiheadAttention`)."""


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence first; what was the same array stays the same, so that it is projected at once."""
    turned = {id(array): array.transpose(0, 1) for array in (query, key, value) if array.dim() == 3}
    q, k, v = (turned.get(id(array), array) for array in (query, key, value))
    return q, k, v
