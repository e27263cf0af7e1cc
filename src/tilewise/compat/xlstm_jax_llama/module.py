"""Self-attention of a Llama block as a flax.linen module."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal, zeros

from .attention import multihead_attention
from .config import ConfigurationError, SelfAttentionConfig
from .rotary import apply_rotary_emb, precompute_freqs
from .sharding import over_mesh, part_of, place_on_axis, sum_over

Array = Any


class SelfAttention(nn.Module):
    """Projections to heads, rotary embedding, attention, and the projection back.

    Parameters, all float32: `dense_q`, `dense_k`, `dense_v` with kernel (D, NH, head_dim), `dense_out` with kernel
    (NH, head_dim, D), biases where the configuration has them, and with `qk_norm` the scales (head_dim,) of `q_norm`
    and `k_norm`. First values are normal with standard deviation sqrt(2 / (5 D)) and, for `dense_out`,
    1 / (num_layers sqrt(D)); biases are zero.

    With `parallel.model_axis_size` > 1, inside `shard_map` over the tensor axis, parameters are this device's share of
    the heads (and begin with the same values as on one device) and the output is summed over the axis.
    """

    config: SelfAttentionConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        freqs: tuple[Array, Array] | None = None,
        segment_ids: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Attention of a sequence to itself.

        Args:
            x: (B, S, D), D a multiple of head_dim. freqs: (sin, cos) of `precompute_freqs`, (B or 1, S, head_dim // 2);
                None counts positions from 0. segment_ids: (B, S), for packed documents.
            train: apply dropout, which then needs the rng "dropout".

        Returns:
            (B, S, D) in the configuration's dtype.

        Raises:
            AssertionError: D is no multiple of head_dim, or the heads none of the tensor axis (a ValueError, too).
        """
        config, width = self.config, x.shape[-1]
        if width % config.head_dim:
            raise ConfigurationError(f"x: has width {width}, expected a multiple of head_dim = {config.head_dim}")
        heads = width // config.head_dim
        index, parts = place_on_axis(config.parallel)
        if heads % parts:
            raise ConfigurationError(f"x: has {heads} heads, expected a multiple of the tensor axis, {parts}")

        def project(name: str) -> Array:
            return nn.DenseGeneral(
                (heads // parts, config.head_dim),
                use_bias=config.use_bias,
                dtype=config._dtype,
                kernel_init=part_of(normal(math.sqrt(2 / (5 * width))), 1, index, parts),
                name=name,
            )(x)

        q, k, v = (project(name) for name in ("dense_q", "dense_k", "dense_v"))
        if config.qk_norm:
            q, k = nn.RMSNorm(dtype=config._dtype, name="q_norm")(q), nn.RMSNorm(dtype=config._dtype, name="k_norm")(k)
        q, k = apply_rotary_emb(q, k, *(freqs or precompute_freqs(config.head_dim, max_length=x.shape[1])))
        out = over_mesh(partial(_attend, config, heads), config.parallel)(q, k, v, segment_ids)
        out = _Output(
            width,
            use_bias=config.use_bias,
            dtype=config._dtype,
            kernel_init=part_of(normal(1 / (config.num_layers * math.sqrt(width))), 0, index, parts),
            axis_name=config.parallel.model_axis_name if parts > 1 else None,
            name="dense_out",
        )(out)
        return nn.Dropout(config.dropout_rate, deterministic=not train)(out)


def _attend(config: SelfAttentionConfig, heads: int, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """Attention of those of all `heads` that are in q; the scale, where it counts heads, counts all."""
    scale = heads**-0.5 if config.reference_scale == "num_heads" else None
    return multihead_attention(q, k, v, segment_ids, config.causal, scale, config.attention_backend)


class _Output(nn.Module):
    """(B, S, NH, DH) -> (B, S, features); sums over the tensor axis before the bias is added, which is added once."""

    features: int
    use_bias: bool
    dtype: Any
    kernel_init: Callable[..., Array]
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        heads, width = x.shape[-2:]
        kernel = self.param("kernel", self.kernel_init, (heads, width, self.features), jnp.float32)
        out = jnp.einsum("...nh,nhd->...d", x.astype(self.dtype), kernel.astype(self.dtype))
        out = sum_over(self.axis_name, out)
        if self.use_bias:
            out = out + self.param("bias", zeros, (self.features,), jnp.float32).astype(self.dtype)
        return out
