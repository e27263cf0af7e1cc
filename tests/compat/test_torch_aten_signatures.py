"""What aten's schemas say of each function: names and order of arguments, which are keywords, number of results."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")

from support.aten_cases import schema  # noqa: E402

from tilewise.compat import torch_aten  # noqa: E402

OURS_ALONE = {"explain_sdp_choice"}
NAMES = sorted(set(torch_aten.__all__) - OURS_ALONE)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_schema(name):
    if not hasattr(torch.ops.aten, name):
        pytest.skip(f"this torch has no {name}")
    arguments, _ = schema(name)
    ours = [
        (p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(getattr(torch_aten, name)).parameters.values()
    ]
    if name == "_native_multi_head_attention":  # aten writes num_head, its own documentation num_heads
        arguments = [("num_heads" if n == "num_head" else n, keyword) for n, keyword in arguments]
    assert ours == arguments


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_schema(name):
    found = {x.name: x.default_value for x in getattr(torch.ops.aten, name).default._schema.arguments}
    for argument, parameter in inspect.signature(getattr(torch_aten, name)).parameters.items():
        if parameter.default is not parameter.empty:
            assert parameter.default == found[argument], argument
