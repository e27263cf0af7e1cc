"""The door of torch tensors: check, spell what is no tensor, call the operator.

Everything here can be traced by torch's compiler and runs on fake tensors: no value is looked at, and masks are
lowered inside the operator.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import validate
from .._arrays import torch_of
from .._remembered import Remembered
from ..plan.choose import check_name
from ..problem import Invariance
from . import again, autograd, batching, legacy_batching, operator  # noqa: F401  (they register rules)
from .options import write
from .watch import nobody_else, recording


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any, bias: Any, scale: float | None, softcap: float | None, sinks: Any,
    dropout: Any, layout: str, return_lse: bool, kernel: str | None, allow_quadratic: bool, invariance: str,
) -> Any:  # fmt: skip
    """As `tilewise.attention`, for torch tensors; q, k and v join the dtype of an autocast region."""
    told = layout, scale, softcap, kernel, allow_quadratic, invariance
    key = again.key_of(q, k, v, mask, (bias, sinks, dropout), told)
    known = again.find(key)
    if known is not None:
        if layout == "bshd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = validate.restore(*again.attend(known, q, k, v, again.booleans_of(mask)), layout)
        return (out, lse) if return_lse else out
    q, k, v = autocast(q, k, v)
    arrays = _arrays(q, k, v, layout)
    checked = validate.check_options(arrays, _tensor(mask), _tensor(bias), scale, softcap, sinks, dropout)
    same = validate.check_invariance(invariance, checked.dropout)
    out, lse = run(checked, layout, kernel, allow_quadratic, same)
    again.remember(key, checked.scale, checked.mask, layout, checked.softcap, None, kernel, allow_quadratic, same)
    out, lse = validate.restore(out, lse, layout)
    return (out, lse) if return_lse else out


def run(
    checked: validate.Checked, layout: str, kernel: str | None, allow_quadratic: bool, invariance: Invariance = "batch"
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of checked arguments, with derivatives."""
    check_name(kernel)  # before it becomes a part of a text
    (_, q, k, v, _), mask, biases, scale, softcap, sinks, dropout = checked
    names, tensors = "q,k,v", [q, k, v]
    for bias in biases.dense:
        names += ",bias"
        tensors.append(bias)
    if biases.table is not None:
        names += ",table"
        tensors.append(biases.table)
    if sinks is not None:
        names += ",sinks"
        tensors.append(sinks)
    facts, integers, options = write(names, mask, layout, softcap, dropout, kernel, allow_quadratic, invariance)
    if not torch.compiler.is_compiling() and nobody_else(tensors):
        if recording(tensors):
            return autograd.recorded(tensors, facts, integers, scale, options)
        return operator.compute(tensors, facts, integers, scale, options)
    return operator.attention(tensors, facts, integers, scale, options)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast region around the call, if any; float64 stays, as torch has it."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


_fine: Remembered[Hashable, None] = Remembered()  # shapes, dtypes and devices that were checked before


def _arrays(q: Tensor, k: Tensor, v: Tensor, layout: str) -> validate.Arrays:
    """`validate.check_arrays`, once for each combination of shapes, dtypes and devices."""
    # Sizes of subclasses, fake tensors among them, may be symbols, which have no hash; nested tensors have no shape.
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is Tensor) or type(layout) is not str:
        return validate.check_arrays(q, k, v, layout)
    if not (q.layout is k.layout is v.layout is torch.strided) or q.is_nested or k.is_nested or v.is_nested:
        return validate.check_arrays(q, k, v, layout)
    key = (layout, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    if key not in _fine:
        arrays = validate.check_arrays(q, k, v, layout)
        _fine.keep(key, None)
        return arrays
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    elif layout == "thd":
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return validate.Arrays("torch", q, k, v, (*q.shape[:3], k.shape[2]))


def _tensor(value: Any) -> Any:
    """A NumPy array as a tensor of the same memory: torch's compiler sees NumPy arrays only so."""
    return torch_of(value) if isinstance(value, np.ndarray) else value
