"""Whom we measure beside us. A peer that is not installed, or refuses a case, says so; nobody is timed unverified."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from .cases import DROPOUT, Case

Run = Callable[[], Any]
Prepare = Callable[[Case, dict[str, np.ndarray], str], tuple[Run, Callable[[Any], np.ndarray]]]


class Refused(Exception):
    """The peer cannot run the case."""


def _torch_tensors(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Any, ...]:
    import torch

    tensors = tuple(torch.from_numpy(held).to(getattr(torch, dtype)) for held in data.values())
    return tuple(x.requires_grad_(case.kind == "training") for x in tensors)


def _torch_run(case: Case, tensors: tuple[Any, ...], attend: Callable[[], Any]) -> tuple[Run, Any]:
    import torch

    def forward() -> Any:
        with torch.no_grad():
            return attend()

    def training() -> Any:
        out = attend()
        torch.autograd.grad(out, tensors, gradient)
        return out

    gradient = torch.ones((), dtype=tensors[0].dtype).expand(*tensors[0].shape[:3], tensors[2].shape[3])
    return (training if case.kind == "training" else forward), lambda out: out.detach().float().numpy()


def _ours(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import torch

    from .._api import attention

    q, k, v, *bias = tensors = _torch_tensors(case, data, dtype)
    options = {"bias": bias[0], "dropout": DROPOUT} if case.options else {}
    mask = case.mask_of()
    if mask is not None:
        operands = iter([torch.from_numpy(operand) for operand in mask.operands()])
        mask = mask.replace_operands(lambda: next(operands))
    return _torch_run(case, tensors, lambda: attention(q, k, v, mask=mask, **options))


def _plain(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    return _ours(case, {name: data[name] for name in ("q", "k", "v")}, dtype)


def _torch_sdpa(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import torch

    q, k, v = tensors = _torch_tensors(case, data, dtype)
    top_left = case.mask == "causal" and case.q_len == case.k_len
    mask = None if top_left else _booleans(case)
    given = None if mask is None else torch.from_numpy(mask)
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = case.q_heads != case.kv_heads
    return _torch_run(
        case, tensors, lambda: attend(q, k, v, given, is_causal=top_left, **({"enable_gqa": True} if grouped else {}))
    )


def _flex(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.kind == "training":
        raise Refused("no backward on a CPU")
    q, k, v = tensors = _torch_tensors(case, data, dtype)
    shift = case.k_len - case.q_len
    booleans = _booleans(case) if case.mask in ("dense", "padding") else None
    seen: Any = None if booleans is None else torch.from_numpy(booleans)
    rules = {
        "causal": lambda b, h, i, j: i + shift >= j,
        "window": lambda b, h, i, j: (i + shift >= j) & (i + shift - j <= 512),
        "dense": lambda b, h, i, j: seen[0, 0, i, j],
        "padding": lambda b, h, i, j: seen[b, 0, 0, j],
    }
    rule = rules.get(case.mask)
    block = create_block_mask(rule, case.batch, None, case.q_len, case.k_len, device="cpu") if rule else None
    torch.compiler.reset()  # else it gives up compiling after a few cases
    attend = torch.compile(flex_attention)
    return _torch_run(
        case, tensors, lambda: attend(q, k, v, block_mask=block, enable_gqa=case.q_heads != case.kv_heads)
    )


def _jax(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import jax
    import jax.numpy as jnp

    if case.batch * case.q_heads * case.q_len * case.k_len * 4 > 6 << 30:
        raise Refused("its scores would take more than 6 GiB")
    q, k, v = (jnp.asarray(np.swapaxes(data[name], 1, 2), dtype) for name in ("q", "k", "v"))
    seen = _booleans(case)
    mask = None if seen is None else jnp.asarray(seen)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    def heads_first(out: Any) -> np.ndarray:
        return np.swapaxes(np.asarray(out, np.float32), 1, 2)

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = attend(q, k, v)
        return out.astype(jnp.float32).sum(), out

    if case.kind == "training":
        step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        return lambda: jax.block_until_ready(step(q, k, v)), lambda got: np.swapaxes(
            np.asarray(got[1], np.float32), 1, 2
        )
    compiled = jax.jit(attend)
    return lambda: compiled(q, k, v).block_until_ready(), lambda out: np.swapaxes(np.asarray(out, np.float32), 1, 2)


def _onnxruntime(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import onnxruntime
    from onnx import TensorProto, helper

    if dtype != "float32" or case.kind == "training":
        raise Refused("float32 and forward alone here")
    names = ["q", "k", "v"]
    inputs = {name: data[name] for name in names}
    seen = _booleans(case)
    if seen is not None:
        names.append("mask")
        inputs["mask"] = np.ascontiguousarray(np.broadcast_to(seen, (seen.shape[0], 1, case.q_len, case.k_len)))
    kinds = {name: TensorProto.BOOL if name == "mask" else TensorProto.FLOAT for name in names}
    graph = helper.make_graph(
        [helper.make_node("Attention", names, ["out"])],
        "attention",
        [helper.make_tensor_value_info(name, kinds[name], inputs[name].shape) for name in names],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, data["q"].shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        engine = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # the classes of its errors differ between versions
        raise Refused(str(error).splitlines()[0]) from None
    return lambda: engine.run(None, inputs)[0], lambda out: np.asarray(out)


def _zentorch(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import torch
    import zentorch  # noqa: F401  (registers its operators)

    if case.kind == "training":
        raise Refused("no backward")
    q, k, v = tensors = _torch_tensors(case, data, dtype)
    top_left = case.mask == "causal" and case.q_len == case.k_len
    seen = None if top_left else _booleans(case)
    given = None
    if seen is not None:  # it takes additive masks alone
        given = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(torch.from_numpy(~seen), float("-inf"))
    attend = torch.ops.zentorch.zentorch_sdpa
    return _torch_run(case, tensors, lambda: attend(q, k, v, is_causal=top_left, attn_mask=given)[0])


def _openvino(case: Case, data: dict[str, np.ndarray], dtype: str) -> tuple[Run, Any]:
    import openvino
    from openvino import opset13

    if case.kind == "training":
        raise Refused("no backward")
    if case.q_heads != case.kv_heads:
        raise Refused("its operator has no grouped heads")
    top_left = case.mask == "causal" and case.q_len == case.k_len
    seen = None if top_left else _booleans(case)
    inputs = [data[name] for name in ("q", "k", "v")]
    if seen is not None:
        inputs.append(np.broadcast_to(seen, (seen.shape[0], 1, case.q_len, case.k_len)).copy())
    given = [opset13.parameter(x.shape, np.bool_ if x.dtype == np.bool_ else np.float32) for x in inputs]
    node = opset13.scaled_dot_product_attention(*given, causal=top_left)
    # In bfloat16 it rounds float32 inputs itself, at each call: a small part of the time.
    precision = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    compiled = openvino.Core().compile_model(openvino.Model([node], given, "attention"), "CPU", precision)
    request = compiled.create_infer_request()

    def run() -> Any:
        for n, x in enumerate(inputs):  # it shares their memory and does not keep it: this function does
            request.set_input_tensor(n, openvino.Tensor(x, shared_memory=True))
        request.infer()
        return request.get_output_tensor(0)

    return run, lambda out: np.asarray(out.data, np.float32)


def _booleans(case: Case) -> np.ndarray | None:
    """The mask as booleans that broadcast to (B, Hq, Sq, Sk), as small as they can be."""
    mask = case.mask_of()
    if mask is None:
        return None
    if case.mask == "padding":
        (kept,) = mask.operands()
        return np.asarray(np.arange(case.k_len) < kept[:, None])[:, None, None]
    from ..masks.materialize import materialize

    return materialize(mask, case.q_len, case.k_len)


# Ourselves in the same case without its options: what they cost.
PLAIN = "plain"

PEERS: dict[str, tuple[tuple[str, ...], Prepare]] = {
    "tilewise": (("torch",), _ours),
    PLAIN: (("torch",), _plain),
    "torch": (("torch",), _torch_sdpa),
    "flex": (("torch",), _flex),
    "jax": (("jax",), _jax),
    "onnxruntime": (("onnxruntime", "onnx"), _onnxruntime),
    "openvino": (("openvino",), _openvino),
    "zentorch": (("zentorch",), _zentorch),
}


def question(name: str, case: Case) -> Case | None:
    """What a peer is asked in a case; None where it is not asked.

    Raises:
        Refused: it cannot compute that.
    """
    if name == PLAIN:
        return case.plain() if case.options else None
    if case.options and name != "tilewise":
        raise Refused("its dropout draws other bits")
    return case


def installed() -> list[str]:
    """Names of the peers that can be imported here, ours first."""
    return [name for name, (modules, _) in PEERS.items() if all(find_spec(module) for module in modules)]
