"""`native_multi_head_attention` and `transform_bias_rescale_qkv` against aten's own, on the CPU."""

from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

from tilewise.compat.torch_mha import native_multi_head_attention, transform_bias_rescale_qkv  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested")

close = torch.testing.assert_close
make = partial(torch.randn, dtype=torch.float64)
LENGTHS = (3, 6, 1)
LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])


def nested(layout=torch.strided, width=12, lengths=LENGTHS, dtype=torch.float64, requires_grad=False):
    sequences = [torch.randn(length, width, dtype=dtype) for length in lengths]
    return torch.nested.nested_tensor(sequences, layout=layout, requires_grad=requires_grad)


def weights(width=12, dtype=torch.float64):
    make = partial(torch.randn, dtype=dtype)
    return make(3 * width, width) / 2, make(3 * width), make(width, width), make(width)


# transform_bias_rescale_qkv


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_transform_is_aten_s_bit_for_bit(dtype, heads):
    qkv, bias = torch.randn(2, 5, 36).to(dtype), torch.randn(36).to(dtype)
    ours, theirs = transform_bias_rescale_qkv(qkv, bias, heads), torch._transform_bias_rescale_qkv(qkv, bias, heads)
    close(ours, theirs, rtol=0, atol=0)
    assert all(array.is_contiguous() for array in ours)


@LAYOUTS
def test_transform_of_nested_pads_with_zeros_to_a_multiple_of_eight(layout):
    qkv, bias = nested(layout, 36), make(36)
    ours = transform_bias_rescale_qkv(qkv, bias, 3)
    theirs = torch._transform_bias_rescale_qkv(torch.nested.nested_tensor(list(qkv.unbind())), bias, 3)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == (3, 3, 8, 4)
        for n, length in enumerate(LENGTHS):
            close(mine[n, :, :length], other[n, :, :length], rtol=0, atol=0)
            assert mine[n, :, length:].eq(0).all()
    even = transform_bias_rescale_qkv(nested(layout, 36, (8, 2)), bias, 3)
    assert even[0].shape[2] == 8


@LAYOUTS
def test_transform_has_derivatives(layout):
    qkv, bias = make(2, 3, 12, requires_grad=True), make(12, requires_grad=True)
    assert gradcheck(lambda *given: transform_bias_rescale_qkv(*given, 2), (qkv, bias), check_forward_ad=True)
    rows = [make(length, 12, requires_grad=True) for length in (2, 4)]

    def of_rows(bias, *rows):
        return transform_bias_rescale_qkv(torch.nested.as_nested_tensor(list(rows), layout=layout), bias, 2)

    assert gradcheck(of_rows, (bias, *rows))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(5, 12)}, "qkv: got 2-D"),
        ({"qkv_bias": torch.zeros(1, 12)}, "qkv_bias: got 2-D"),
        ({"qkv_bias": torch.zeros(9)}, "qkv_bias: has 9 elements"),
        ({"num_heads": 3}, "num_heads: got 3"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"qkv_bias": torch.zeros(12).double()}, "qkv_bias: has dtype"),
        ({"qkv": torch.zeros(2, 5, 12).int(), "qkv_bias": torch.zeros(12).int()}, "expected one floating dtype"),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_transform_errors(change, words, kind):
    arguments = {"qkv": torch.zeros(2, 5, 12), "qkv_bias": torch.zeros(12), "num_heads": 2, **change}
    with pytest.raises(kind, match=words):
        transform_bias_rescale_qkv(**arguments)


# native_multi_head_attention, dense


def masks(kind, batch=2, heads=3, length=5):
    torch.manual_seed(4)
    shape = {None: (), 0: (length, length), 1: (batch, length), 2: (batch, heads, length, length)}[kind]
    if kind is None:
        return {}
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # aten gives NaN to a row that sees nothing
    return {"mask": mask, "mask_type": kind}


@pytest.mark.parametrize("kind", [None, 0, 1, 2])
@pytest.mark.parametrize("same", ["all", "key and value", "none"])
def test_values_are_aten_s(kind, same):
    query = make(2, 5, 12)
    key = query if same == "all" else make(2, 5, 12)
    value = make(2, 5, 12) if same == "none" else key
    for wanted in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        arguments = (query, key, value, 12, 3, *weights())
        options = {**masks(kind), **wanted}
        ours = native_multi_head_attention(*arguments, **options)
        theirs = torch._native_multi_head_attention(*arguments, **options)
        close(ours, theirs)


def test_float_masks_mean_not_zero_and_four_axes_mean_type_two():
    arguments = (*[make(2, 5, 12)] * 3, 12, 3, *weights())
    for options in ({**masks(0), "mask": masks(0)["mask"].double() * -1.5}, {"mask": masks(2)["mask"]}):
        close(
            native_multi_head_attention(*arguments, **options),
            torch._native_multi_head_attention(*arguments, **options),
        )


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_row_that_sees_nothing_is_zero_and_nan_stays_masked(kind):
    query = make(2, 5, 12)
    qkv_weight, qkv_bias, proj_weight, proj_bias = weights()
    mask = masks(kind)["mask"]
    key, value = query.clone(), query.clone()
    key[:, 3] = value[:, 3] = torch.nan
    mask[..., 3] = True
    if kind == 1:
        mask[1] = True
        empty = (1, slice(None))
    else:
        mask[..., 2, :] = True
        empty = (slice(None), 2)
    out, found = native_multi_head_attention(
        query, key, value, 12, 3, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type=kind
    )
    assert out.isfinite().all()
    close(out[empty], proj_bias.expand_as(out[empty]))
    assert found[empty].eq(0).all()


