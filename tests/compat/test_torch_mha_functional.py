"""`multi_head_attention_forward` on the samples that torch tests its own with, and beyond them."""

from __future__ import annotations

from functools import cache, partial

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

import tilewise  # noqa: E402
from tilewise.compat.torch_mha import masking, multi_head_attention_forward  # noqa: E402
from tilewise.compat.torch_mha.checks import ShapeError  # noqa: E402

close = torch.testing.assert_close


@cache
def op_info():
    from torch.testing._internal.common_methods_invocations import op_db

    return next(info for info in op_db if info.name == "nn.functional.multi_head_attention_forward")


def samples(dtype: torch.dtype, requires_grad: bool = False) -> list:
    """torch's samples, with dropout at 0.5 in half of them, and all of them once more with no weights wanted."""
    return list(op_info().sample_inputs("cpu", dtype, requires_grad))


def seeded(function, *args, **kwargs):
    torch.manual_seed(7)
    return function(*args, **kwargs)


def test_values_of_torch_samples():
    """Dropout included: with weights wanted, torch's own generator draws torch's own pattern."""
    found = samples(torch.float64)
    assert len(found) > 50
    for sample in found:
        calls = [
            seeded(function, sample.input, *sample.args, **sample.kwargs)
            for function in (multi_head_attention_forward, F.multi_head_attention_forward)
        ]
        close(*calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"need_weights": False}], ids=["weights", "no weights"])
def test_accuracy_on_torch_samples(dtype, changes):
    """As exact as torch's own, whose samples have scores in the thousands."""
    for sample in samples(dtype)[::7]:
        arguments = sample.input, sample.args, {**sample.kwargs, "training": False, **changes}
        exact = tree_map(lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf, arguments)
        ours, plain, exact = (
            function(first, *args, **kwargs)
            for function, (first, args, kwargs) in (
                (multi_head_attention_forward, arguments),
                (F.multi_head_attention_forward, arguments),
                (F.multi_head_attention_forward, exact),
            )
        )
        for parts in zip(ours, exact, plain, strict=True):
            if parts[0] is not None:
                assert_accurate("out", *parts)


def test_values_without_weights():
    for sample in samples(torch.float64):
        kwargs = {**sample.kwargs, "need_weights": False, "training": False}
        ours, theirs = (
            function(sample.input, *sample.args, **kwargs)
            for function in (multi_head_attention_forward, F.multi_head_attention_forward)
        )
        close(ours[0], theirs[0])
        assert ours[1] is None


