"""The `Attention` operator of ONNX: its published node tests, translated into calls of ours.

ONNX's own reference implementation makes the vectors; the tolerance is the one that its test runner uses.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import tilewise as tw

onnx = pytest.importorskip("onnx")

INPUTS = ("q", "k", "v", "mask", "past_k", "past_v", "kv_lengths")


def _cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its generators for other operators warn of their own overflows
        return [case for case in collect_testcases("Attention") if "expanded" not in case.name]


def _call(case: Any, inputs: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The operator's attributes, and its inputs by name."""
    node = case.model.graph.node[0]
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    given = iter(inputs)
    named = {name: next(given) if slot else None for name, slot in zip(INPUTS, node.input, strict=False)}
    return attributes, dict.fromkeys(INPUTS) | named


def _heads(array: np.ndarray, heads: int) -> np.ndarray:
    """(B, S, heads * D) as (B, heads, S, D)."""
    return array.reshape(*array.shape[:2], heads, -1).swapaxes(1, 2)


def _attention(attributes: dict[str, Any], given: dict[str, Any], kernel: str | None) -> np.ndarray:
    q, k, v = given["q"], given["k"], given["v"]
    packed = q.ndim == 3
    if packed:
        q = _heads(q, attributes["q_num_heads"])
        k, v = (_heads(array, attributes["kv_num_heads"]) for array in (k, v))
    offset: Any = 0
    if given["past_k"] is not None:
        offset = given["past_k"].shape[2]
        k, v = np.concatenate([given["past_k"], k], 2), np.concatenate([given["past_v"], v], 2)
    mask, bias = tw.prefix(k.shape[2]), None
    if given["kv_lengths"] is not None:
        offset = given["kv_lengths"] - q.shape[2]
        mask &= tw.lengths(k=given["kv_lengths"])
    if attributes.get("is_causal"):
        mask &= tw.causal(offset=offset)
    left, right = (attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    if left >= 0 or right >= 0:
        mask &= tw.window(left if left >= 0 else None, right if right >= 0 else None, offset=offset)
    if given["mask"] is not None:
        # A mask may end before the keys do; what it does not reach is hidden.
        short = [(0, 0)] * (given["mask"].ndim - 1) + [(0, k.shape[2] - given["mask"].shape[-1])]
        if given["mask"].dtype == bool:
            mask &= tw.dense(np.pad(given["mask"], short))
        else:
            bias = np.pad(given["mask"], short, constant_values=-np.inf)
    options = {"scale": attributes.get("scale"), "softcap": attributes.get("softcap") or None}
    out = tw.attention(q, k, v, mask=mask, bias=bias, kernel=kernel, allow_quadratic=True, **options)
    return out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1) if packed else out


CASES = _cases()


def test_the_standard_has_the_cases_we_think_it_has():
    assert len(CASES) >= 90


@pytest.mark.parametrize("kernel", [None, "portable", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removeprefix("test_attention_"))
def test_vectors(case, kernel):
    for inputs, outputs in case.data_sets:
        attributes, given = _call(case, inputs)
        out, expected = _attention(attributes, given, kernel), outputs[0]
        rtol = 2**-6 if expected.dtype == "bfloat16" else max(case.rtol, 1e-3)
        assert out.dtype == expected.dtype
        np.testing.assert_allclose(out.astype(float), expected.astype(float), rtol=rtol, atol=max(case.atol, 1e-7))