def test_nothing_in_nothing_out():
    for shape in ((0, 5, 12), (2, 0, 12)):
        out, found = native_multi_head_attention(*[make(shape)] * 3, 12, 3, *weights())
        assert out.shape == shape
        assert found is None


@pytest.mark.parametrize("wanted", [{}, {"need_weights": False}], ids=["weights", "no weights"])
def test_derivatives(wanted):
    torch.manual_seed(5)
    tensors = [make(2, 3, 4, requires_grad=True)]
    tensors += [part.requires_grad_() for part in weights(4)]

    def function(x, *parts):
        out = native_multi_head_attention(x, x, x, 4, 2, *parts, **masks(0, 2, 2, 3), **wanted)
        return tuple(part for part in out if part is not None)

    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


# native_multi_head_attention, nested


@LAYOUTS
@pytest.mark.parametrize("wanted", [{}, {"average_attn_weights": False}, {"need_weights": False}], ids=str)
def test_nested_values_are_aten_s(layout, wanted):
    query = nested(layout)
    theirs_of = torch.nested.nested_tensor(list(query.unbind()))
    parts = weights()
    ours = native_multi_head_attention(query, query, query, 12, 3, *parts, **wanted)
    theirs = torch._native_multi_head_attention(theirs_of, theirs_of, theirs_of, 12, 3, *parts, **wanted)
    assert ours[0].layout == layout
    for mine, other in zip(ours[0].unbind(), theirs[0].unbind(), strict=True):
        close(mine, other)
    close(ours[1], theirs[1])
    query + ours[0]  # the very same raggedness


@LAYOUTS
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_nested_with_a_mask_is_each_sequence_on_its_own(layout, kind):
    query, key, parts = nested(layout), nested(layout), weights()
    mask = masks(kind, len(LENGTHS), 3, max(LENGTHS))
    out, found = native_multi_head_attention(query, key, key, 12, 3, *parts, **mask, average_attn_weights=False)
    for n, (length, q, k) in enumerate(zip(LENGTHS, query.unbind(), key.unbind(), strict=True)):
        own = mask["mask"] if kind == 0 else mask["mask"][n : n + 1]
        own = own[..., :length] if kind == 1 else own[..., :length, :length]
        alone = native_multi_head_attention(
            q[None], k[None], k[None], 12, 3, *parts, own, average_attn_weights=False, mask_type=kind
        )
        close(out.unbind()[n], alone[0][0])
        close(found[n, :, :length, :length], alone[1][0])
        assert found[n, :, length:].eq(0).all()
        assert found[n, :, :, length:].eq(0).all()


@LAYOUTS
def test_nested_has_gradients(layout):
    rows = [make(length, 4, requires_grad=True) for length in (2, 3)]
    parts = [part.requires_grad_() for part in weights(4)]

    def function(*tensors):
        x = torch.nested.as_nested_tensor(list(tensors[:2]), layout=layout)
        out, found = native_multi_head_attention(x, x, x, 4, 2, *tensors[2:], torch.eye(3).bool(), mask_type=0)
        return (*out.unbind(), found)

    assert gradcheck(function, (*rows, *parts), fast_mode=True)


ERRORS = {
    "query rank": ({"query": make(5, 12)}, "expected 3-D `query`, got 2-D tensor"),
    "key rank": ({"key": make(5, 12)}, "expected 3-D `key`, got 2-D tensor"),
    "value rank": ({"value": make(5, 12)}, "expected 3-D `value`, got 2-D tensor"),
    "embed_dim": ({"embed_dim": 15}, "passed-in embed_dim 15 didn't match last dim of query 12"),
    "shapes": ({"key": make(2, 7, 12)}, "expected `query`/`key`/`value` shapes to match"),
    "num_heads": ({"num_heads": 5}, "`embed_dim` must divide evenly by `num_heads`"),
    "qkv_weight rank": ({"qkv_weight": make(36)}, "expected 2-D `qkv_weight`, got 1-D tensor"),
    "qkv_weight": ({"qkv_weight": make(35, 12)}, "^qkv_weight: has shape"),
    "qkv_bias rank": ({"qkv_bias": make(1, 36)}, "expected 1-D `qkv_bias`, got 2-D tensor"),
    "qkv_bias": ({"qkv_bias": make(35)}, "^qkv_bias: has shape"),
    "proj_weight": ({"proj_weight": make(12, 11)}, "^proj_weight: has shape"),
    "no mask type": ({"mask": torch.zeros(5, 5)}, "Mask Type should be defined"),
    "mask type": ({"mask": torch.zeros(5, 5), "mask_type": 3}, "Mask Type should be 0"),
    "mask 0": ({"mask": torch.zeros(5, 6), "mask_type": 0}, r"^mask: has shape \(5, 6\), expected \(5, 5\)"),
    "mask 1": ({"mask": torch.zeros(5, 5), "mask_type": 1}, r"^mask: has shape \(5, 5\), expected \(2, 5\)"),
    "mask 2": ({"mask": torch.zeros(2, 1, 5, 5)}, r"^mask: has shape .*, expected \(2, 3, 5, 5\)"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_errors_are_of_aten_s_class_and_of_ours(name, kind):
    query = make(2, 5, 12)
    names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    arguments = {"query": query, "key": query, "value": query, "embed_dim": 12, "num_heads": 3}
    arguments |= dict(zip(names, weights(), strict=True))
    changes, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        native_multi_head_attention(**{**arguments, **changes})


def test_memory_is_linear_without_weights():
    saved = []
    x = make(1, 2**14, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        padding = torch.arange(2**14)[None] >= 50
        native_multi_head_attention(x, x, x, 8, 2, *weights(8), padding, need_weights=False, mask_type=1)
    assert max(saved) <= 3 * 8 * 2**14
