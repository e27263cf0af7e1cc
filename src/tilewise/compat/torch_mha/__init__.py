"""torch's multi-head attention functions on tilewise's kernels, named as there but for the first underscore.

Origin: `torch._transform_bias_rescale_qkv` and `torch._native_multi_head_attention` (aten's CUDA source, torch 2.9 to
2.13), and `torch.nn.functional.multi_head_attention_forward` (torch 2.13). Layouts: (B, T, D) for the first two,
sequence first for the third. In all of their masks True means "masked out". Kept: signatures, return values, error
classes. Repaired: a row whose every key is masked out is 0 (torch: NaN), nested tensors take masks, and there is no
score matrix unless weights are asked for.
"""

from .functional import multi_head_attention_forward
from .native import native_multi_head_attention
from .transform import transform_bias_rescale_qkv

__all__ = ["multi_head_attention_forward", "native_multi_head_attention", "transform_bias_rescale_qkv"]
