"""Whom we measure beside us. A peer that is not installed, or refuses a case, says so; nobody is timed unverified."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from . import engines, vllm
from .cases import DROPOUT, Case
from .runs import Answers, Prepare, Prepared, Refused, booleans, forward_alone, one_by_one, torch_run, torch_tensors

__all__ = ["PEERS", "PLAIN", "Refused", "installed", "question"]


def _ours(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    import torch

    from .._api import attention

    if case.mask == "packed":
        return _ours_packed(case, data, dtype)
    q, k, v, *bias = tensors = torch_tensors(case, data, dtype)
    options = {"bias": bias[0], "dropout": DROPOUT} if case.options else {}
    mask = case.mask_of()
    if mask is not None:
        operands = iter([torch.from_numpy(operand) for operand in mask.operands()])
        mask = mask.replace_operands(lambda: next(operands))
    return torch_run(case, tensors, lambda: attention(q, k, v, mask=mask, **options))


def _ours_packed(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    import torch

    from ..masks.primitives import causal
    from ..torch import varlen_attention

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in torch_tensors(case, data, dtype))
    starts = torch.from_numpy(case.starts())

    def run() -> Any:
        with torch.no_grad():
            return varlen_attention(q, k, v, starts, mask=causal("end"))

    def answers(out: Any) -> Answers:
        return (out.transpose(0, 1)[None].float().numpy(),)

    return run, answers


def _plain(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    return _ours(case, {name: data[name] for name in ("q", "k", "v")}, dtype)


def _torch_sdpa(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    import torch

    if case.options:
        raise Refused("its dropout draws other bits")
    q, k, v = tensors = torch_tensors(case, data, dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    if case.mask == "packed":
        return one_by_one(case, tensors, lambda q, k, v: attend(q, k, v, is_causal=True))
    top_left = case.mask == "causal" and case.q_len == case.k_len
    mask = None if top_left else booleans(case)
    given = None if mask is None else torch.from_numpy(mask)
    grouped = case.q_heads != case.kv_heads
    return torch_run(
        case, tensors, lambda: attend(q, k, v, given, is_causal=top_left, **({"enable_gqa": True} if grouped else {}))
    )


def _flex(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.kind == "training":
        raise Refused("no backward on a CPU")
    q, k, v = tensors = torch_tensors(case, data, dtype)
    shift = case.k_len - case.q_len
    given = booleans(case) if case.mask in ("dense", "padding") else case.ids() if case.mask == "packed" else None
    seen: Any = None if given is None else torch.from_numpy(given)
    rules = {
        "causal": lambda b, h, i, j: i + shift >= j,
        "window": lambda b, h, i, j: (i + shift >= j) & (i + shift - j <= 512),
        "dense": lambda b, h, i, j: seen[0, 0, i, j],
        "padding": lambda b, h, i, j: seen[b, 0, 0, j],
        "packed": lambda b, h, i, j: (i >= j) & (seen[i] == seen[j]),
    }
    rule = rules.get(case.mask)
    block = create_block_mask(rule, case.batch, None, case.q_len, case.k_len, device="cpu") if rule else None
    torch.compiler.reset()  # else it gives up compiling after a few cases
    attend = torch.compile(flex_attention)
    return torch_run(case, tensors, lambda: attend(q, k, v, block_mask=block, enable_gqa=case.q_heads != case.kv_heads))


def _zentorch(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    import torch
    import zentorch  # noqa: F401  (registers its operators)

    forward_alone(case)
    q, k, v = tensors = torch_tensors(case, data, dtype)
    attend = torch.ops.zentorch.zentorch_sdpa
    if case.mask == "packed":
        return one_by_one(case, tensors, lambda q, k, v: attend(q, k, v, is_causal=True)[0])
    top_left = case.mask == "causal" and case.q_len == case.k_len
    seen = None if top_left else booleans(case)
    given = None
    if seen is not None:  # it takes additive masks alone
        given = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(torch.from_numpy(~seen), float("-inf"))
    return torch_run(case, tensors, lambda: attend(q, k, v, is_causal=top_left, attn_mask=given)[0])


# Ourselves in the same case without its options: what they cost.
PLAIN = "plain"

PEERS: dict[str, tuple[tuple[str, ...], Prepare]] = {
    "tilewise": (("torch",), _ours),
    PLAIN: (("torch",), _plain),
    "torch": (("torch",), _torch_sdpa),
    "flex": (("torch",), _flex),
    "jax": (("jax",), engines.jax),
    "onnxruntime": (("onnxruntime", "onnx"), engines.onnxruntime),
    "openvino": (("openvino",), engines.openvino),
    "zentorch": (("zentorch",), _zentorch),
    "vllm": (("torch", "vllm"), vllm.paged),
}


def question(name: str, case: Case) -> Case | None:
    """What a peer is asked in a case; None where it is not asked."""
    if name == PLAIN:
        return case.plain() if case.options else None
    return case


def installed() -> list[str]:
    """Names of the peers that can be imported here, ours first."""
    return [name for name, (modules, _) in PEERS.items() if all(find_spec(module) for module in modules)]