def differentiable(sample, **changes):
    """The sample as a function of its tensors that want a gradient, and these."""
    flat, spec = tree_flatten((sample.input, sample.args, {**sample.kwargs, **changes}))
    places = [n for n, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def function(module, *tensors):
        leaves = list(flat)
        for n, tensor in zip(places, tensors, strict=True):
            leaves[n] = tensor
        given, args, kwargs = tree_unflatten(leaves, spec)
        found = seeded(module, given, *args, **kwargs)
        return tuple(part for part in found if part is not None)

    return function, tuple(flat[n] for n in places)


@pytest.mark.parametrize("changes", [{}, {"need_weights": False}], ids=["weights", "no weights"])
def test_gradients_of_torch_samples(changes):
    """All orders and modes, dropout at 0.5 included, to every weight, bias and mask."""
    for sample in samples(torch.float64, requires_grad=True):
        function, tensors = differentiable(sample, **changes)
        ours = partial(function, multi_head_attention_forward)
        assert gradcheck(ours, tensors, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(ours, tensors, fast_mode=True)
        if not changes:
            cotangents = [torch.randn_like(out) for out in ours(*tensors)]
            found = [
                torch.autograd.grad(call(*tensors), tensors, cotangents)
                for call in (ours, partial(function, F.multi_head_attention_forward))
            ]
            close(*found)


def test_tangents_are_torch_s():
    sample = samples(torch.float64, requires_grad=True)[0]
    function, tensors = differentiable(sample, training=False)
    directions = [torch.randn_like(tensor) for tensor in tensors]
    found = []
    for module in (multi_head_attention_forward, F.multi_head_attention_forward):
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, (tensor.detach() for tensor in tensors), directions)
            found.append([forward_ad.unpack_dual(out).tangent for out in function(module, *duals)])
    close(*found)


def parts(q_len=4, k_len=6, batch=2, width=8, **changes):
    """The arguments of a call, by name."""
    make = partial(torch.randn, dtype=torch.float64)
    arguments = {
        "query": make(q_len, batch, width),
        "key": make(k_len, batch, width),
        "value": make(k_len, batch, width),
        "embed_dim_to_check": width,
        "num_heads": 2,
        "in_proj_weight": make(3 * width, width),
        "in_proj_bias": make(3 * width),
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": make(width, width),
        "out_proj_bias": make(width),
    }
    return {**arguments, **changes}


def both(**arguments):
    ours, theirs = multi_head_attention_forward(**arguments), F.multi_head_attention_forward(**arguments)
    close(ours, theirs)
    return ours


@pytest.mark.parametrize("added", [{}, {"bias": True}, {"zero": True}, {"bias": True, "zero": True}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_and_added_keys(added, need_weights):
    torch.manual_seed(0)
    extra = {"add_zero_attn": added.get("zero", False)}
    if "bias" in added:
        extra |= {name: torch.randn(1, 1, 8, dtype=torch.float64) for name in ("bias_k", "bias_v")}
    ignore = torch.rand(4, 6) < 0.5
    ignore[:, 1] = False
    padding = torch.tensor([[False] * 4 + [True] * 2, [True] + [False] * 4 + [True]])
    floats = torch.randn(4, 4, 6, dtype=torch.float64)
    for attn_mask in (None, ignore, ignore.double() * -3, ignore.expand(4, 4, 6), floats):
        for key_padding_mask in (None, padding, padding.double() * -2):
            both(
                **parts(**extra), attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=need_weights,
                average_attn_weights=False,
            )  # fmt: skip


def test_causal_hint():
    """It replaces the mask only where there is neither padding nor a wish for weights, whatever the mask says."""
    torch.manual_seed(1)
    wrong = torch.zeros(4, 6, dtype=torch.bool)
    padding = torch.tensor([[False] * 6, [False] * 5 + [True]])
    bias = {name: torch.randn(1, 1, 8, dtype=torch.float64) for name in ("bias_k", "bias_v")}
    for changes in ({}, bias):
        for need_weights in (False, True):
            for key_padding_mask in (None, padding):
                both(
                    **parts(**changes), attn_mask=wrong, is_causal=True, need_weights=need_weights,
                    key_padding_mask=key_padding_mask,
                )  # fmt: skip
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        multi_head_attention_forward(**parts(), is_causal=True)


def test_static_keys_and_values():
    torch.manual_seed(2)
    static = {name: torch.randn(4, 5, 4, dtype=torch.float64) for name in ("static_k", "static_v")}
    both(**parts(), **static)
    both(**parts(), **static, need_weights=False)
    with pytest.raises(AssertionError, match=r"static_k.*expecting static_k.size\(0\) of 4"):
        multi_head_attention_forward(**parts(), static_k=static["static_k"][:3])


def test_large_boolean_masks_are_read_in_place(monkeypatch):
    """They are not inverted in a copy; the result is the same."""
    monkeypatch.setattr(masking, "SMALL", 0)
    ignore = torch.rand(4, 6) < 0.5
    ignore[:, 1] = False
    (held,) = masking.of_scores(ignore[None, None]).mask.operands()
    assert held.data_ptr() == ignore.data_ptr()
    for mask in (ignore, ignore.expand(4, 4, 6)):
        both(**parts(), attn_mask=mask, need_weights=False)


def test_tilewise_masks():
    """They mean what they say, True = attend, and join with padding; the weights follow them."""
    arguments = parts(k_len=4)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    for need_weights in (True, False):
        given = {"need_weights": need_weights, "key_padding_mask": padding}
        close(
            multi_head_attention_forward(**arguments, attn_mask=tilewise.causal(), **given),
            F.multi_head_attention_forward(**arguments, attn_mask=later, **given),
        )
    with pytest.raises(ValueError, match=r"^attn_mask: got a tilewise mask with bias_k or add_zero_attn"):
        multi_head_attention_forward(**parts(add_zero_attn=True), attn_mask=tilewise.causal("end"))


def test_a_query_that_sees_nothing_gets_the_bias_alone():
    arguments = parts()
    arguments["key"].requires_grad_()
    arguments["value"][2] = torch.nan
    ignore = torch.zeros(4, 6, dtype=torch.bool)
    ignore[1] = True
    ignore[:, 2] = True
    for attn_mask in (ignore, torch.zeros(4, 6, dtype=torch.float64).masked_fill(ignore, -torch.inf)):
        out, weights = multi_head_attention_forward(**arguments, attn_mask=attn_mask)
        close(out[1], arguments["out_proj_bias"].expand(2, 8))
        assert weights[:, 1].eq(0).all()
        assert weights[:, :, 2].eq(0).all()
        (gradient,) = torch.autograd.grad(out.sum() + weights.square().sum(), arguments["key"])
        assert gradient.isfinite().all()


def test_nothing_is_drawn_without_dropout_and_dropout_follows_the_seed():
    arguments = parts(k_len=40, dropout_p=0.3)
    state = torch.get_rng_state()
    multi_head_attention_forward(**arguments, training=False, need_weights=False)
    assert torch.equal(state, torch.get_rng_state())
    first, again = (seeded(multi_head_attention_forward, **arguments, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, multi_head_attention_forward(**arguments, need_weights=False)[0])


def test_dropout_without_weights_is_unbiased():
    arguments = parts(q_len=1, k_len=8, batch=1)
    expected = multi_head_attention_forward(**arguments, need_weights=False)[0]
    arguments["dropout_p"] = 0.4
    torch.manual_seed(3)
    calls = torch.stack([multi_head_attention_forward(**arguments, need_weights=False)[0] for _ in range(400)])
    spread = calls.std(0) / 400**0.5
    assert ((calls.mean(0) - expected).abs() < 5 * spread).all()


ERRORS = {
    "query": ({"query": torch.zeros(4)}, AssertionError, "query should be unbatched 2D or batched 3D"),
    "key rank": ({"key": torch.zeros(6, 8)}, AssertionError, "expected `key` and `value` to be 3-D"),
    "width": ({"embed_dim_to_check": 6}, AssertionError, "was expecting embedding dimension of 6"),
    "heads": ({"num_heads": 3}, AssertionError, "not divisible"),
    "lengths": ({"key": torch.zeros(5, 2, 8)}, AssertionError, "do not match value's"),
    "weights": ({"in_proj_weight": None}, AssertionError, "in_proj_weight is None"),
    "separate": ({"use_separate_proj_weight": True}, AssertionError, "q_proj_weight is None"),
    "2-D mask": ({"attn_mask": torch.zeros(4, 5)}, RuntimeError, "2D attn_mask .* should be"),
    "3-D mask": ({"attn_mask": torch.zeros(2, 4, 6)}, RuntimeError, "3D attn_mask .* should be"),
    "mask rank": ({"attn_mask": torch.zeros(1, 4, 4, 6)}, AssertionError, "2-D or 3-D"),
    "mask dtype": ({"attn_mask": torch.zeros(4, 6).int()}, AssertionError, "only bool and floating types of attn_mask"),
    "padding rank": ({"key_padding_mask": torch.zeros(6)}, AssertionError, "expected `key_padding_mask` to be"),
    "padding": ({"key_padding_mask": torch.zeros(2, 5)}, AssertionError, r"key_padded_mask.shape\[1\] to be 6"),
    "bias_k": ({"bias_k": torch.zeros(1, 1, 8)}, AssertionError, "bias_k is set but bias_v is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_of_torch_s_classes_and_of_ours(name):
    changes, kind, words = ERRORS[name]
    arguments = {**parts(), **changes}
    with pytest.raises(kind, match=words) as ours:
        multi_head_attention_forward(**arguments)
    assert kind is RuntimeError or isinstance(ours.value, ShapeError | ValueError)
    with pytest.raises((AssertionError, RuntimeError)):
        F.multi_head_attention_forward(**arguments)


def test_memory_stays_linear():
    """Neither direction holds a matrix, which would be 1 GiB a head: only inputs of some KiB a row are saved."""
    arguments = parts(q_len=4, k_len=2**15, batch=1)
    query = torch.randn(2**15, 1, 8, dtype=torch.float64, requires_grad=True)
    arguments |= {"query": query, "dropout_p": 0.1}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        multi_head_attention_forward(
            **arguments, need_weights=False, attn_mask=tilewise.window(4, 4),
            key_padding_mask=torch.arange(2**15)[None] > 100,
        )  # fmt: skip
    assert max(saved) <= 3 * 8 * 2**15
