"""`transform_bias_rescale_qkv`: from a packed projection to the queries, keys and values of heads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import expect
from .ragged import Ragged

# A nested input is padded to a multiple of this, as aten does on CUDA for its tensor cores.
LENGTH_MULTIPLE = 8


def transform_bias_rescale_qkv(qkv: Tensor, qkv_bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the bias, scales the queries by 1 / sqrt(D / H), and splits into heads: `torch._transform_bias_rescale_qkv`.

    Args:
        qkv: (B, T, 3 D), floating, or nested (B, ragged, 3 D) of either layout.
        qkv_bias: (3 D,), of the same dtype.
        num_heads: H, a divisor of D.

    Returns:
        q, k, v, each (B, H, T, D / H) in qkv's dtype. For a nested input T is the longest length rounded up to a
        multiple of 8, and the padding is 0 in all three (as on CUDA; torch's CPU version pads to the longest alone and
        leaves the bias in the padding).

    Raises:
        ValueError (also a RuntimeError, which aten raises): a shape or dtype that does not fit.
    """
    expect(qkv.dim() == 3, f"qkv: got {qkv.dim()}-D, expected (B, T, 3 D)")
    expect(qkv_bias.dim() == 1, f"qkv_bias: got {qkv_bias.dim()}-D, expected (3 D,)")
    width = qkv_bias.shape[0]
    expect(
        width % 3 == 0 and qkv.size(-1) == width,
        f"qkv_bias: has {width} elements for qkv's {qkv.size(-1)}, expected the same multiple of 3",
    )
    expect(
        num_heads > 0 and width // 3 % num_heads == 0,
        f"num_heads: got {num_heads}, expected D % num_heads == 0 for D = {width // 3}",
    )
    expect(
        qkv.is_floating_point() and qkv.dtype == qkv_bias.dtype,
        f"qkv_bias: has dtype {qkv_bias.dtype}, qkv {qkv.dtype}; expected one floating dtype",
    )
    # Half types are added and scaled in float32 and rounded once, as in aten, with aten's rounding of the root.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if qkv.is_nested:
        ragged = Ragged.of(qkv)
        length = -(-ragged.longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        total = ragged.padded(ragged.rows.to(wide) + qkv_bias.to(wide), length)
    else:
        total = qkv.to(wide) + qkv_bias.to(wide)
    head_dim = width // 3 // num_heads
    scale = 1.0 / float(np.sqrt(head_dim, dtype=np.float64 if wide == torch.float64 else np.float32))
    q, k, v = total.unflatten(-1, (3, num_heads, head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = (array.to(qkv.dtype).contiguous() for array in (q * scale, k, v))
    return q, k, v
