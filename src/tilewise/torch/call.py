"""The door of torch tensors: check, spell what is no tensor, call the operator.

Everything here can be traced by torch's compiler and runs on fake tensors: no value is looked at, and masks are
lowered inside the operator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import validate
from ..problem import Gradient
from . import autograd, batching  # noqa: F401  (register the operators' derivatives and batching rules)
from .operator import attention as _operator
from .options import write


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any, bias: Any, scale: float | None, softcap: float | None, sinks: Any,
    dropout: Any, layout: str, return_lse: bool, kernel: str | None, allow_quadratic: bool,
) -> Any:  # fmt: skip
    """As `tilewise.attention`, for torch tensors."""
    checked = validate.check(
        q,
        k,
        v,
        mask=_tensor(mask),
        bias=_tensor(bias),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
        layout=layout,
    )
    out, lse = run(checked, layout, kernel, allow_quadratic)
    out, lse = validate.restore(out, lse, layout)
    return (out, lse) if return_lse else out


def run(checked: validate.Checked, layout: str, kernel: str | None, allow_quadratic: bool) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of checked arguments, with derivatives."""
    named: list[tuple[Gradient, Tensor]] = [("q", checked.q), ("k", checked.k), ("v", checked.v)]
    named += [("bias", array) for array in checked.biases.dense]
    if checked.biases.table is not None:
        named.append(("table", checked.biases.table))
    if checked.sinks is not None:
        named.append(("sinks", checked.sinks))
    facts, integers, options = write(
        [name for name, _ in named], checked.mask, layout, checked.softcap, checked.dropout, kernel, allow_quadratic
    )
    return _operator([tensor for _, tensor in named], facts, integers, checked.scale, options)


def _tensor(value: Any) -> Any:
    """A NumPy array as a tensor of the same memory: torch's compiler sees NumPy arrays only so."""
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
