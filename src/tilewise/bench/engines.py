"""Peers with arrays and graphs of their own: JAX, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .cases import Case
from .runs import Answers, Prepared, Refused, booleans, forward_alone


def jax(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    """`jax.nn.dot_product_attention`, compiled."""
    import jax
    import jax.numpy as jnp

    if case.options:
        raise Refused("no dropout")
    if case.batch * case.q_heads * case.q_len * case.k_len * 4 > 6 << 30:
        raise Refused("its scores would take more than 6 GiB")
    q, k, v = (jnp.asarray(np.swapaxes(data[name], 1, 2), dtype) for name in ("q", "k", "v"))
    seen = booleans(case)
    mask = None if seen is None else jnp.asarray(seen)

    def attend(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        return (jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla"),)

    def loss(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        (out,) = attend(q, k, v)
        return out.astype(jnp.float32).sum(), out

    def training(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    def answers(got: tuple[Any, ...]) -> Answers:
        return tuple(np.swapaxes(np.asarray(x, np.float32), 1, 2) for x in got[:2])

    step = jax.jit(training if case.kind == "training" else attend)
    return lambda: jax.block_until_ready(step(q, k, v)), answers


def onnxruntime(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    """The operator Attention of opset 23; it reads the memory of the inputs, which the run keeps."""
    import onnxruntime
    from onnx import TensorProto, helper

    forward_alone(case)
    if dtype != "float32":
        raise Refused(f"no {dtype} on a CPU")
    names = ["q", "k", "v"]
    inputs = {name: data[name] for name in names}
    seen = booleans(case)
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
    # Its threads would wait in a loop after a run, on the cores of whoever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        engine = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # the classes of its errors differ between versions
        raise Refused(str(error).splitlines()[0]) from None
    return lambda: engine.run(None, inputs)[0], lambda out: (np.asarray(out),)


def openvino(case: Case, data: dict[str, np.ndarray], dtype: str) -> Prepared:
    """The operator ScaledDotProductAttention of opset 13; grouped heads are a fifth axis along which it broadcasts."""
    # Its import sends a notice of use from a forked process where this package is found: not from a measurement.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino import opset13

    forward_alone(case)
    top_left = case.mask == "causal" and case.q_len == case.k_len
    seen = None if top_left else booleans(case)
    inputs = [data[name] for name in ("q", "k", "v")]
    if seen is not None:
        inputs.append(np.broadcast_to(seen, (seen.shape[0], 1, case.q_len, case.k_len)).copy())
    if case.q_heads != case.kv_heads:
        groups = case.batch, case.kv_heads, case.q_heads // case.kv_heads, case.q_len, case.dim
        inputs = [inputs[0].reshape(groups), *(x[:, :, None] for x in inputs[1:])]
    given = [opset13.parameter(x.shape, np.bool_ if x.dtype == np.bool_ else np.float32) for x in inputs]
    node = opset13.scaled_dot_product_attention(*given, causal=top_left)
    # In half types it rounds float32 inputs itself, at each call: a small part of the time.
    precision = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]}
    compiled = openvino.Core().compile_model(openvino.Model([node], given, "attention"), "CPU", precision)
    request = compiled.create_infer_request()

    def run() -> Any:
        for n, x in enumerate(inputs):  # it shares their memory and does not keep it: this function does
            request.set_input_tensor(n, openvino.Tensor(x, shared_memory=True))
        request.infer()
        return request.get_output_tensor(0)

    # A copy, since the output is the request's own memory, which the next run writes.
    return run, lambda out: (np.array(out.data, np.float32).reshape(data["q"].shape),)
