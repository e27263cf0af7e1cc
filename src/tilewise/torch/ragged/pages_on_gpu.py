"""Keys and values read by the Triton kernel in the pages where they lie, all sequences in one call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import validate
from ..._arrays import device_kind, device_model, dtype_name
from ...contract import Plan
from ...plan.choose import choose
from ...problem import AttentionProblem, BiasFacts, MaskFacts
from ..watch import nobody_else_anywhere, recording
from .facts import Lengths, Sights, Tables, sights_of, tables_of

KERNEL = "triton"


def attend(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: np.ndarray, lengths: Lengths, options: Any, max_q: int
) -> tuple[Tensor, Tensor] | None:
    """out (Tq, Hq, Dv) and lse (Hq, Tq); None where another kernel is to run, or one call cannot serve the arguments.

    Args:
        q: (Tq, Hq, D); k_pages: (P, size, Hkv, D); v_pages: (P, size, Hkv, Dv); table: (B, entries), checked.
        options: `packed.Options`; max_q: the number of queries for which relative tables were made.

    Raises:
        ValueError, TypeError: arrays or options that are wrong for any kernel; the message begins with the name.
        KernelRefused: Triton was asked for by name and cannot run.
    """
    if options.kernel not in (None, KERNEL) or (options.kernel is None and q.device.type == "cpu"):
        return None
    mask = [] if options.mask is None else options.mask.operands()
    bias = [] if options.bias is None else list(options.bias.operands())
    tensors = [x for x in (q, k_pages, v_pages, *mask, *bias, options.sinks) if isinstance(x, Tensor)]
    if not nobody_else_anywhere(tensors) or recording(tensors):
        return None
    arrays = validate.check_arrays(q, k_pages[:, 0], v_pages[:, 0], "thd")
    checked = validate.check_options(arrays, None, None, options.scale, options.softcap, options.sinks, options.dropout)
    sights = sights_of(options.mask, lengths, q.shape[1])
    tables = tables_of(options.bias, lengths, q.shape[1], max_q, torch.float32)
    # Places among the queries are 32-bit numbers in the kernel.
    if sights is None or tables is None or q.shape[0] >= 2**31:
        return None
    plan = _plan(q, k_pages, v_pages, lengths, options, checked, sights, tables)
    if plan.kernel != KERNEL:
        return None

    from ...kernels.triton.paged import PagedOperands, paged_forward  # loads Triton

    starts, stops = sights.ranges if sights.ranges is not None else (None, None)
    operands = PagedOperands(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        q_begin=lengths.q_begin,
        q_len=lengths.q_len,
        k_len=lengths.k_len,
        block_table=table,
        starts=starts,
        stops=stops,
        dense_mask=None if sights.dense is None else _four(sights.dense).to(q.device),
        biases=tuple(_four(array).to(q.device) for array in tables.dense),
        table=None if tables.table is None else tables.table.to(q.device),
        first=tables.first,
        sinks=None if checked.sinks is None else checked.sinks.contiguous(),
        dropout=checked.dropout,
    )
    return paged_forward(plan, operands)


def _plan(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: Lengths, options: Any, checked: Any, sights: Sights,
    tables: Tables,
) -> Plan:  # fmt: skip
    """The plan for a call in which all sequences are as long as the longest."""
    q_longest, k_longest = lengths.longest
    model, architecture = device_model(q)
    problem = AttentionProblem(
        family="torch",
        device=device_kind(q),
        dtype=dtype_name(q),
        batch=lengths.batch,
        q_heads=q.shape[1],
        kv_heads=k_pages.shape[2],
        q_len=q_longest,
        k_len=k_longest,
        head_dim=q.shape[2],
        value_dim=v_pages.shape[3],
        layout="bshd",
        scale=1.0 / math.sqrt(q.shape[2]) if checked.scale is None else checked.scale,
        mask=MaskFacts(
            str(options.mask) if options.mask is not None else "none",
            ranges=int(sights.ranges is not None),
            bits=None if sights.dense is None else "dense",
            batch=True,
        ),
        bias=BiasFacts(
            tuple(tuple(_four(array).shape) for array in tables.dense),
            tables.table is not None,
            tuple(dtype_name(array) for array in tables.dense),
        ),
        softcap=checked.softcap,
        sinks=checked.sinks is not None,
        dropout=checked.dropout.p if checked.dropout is not None else 0.0,
        model=model,
        architecture=architecture,
        deterministic=validate.call.DETERMINISTIC,
    )
    return choose(problem, options.kernel, options.allow_quadratic)


def _four(array: Tensor) -> Tensor:
    return array.reshape((1,) * (4 - array.ndim) + tuple(array.shape))
