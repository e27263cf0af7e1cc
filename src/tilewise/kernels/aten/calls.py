"""torch's operators behind one face: q, k, v (B, H, S, D) and a bias in; out and lse, or gradients, out.

Each hides what is particular to its operator: the places of results, an axis too many or padding in lse, memory that
must lie in one way. What the operators do with values that are not finite is left to the callers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...problem import AttentionProblem

_aten = torch.ops.aten

# The memory-efficient kernel reads lse in aligned pieces of so many rows.
_LSE_ROWS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What every operator is given; the bias (B or 1, Hq or 1, Sq or 1, Sk or 1) in q's dtype, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(cls, problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, dense: tuple[Tensor, ...]) -> Inputs:
        """Tensors whose last axis is contiguous: some operators misread others without a word (pytorch#187506)."""
        bias = _last_contiguous(dense[0].detach()) if dense else None
        q, k, v = (_last_contiguous(x.detach()) for x in (q, k, v))
        return cls(q, k, v, bias, not problem.mask.trivial, problem.scale)

    def full_bias(self) -> Tensor | None:
        """The bias seen as (B, Hq, Sq, Sk), its rows at multiples of 16 bytes."""
        if self.bias is None:
            return None
        unit = 16 // self.bias.element_size()
        outer = zip(self.bias.stride()[:3], self.bias.shape[:3], strict=True)
        aligned = self.bias.data_ptr() % 16 == 0 and not any(stride % unit for stride, size in outer if size > 1)
        bias = self.bias if aligned else self.bias.clone(memory_format=torch.contiguous_format)
        return bias.expand(self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """Results of a forward pass and the gradient to `out`; lse is -inf for rows that see nothing."""

    out: Tensor
    lse: Tensor
    d_out: Tensor


Four = tuple[Tensor, Tensor, Tensor, Tensor | None]


def cpu(x: Inputs) -> tuple[Tensor, Tensor]:
    """torch's flash kernel for CPUs. A row that sees nothing has lse 0 there."""
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        x.q, x.k, x.v, 0.0, x.causal, attn_mask=x.bias, scale=x.scale
    )


def cpu_backward(x: Inputs, saved: Saved, want_bias: bool) -> Four:
    """Gradients of `cpu`."""
    found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        saved.d_out, x.q, x.k, x.v, saved.out, saved.lse, 0.0, x.causal, attn_mask=x.bias, scale=x.scale
    )
    return (*found, None)


def flash(x: Inputs) -> tuple[Tensor, Tensor]:
    """FlashAttention 2. Its lse is +inf for a row whose sum is 0 or NaN; only NaN occurs where every row sees a key."""
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(x.q, x.k, x.v, 0.0, x.causal, False, scale=x.scale)
    return out, lse


def flash_backward(x: Inputs, saved: Saved, want_bias: bool) -> Four:
    """Gradients of `flash`; the order of its sums changes from run to run."""
    state = torch.empty(2, dtype=torch.uint64, device=x.q.device)  # of dropout, so never read
    found = _aten._scaled_dot_product_flash_attention_backward(
        saved.d_out, x.q, x.k, x.v, saved.out, saved.lse, None, None, x.q.shape[2], x.k.shape[2], 0.0, x.causal,
        state, state[0], scale=x.scale,
    )  # fmt: skip
    return (*found, None)


def cudnn(x: Inputs) -> tuple[Tensor, Tensor]:
    """cuDNN. Its lse is (B, H, Sq, 1)."""
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        x.q, x.k, x.v, x.full_bias(), True, 0.0, x.causal, False, scale=x.scale
    )
    return out, lse.reshape(lse.shape[:3])


def cudnn_backward(x: Inputs, saved: Saved, want_bias: bool) -> Four:
    """Gradients of `cudnn`; the order of its sums changes from run to run."""
    zero = torch.zeros((), dtype=torch.int64, device=x.q.device)  # seed and offset of dropout: never read
    found = _aten._scaled_dot_product_cudnn_attention_backward(
        saved.d_out, x.q, x.k, x.v, saved.out, saved.lse, zero, zero, x.full_bias(), None, None,
        x.q.shape[2], x.k.shape[2], 0.0, x.causal, scale=x.scale,
    )  # fmt: skip
    return (*found, None)


def efficient(x: Inputs) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel. Its lse is padded to a multiple of 32 rows, and +inf for rows that see nothing."""
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        x.q, x.k, x.v, x.full_bias(), True, 0.0, x.causal, scale=x.scale
    )
    return out, lse[..., : x.q.shape[2]]


def efficient_backward(x: Inputs, saved: Saved, want_bias: bool) -> Four:
    """Gradients of `efficient`, of which one block adds all keys of a head in order: the same bits on every run."""
    q_len = x.q.shape[2]
    lse = torch.full(
        (*x.q.shape[:2], -(-q_len // _LSE_ROWS) * _LSE_ROWS), torch.inf, dtype=torch.float32, device=x.q.device
    )
    lse[..., :q_len] = saved.lse.masked_fill(saved.lse == -torch.inf, torch.inf)
    zero = torch.zeros((), dtype=torch.int64)  # seed and offset of dropout: never read
    # The operator below torch's usual one says how keys are split; its layout is (B, S, H, D), and it takes `out` to be
    # contiguous in that layout without looking.
    q, k, v, d_out = (array.transpose(1, 2) for array in (x.q, x.k, x.v, saved.d_out))
    out = saved.out.transpose(1, 2).contiguous()
    d_q, d_k, d_v, d_bias = _aten._efficient_attention_backward(
        d_out, q, k, v, x.full_bias(), out, None, None, q_len, x.k.shape[2], lse, 0.0, zero, zero, int(x.causal),
        want_bias, scale=x.scale, num_splits_key=1,
    )  # fmt: skip
    d_q, d_k, d_v = (array.transpose(1, 2) for array in (d_q, d_k, d_v))
    return d_q, d_k, d_v, d_bias if want_bias else None


FORWARD = {"cpu": cpu, "cudnn": cudnn, "flash": flash, "efficient": efficient}
BACKWARD = {
    "cpu": cpu_backward,
    "cudnn": cudnn_backward,
    "flash": flash_backward,
    "efficient": efficient_backward,
}


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
