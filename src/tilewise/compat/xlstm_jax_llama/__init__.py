"""`xlstm_jax.models.llama.attention` (xlstm-jax, 2025-01, flax.linen), written anew from a description of what it does.

Layout (B, S, NH, DH). Kept: names, arguments, the tree of parameters and their initial values, so that checkpoints
load; rotary embedding of interleaved pairs, the sine first; causal masks that count from the first key.

Repaired:

- the default scale is 1/sqrt(DHQK), as the original's text says; its code takes the number of heads instead, which
  models trained with it need: `reference_scale="num_heads"`, for `multihead_attention` and in `SelfAttentionConfig`;
- `apply_rotary_emb` without tables counts positions along the sequence, not along the heads;
- every backend takes every length, fewer heads for k and v, values of another width, and has a finite gradient;
- no mask (B, 1, S, S) is built for segment ids: they go to the kernels as labels;
- heads are split over the tensor axis where `model_axis_size` is larger than 1 (`sharding`); the original refuses.

Backends are names for kernels of tilewise: "xla" and "cudnn" let it choose, "pallas_triton" and "triton" are the
portable kernel, and any kernel may be named.
"""

from .attention import AttentionBackend, multihead_attention, segment_mask
from .config import ParallelConfig, SelfAttentionConfig
from .module import SelfAttention
from .rotary import apply_rotary_emb, precompute_freqs
from .sharding import gather_parameters, parameter_specs

__all__ = [
    "AttentionBackend",
    "ParallelConfig",
    "SelfAttention",
    "SelfAttentionConfig",
    "apply_rotary_emb",
    "gather_parameters",
    "multihead_attention",
    "parameter_specs",
    "precompute_freqs",
    "segment_mask",
]
