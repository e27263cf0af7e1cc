"""A call of any of the functions as one value, from which its output and its gradients come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._api import attention
from ...contract import Dropout
from ...masks.algebra import Mask
from ...masks.biases import Bias, as_bias
from ..torch_mha.checks import expect
from ..torch_seeds import fresh_seed, key_of

# (q, k, v, dense biases) -> (out, lse), all in (B, H, S, D).
Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Philox:
    """The state that dropout was drawn from: `seed` and `offset`, 0-D int64 tensors on the device."""

    seed: Tensor
    offset: Tensor

    @classmethod
    def fresh(cls, p: float, device: torch.device) -> Philox:
        """Drawn from the device's generator, or zeros where nothing is dropped."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls(fresh_seed(device) if p else zero, zero)

    def pair(self) -> Tensor:
        """Both as flash-attention's `rng_state`, (2,) uint64."""
        return torch.stack([self.seed, self.offset]).view(torch.uint64)

    def dropout(self, p: float) -> Dropout | None:
        """What a call with this state drops."""
        return dropout_of(p, self.seed, self.offset, self.seed.device)


def dropout_of(p: float, seed: Tensor | int, offset: Tensor | int, device: torch.device) -> Dropout | None:
    """What a call with the given state drops; None where p is 0."""
    return Dropout(p, key_of(seed, offset, device)) if p else None


@dataclass(frozen=True, eq=False)
class Dense:
    """Attention of (B, H, S, D) under one mask.

    Attributes:
        mask: who sees whom. dropout: what is dropped. scale: factor of q.k, None for 1 / sqrt(D).
        fixed: a bias that is no tensor of its own, ALiBi.
    """

    mask: Mask | None = None
    dropout: Dropout | None = None
    scale: float | None = None
    fixed: Bias | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.fixed
        for array in biases:
            bias = as_bias(array) if bias is None else bias + as_bias(array)
        return attention(q, k, v, mask=self.mask, bias=bias, scale=self.scale, dropout=self.dropout, return_lse=True)


def gradients(
    attend: Attend, grad_out: Tensor, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients to the inputs of a call whose result may be part of a larger one.

    As in aten, out (B, H, S, Dv) and lse (B, H, S) are taken as they are given: where keys are spread over several
    calls that were merged, those of the merged whole give each call's share of the gradients.
    """
    (own_out, own_lse), pull_back = torch.func.vjp(attend, *inputs)
    wide = own_lse.dtype
    empty = own_lse == -torch.inf
    # Probabilities of the whole are those of this call times `share`, and rows of the whole have `out` for their mean.
    share = torch.exp(own_lse - lse.to(wide)).masked_fill(empty, 0.0)
    cotangent = grad_out.to(wide) * share[..., None]
    surplus = (cotangent * (own_out.to(wide) - out.to(wide)).masked_fill(empty[..., None], 0.0)).sum(-1)
    return pull_back((cotangent.to(own_out.dtype), surplus))


def turned(*arrays: Tensor) -> tuple[Tensor, ...]:
    """(B, S, H, D) as (B, H, S, D), and back; views."""
    return tuple(array.transpose(1, 2) for array in arrays)


def expect_four(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless all three have four axes."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        expect(array.dim() == 4, f"{name}: has shape {tuple(array.shape)}, expected 4 axes")
