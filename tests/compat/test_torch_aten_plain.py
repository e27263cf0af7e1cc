"""The plain formula against torch's, and the choice of a kernel."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from support.aten_cases import make  # noqa: E402

import tilewise  # noqa: E402
from tilewise.compat import torch_aten as aten  # noqa: E402

close = torch.testing.assert_close
theirs = torch.ops.aten._scaled_dot_product_attention_math


def as_floats(mask):
    """A mask as aten's formula wants it: of booleans it knows nothing."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


SHAPES = {
    "2-D": ((3, 4), (5, 4), (5, 6)),
    "3-D": ((2, 3, 4), (2, 5, 4), (2, 5, 6)),
    "4-D": ((2, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
    "5-D": ((2, 2, 3, 3, 4), (2, 2, 3, 5, 4), (2, 2, 3, 5, 6)),
    "broadcast": ((2, 1, 3, 4), (1, 3, 5, 4), (2, 3, 5, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_math(name):
    given = tuple(make(shape) for shape in SHAPES[name])
    masks = [None, make(3, 5), torch.rand(3, 5) < 0.6]
    masks += [make(2, 1, 1, 3, 5), make(2, 2, 1, 3, 5) > 0] if name == "5-D" else []
    for mask in masks:
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = True  # no row without a key, for which aten's formula has NaN
        close(aten._scaled_dot_product_attention_math(*given, mask), theirs(*given, as_floats(mask)))
    close(
        aten._scaled_dot_product_attention_math(*given, is_causal=True, scale=0.2),
        theirs(*given, is_causal=True, scale=0.2),
    )


def test_math_drops_what_torch_drops():
    given = tuple(make(shape) for shape in SHAPES["4-D"])
    found = []
    for function in (aten._scaled_dot_product_attention_math, theirs):
        torch.manual_seed(2)
        found.append(function(*given, None, 0.5))
    close(*found)
    keep = torch.rand(2, 3, 3, 5) < 0.5
    close(
        aten._scaled_dot_product_attention_math(*given, None, 0.5, False, keep),
        theirs(*given, None, 0.5, False, keep),
    )


def test_math_shares_keys_only_when_told_to():
    q, k, v = make(2, 4, 3, 4), make(2, 2, 5, 4), make(2, 2, 5, 6)
    mask = torch.rand(2, 4, 3, 5) < 0.7
    mask[..., 0] = True
    expected = theirs(q, k, v, as_floats(mask), enable_gqa=True)
    close(aten._scaled_dot_product_attention_math(q, k, v, mask, enable_gqa=True), expected)
    for function in (aten._scaled_dot_product_attention_math, aten._fused_sdp_choice):
        with pytest.raises(RuntimeError, match=r"^key: leading axes of .* do not broadcast"):
            function(q, k, v)
        with pytest.raises(RuntimeError, match="^attn_mask: Explicit attn_mask should not be set when is_causal"):
            function(q, k, v, mask, is_causal=True, enable_gqa=True)
        with pytest.raises(RuntimeError, match="^query: has 1 axes"):
            function(q[0, 0, 0], k, v)


def test_the_choice_is_the_plan_s():
    q, k, v = (torch.randn(2, 4, 64, 32) for _ in range(3))
    calls = [{}, {"is_causal": True}, {"dropout_p": 0.2}, {"attn_mask": torch.randn(64, 64, requires_grad=True)}]
    calls += [{"attn_mask": torch.rand(2, 1, 64, 64) < 0.5}]
    for options in calls:
        plan = aten.explain_sdp_choice(q, k, v, **options)
        assert isinstance(plan, tilewise.Plan)
        assert aten._fused_sdp_choice(q, k, v, **options) == {"reference": 0, "portable": 2}.get(plan.kernel, 1)
    assert aten.explain_sdp_choice(q, k, v).kernel == tilewise.explain(q, k, v).kernel
    assert "portable" in str(aten.explain_sdp_choice(q, k, v))


@pytest.mark.parametrize("name", SHAPES)
def test_the_choice_for_any_rank_and_without_data(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = tuple(make(shape) for shape in SHAPES[name])
    number = aten._fused_sdp_choice(*given, make(3, 5))
    assert number in (1, 2)
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(tensor) for tensor in given)
        assert aten._fused_sdp_choice(*fakes, mode.from_tensor(make(3, 5))) == number
