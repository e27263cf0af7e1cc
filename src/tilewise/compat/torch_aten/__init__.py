"""aten's attention functions in Python, with their argument orders, return tuples and errors, on any device.

Origin: aten's CUDA attention (torch 2.9 to 2.13), whose functions run on NVIDIA and AMD GPUs alone, and their backward
functions. Layouts and conventions are each original's and stand in each docstring. Kept: signatures, the places of
the results, natural logarithms in float32, seeds and offsets as tensors on the device, and checks, whose errors are
ValueError and RuntimeError at once. Repaired: every dtype, head dimension, batch size and length; log-sum-exps are
(B, H, Sq) everywhere, without cuDNN's last axis or the rounding up to 32 of the memory-efficient kernel; a row that
sees nothing is 0 with log-sum-exp -inf; dropout works for any batch; derivatives exist in every mode and order.

The pattern of dropout is tilewise's, a function of (seed, offset) and the position alone. The seed is drawn from
torch's generator, so `torch.manual_seed` repeats a call.

"""

from ..torch_mha import native_multi_head_attention as _native_multi_head_attention
from ..torch_mha import transform_bias_rescale_qkv as _transform_bias_rescale_qkv
from .choice import _fused_sdp_choice, explain_sdp_choice
from .cudnn import (
    _cudnn_attention_backward,
    _cudnn_attention_forward,
    _scaled_dot_product_cudnn_attention,
    _scaled_dot_product_cudnn_attention_backward,
)
from .efficient import (
    _efficient_attention_backward,
    _efficient_attention_forward,
    _scaled_dot_product_efficient_attention,
    _scaled_dot_product_efficient_attention_backward,
)
from .flash import (
    _flash_attention_backward,
    _flash_attention_forward,
    _scaled_dot_product_flash_attention,
    _scaled_dot_product_flash_attention_backward,
)
from .plain import (
    _scaled_dot_product_attention_math,
    _scaled_dot_product_flash_attention_for_cpu,
    _scaled_dot_product_flash_attention_for_cpu_backward,
)

__all__ = [
    "_cudnn_attention_backward",
    "_cudnn_attention_forward",
    "_efficient_attention_backward",
    "_efficient_attention_forward",
    "_flash_attention_backward",
    "_flash_attention_forward",
    "_fused_sdp_choice",
    "_native_multi_head_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_transform_bias_rescale_qkv",
    "explain_sdp_choice",
]
