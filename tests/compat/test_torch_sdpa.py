"""`scaled_dot_product_attention` against torch's own math path, argument by argument."""

from __future__ import annotations

import math
import warnings

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from torch.autograd import gradcheck  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from tilewise._remembered import Remembered  # noqa: E402
from tilewise.compat.torch_sdpa import scaled_dot_product_attention as sdpa  # noqa: E402

close = torch.testing.assert_close
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.float64, requires_grad=False):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def bits(*shape, share=0.6):
    return torch.rand(shape, generator=GENERATOR) < share


def stock(query, key, value, attn_mask=None, *args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **options)


def agree(query, key, value, attn_mask=None, **options):
    """Values, shape, dtype and every gradient are those of torch's math path."""
    given = [query, key, value, *([attn_mask] if attn_mask is not None else [])]
    wanted = [x for x in given if x.is_floating_point()]
    found = []
    for function in (sdpa, stock):
        for x in wanted:
            x.requires_grad_()
        out = function(query, key, value, attn_mask, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        found.append((out.detach(), *torch.autograd.grad(out, wanted, weights, materialize_grads=True)))
        for x in wanted:
            x.requires_grad_(False)
    close(*found)
    assert found[0][0].shape == found[1][0].shape


SHAPES = {  # query, key, value
    "2-D": ((4, 8), (5, 8), (5, 6)),
    "3-D": ((2, 4, 8), (2, 5, 8), (2, 5, 8)),
    "4-D": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6)),
    "5-D": ((2, 3, 2, 4, 8), (2, 3, 2, 5, 8), (2, 3, 2, 5, 6)),
    "6-D": ((1, 2, 3, 2, 4, 8), (1, 2, 3, 2, 5, 8), (1, 2, 3, 2, 5, 6)),
    "query 3-D": ((3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    "key 2-D": ((2, 3, 4, 8), (5, 8), (5, 8)),
    "value 3-D": ((2, 3, 4, 8), (2, 3, 5, 8), (3, 5, 8)),
    "one batch of keys": ((2, 3, 4, 8), (1, 3, 5, 8), (1, 3, 5, 8)),
    "one batch of queries": ((1, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    "one head of keys": ((2, 3, 4, 8), (2, 1, 5, 8), (2, 1, 5, 8)),
    "one head of queries": ((2, 1, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    "one head of keys alone": ((2, 3, 4, 8), (1, 1, 5, 8), (2, 3, 5, 8)),
    "value wider than the rest": ((1, 1, 4, 8), (1, 1, 5, 8), (2, 3, 5, 8)),
    "broadcast across 5-D": ((2, 1, 3, 4, 8), (4, 1, 5, 8), (2, 4, 3, 5, 6)),
    "one query": ((2, 3, 1, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "one feature": ((2, 3, 4, 1), (2, 3, 5, 1), (2, 3, 5, 1)),
    "no query": ((2, 3, 0, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    "no key": ((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
    "no batch": ((0, 3, 4, 8), (0, 3, 5, 8), (0, 3, 5, 8)),
    "no batch in 5-D": ((2, 0, 3, 4, 8), (2, 0, 3, 5, 8), (2, 0, 3, 5, 8)),
    "no head": ((2, 0, 4, 8), (2, 0, 5, 8), (2, 0, 5, 8)),
    "no feature": ((2, 3, 4, 0), (2, 3, 5, 0), (2, 3, 5, 6)),
    "no value feature": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 0)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, is_causal):
    agree(*(normal(*shape) for shape in shapes), is_causal=is_causal)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape"),
    [
        ((2, 6, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)),
        ((2, 6, 4, 8), (2, 2, 5, 8), (2, 3, 5, 6)),
        ((2, 4, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((4, 4, 8), (2, 5, 8), (2, 5, 8)),
        ((3, 2, 4, 4, 8), (3, 2, 2, 5, 8), (3, 2, 2, 5, 8)),
    ],
)
def test_grouped_heads(q_shape, k_shape, v_shape):
    agree(normal(*q_shape), normal(*k_shape), normal(*v_shape), enable_gqa=True)
    agree(normal(*q_shape), normal(*k_shape), normal(*v_shape), normal(4, 5), enable_gqa=True)


MASKS = [
    (5,), (1,), (), (4, 5), (1, 5), (4, 1), (1, 1), (3, 4, 5), (1, 4, 5), (3, 1, 5), (2, 3, 4, 5), (2, 1, 4, 5),
    (2, 1, 1, 5), (1, 3, 4, 1), (1, 1, 1, 1), (2, 3, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_mask_shapes(shape):
    """A float mask has its gradient in every shape; torch gives the 1-D and 0-D ones only where that is wanted."""
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6)
    agree(q, k, v, normal(*shape))
    seen = bits(*shape)
    out, expected = sdpa(q, k, v, seen), stock(q, k, v, torch.where(seen.expand(2, 3, 4, 5), 0.0, -math.inf).double())
    close(out, expected.nan_to_num())


@pytest.mark.parametrize(
    "leading", [(2, 3, 2, 2), (2, 1, 2, 2), (1, 3, 1, 2), (1, 3, 2, 1), (2, 1, 1, 1), (1, 1, 2, 1)], ids=str
)
def test_mask_of_many_axes(leading):
    """Where the mask broadcasts along some of the leading axes, as of windows of an image."""
    q, k, v = normal(2, 3, 2, 2, 4, 8), normal(2, 3, 2, 2, 5, 8), normal(2, 3, 2, 2, 5, 8)
    agree(q, k, v, normal(*leading, 4, 5))
    agree(q, k, v, bits(*leading, 4, 5) | (torch.arange(5) == 2))


def test_grouped_heads_with_a_mask_of_windows():
    q, k, v = normal(2, 3, 4, 4, 8), normal(2, 3, 2, 5, 8), normal(2, 3, 2, 5, 8)
    for leading in ((1, 3, 1), (1, 3, 4), (2, 1, 4)):
        agree(q, k, v, normal(*leading, 4, 5), enable_gqa=True)


def test_mask_of_windows_is_not_copied(monkeypatch):
    """(1, W, 1, L, S) reaches the kernel as a view of what it was."""
    from tilewise import _api

    seen = {}
    attention = _api.attention

    def spy(*args, **options):
        seen.update(options)
        return attention(*args, **options)

    monkeypatch.setattr("tilewise._api.attention", spy)
    monkeypatch.setattr("tilewise.compat.torch_sdpa.again.key_of", lambda *args: None)
    for mask in (normal(1, 3, 1, 4, 5), normal(3, 1, 4, 5).expand(7, 3, 2, 4, 5), normal(4, 5)):
        sdpa(normal(7, 3, 2, 4, 8), normal(7, 3, 2, 5, 8), normal(7, 3, 2, 5, 8), mask)
        assert seen["bias"].untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


def test_strided_masks():
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6)
    wide = normal(2, 3, 8, 10)
    agree(q, k, v, wide[:, :, ::2, ::2].detach())
    agree(q, k, v, normal(2, 3, 5, 4).transpose(2, 3).detach())
    for mask in (normal(5).as_strided((2, 3, 4, 5), (0, 0, 0, 1)), bits(5).as_strided((2, 3, 4, 5), (0, 0, 0, 1))):
        close(sdpa(q, k, v, mask), stock(q, k, v, mask).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_mask", ["own", "float32", "bool", "none"])
def test_accuracy(dtype, of_mask):
    """As exact as torch's math path in the same dtype; half precision may have its mask in float32."""
    q, k, v = (normal(2, 3, n, 16, dtype=dtype) for n in (33, 40, 40))
    mask = {"own": normal(3, 33, 40, dtype=dtype), "float32": normal(33, 40, dtype=torch.float32),
            "bool": bits(2, 1, 33, 40), "none": None}[of_mask]  # fmt: skip
    doubled = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = stock(q.double(), k.double(), v.double(), doubled)
    plain_mask = mask if doubled is mask else mask.to(dtype)
    assert_accurate("out", sdpa(q, k, v, mask), exact, stock(q, k, v, plain_mask), dtype=str(dtype).split(".")[1])


@pytest.mark.parametrize("scale", [0.0, -1.5, 3, -1.0 / 0.0001, torch.tensor(0.5)], ids=str)
def test_scale(scale):
    x = normal(1, 3, 16, 8)
    close(sdpa(x, x, x, scale=scale), stock(x, x, x, scale=scale))


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_scale_that_is_no_number_spoils_the_result_as_torch_has_it(scale):
    x = normal(1, 2, 3, 4)
    assert sdpa(x, x, x, scale=scale).isnan().all()


def test_causal_is_top_left():
    q, k = normal(1, 1, 3, 4), normal(1, 1, 6, 4)
    close(sdpa(q, k, k, is_causal=True), stock(q, k, k, torch.ones(3, 6).tril().bool()))
    close(sdpa(k, q, q, is_causal=True), stock(k, q, q, torch.ones(6, 3).tril().bool()))


@pytest.mark.parametrize("lengths", [(4, 4), (4, 7), (7, 4)])
def test_causal_bias_objects(lengths):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = normal(2, 3, lengths[0], 8), normal(2, 3, lengths[1], 8)
    upper = torch.ones(lengths).tril().bool()
    lower = torch.ones(lengths).tril(lengths[1] - lengths[0]).bool()
    close(sdpa(q, k, k, causal_upper_left(*lengths)), stock(q, k, k, upper))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that rows that see nothing would be NaN
        bias = causal_lower_right(*lengths)
    close(sdpa(q, k, k, bias), stock(q, k, k, lower).nan_to_num())
    with pytest.raises(ValueError, match="CausalBias should not be used"):
        sdpa(q, k, k, bias, is_causal=True)


def test_causal_bias_of_other_sizes():
    from torch.nn.attention.bias import causal_lower_right

    q = normal(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="^attn_mask: "):
        sdpa(q, q, q, causal_lower_right(2, 8))


@pytest.mark.parametrize("masked", [math.nan, math.inf, -math.inf, 1e300])
def test_rows_that_see_nothing_and_what_is_masked(masked):
    """0 instead of NaN, gradients 0; what no row sees does not show."""
    q, k, v = (normal(1, 2, n, 4) for n in (5, 6, 6))
    mask = bits(5, 6) | (torch.arange(6) == 0)
    mask[2] = False
    mask[:, 3] = False
    for x in (k, v):
        x[:, :, 3] = masked
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    clean = [x.detach().clone() for x in (q, k, v)]
    clean[1][:, :, 3] = clean[2][:, :, 3] = 0
    clean = [x.requires_grad_() for x in clean]
    out, expected = sdpa(q, k, v, mask), sdpa(*clean, mask)
    close(out, expected, rtol=0, atol=0)
    assert not out[:, :, 2].any()
    grads, wanted = (torch.autograd.grad(o.sum(), x) for o, x in ((out, (q, k, v)), (expected, clean)))
    close(grads, wanted, rtol=0, atol=0)
    assert not grads[0][:, :, 2].any()


def test_float_mask_of_infinities():
    """-inf above the diagonal and ten below it; the first rows see something, none sees all."""
    full = torch.full((60, 60), -math.inf)
    mask = torch.triu(full, diagonal=1) + torch.tril(full, diagonal=-10)
    q, k, v = (normal(1, 2, 60, 8, dtype=torch.float32) for _ in range(3))
    close(sdpa(q, k, v, mask), stock(q, k, v, mask))
    nothing = torch.full((60, 60), -math.inf, requires_grad=True)
    out = sdpa(q.requires_grad_(), k, v, nothing)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, nothing)))


def test_nan_in_a_float_mask_shows_where_it_is_seen():
    q = normal(1, 1, 3, 4)
    mask = torch.zeros(3, 3, dtype=torch.float64)
    mask[1, 2] = math.nan
    out = sdpa(q, q, q, mask)
    assert out[0, 0, 1].isnan().all()
    assert not out[0, 0, [0, 2]].isnan().any()


def test_large_numbers_in_bfloat16():
    x = torch.full((1, 1, 1, 64), 133120.0, dtype=torch.bfloat16)
    close(sdpa(x, x, x), x)


def test_dropout_comes_from_the_generator():
    x = normal(2, 2, 32, 8, dtype=torch.float32)

    def run(seed, p=0.5):
        torch.manual_seed(seed)
        return sdpa(x, x, x, dropout_p=p)

    close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    first = sdpa(x, x, x, dropout_p=0.5)
    assert not torch.equal(first, sdpa(x, x, x, dropout_p=0.5)), "every call draws anew"
    assert not run(1, 1.0).any()
    before = torch.get_rng_state()
    sdpa(x, x, x)
    assert torch.equal(before, torch.get_rng_state()), "without dropout the generator is left alone"


def test_dropout_keeps_its_share_and_mean():
    ones = torch.ones(1, 1, 256, 1)
    torch.manual_seed(0)
    weights = sdpa(ones, ones, torch.eye(256)[None, None], dropout_p=0.3)
    kept = weights > 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    close(weights[kept], torch.full_like(weights[kept], 1 / 256 / 0.7))


def test_dropout_in_backward_is_that_of_forward():
    q, k, v = (normal(1, 2, 4, 3, requires_grad=True) for _ in range(3))

    def seeded(*tensors):
        torch.manual_seed(3)
        return sdpa(*tensors, dropout_p=0.4)

    assert gradcheck(seeded, (q, k, v))


def test_dropout_through_checkpoint():
    q = normal(1, 2, 8, 4, requires_grad=True)
    torch.manual_seed(5)
    (plain,) = torch.autograd.grad(sdpa(q, q, q, dropout_p=0.5).sum(), q)
    torch.manual_seed(5)
    out = torch.utils.checkpoint.checkpoint(sdpa, q, q, q, None, 0.5, use_reentrant=False)
    (again,) = torch.autograd.grad(out.sum(), q)
    close(plain, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q, k, v = (normal(1, 2, n, 8, dtype=torch.float32) for n in (4, 5, 5))
    mask = normal(4, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = sdpa(q, k.bfloat16(), v, mask)
        assert out.dtype == dtype == stock(q, k.bfloat16(), v, mask).dtype
        assert sdpa(q, k, v, mask.half()).dtype == dtype
        doubles = sdpa(q.double(), k.double(), v.double())
        assert doubles.dtype == torch.float64
        with pytest.raises(RuntimeError, match="same dtype"):
            sdpa(q, k.double(), v)
    close(out.float(), stock(q, k, v, mask), atol=2e-2, rtol=2e-2)


def test_memory_order_of_the_result_is_that_of_the_queries():
    """Who transposed (B, L, H, E) views the result back as (B, L, H * E)."""
    x = normal(2, 5, 3, 8).transpose(1, 2)
    sdpa(x, x, x).transpose(1, 2).view(2, 5, 24)
    y = x.contiguous()
    assert sdpa(y, y, y).is_contiguous()


def test_shapes_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes = ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6))
    out = sdpa(*(torch.empty(shape, device="meta") for shape in shapes), is_causal=True)
    assert out.shape == (2, 3, 4, 6) and out.device.type == "meta"
    with FakeTensorMode():
        assert sdpa(*(torch.empty(shape) for shape in shapes), torch.empty(4, 5), 0.5).shape == (2, 3, 4, 6)


def test_subclasses_of_tensor_are_asked_and_kept():
    class Named(torch.Tensor):
        pass

    x = normal(1, 2, 3, 4).as_subclass(Named)
    out = sdpa(x, x, x)
    assert type(out) is Named
    close(out.as_subclass(torch.Tensor), sdpa(*(x.as_subclass(torch.Tensor),) * 3))


def test_parameters_and_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    x = normal(1, 2, 3, 4)
    mask = torch.nn.Parameter(normal(3, 3))
    close(sdpa(x, x, x, mask, numpy.float64(0.0), scale=numpy.float32(0.5)), stock(x, x, x, mask, scale=0.5))


q, k, v = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6)
WRONG_TYPES = {
    "scale in place": lambda f: f(q, k, v, None, 0.0, False, 1.0),
    "unknown": lambda f: f(q, k, v, foo=1),
    "missing": lambda f: f(q, k),
    "query twice": lambda f: f(q, k, v, query=q),
    "list": lambda f: f([1], k, v),
    "none": lambda f: f(None, k, v),
    "mask list": lambda f: f(q, k, v, [True]),
    "dropout text": lambda f: f(q, k, v, None, "x"),
    "dropout none": lambda f: f(q, k, v, None, None),
    "causal int": lambda f: f(q, k, v, None, 0.0, 1),
    "causal none": lambda f: f(q, k, v, None, 0.0, None),
    "scale text": lambda f: f(q, k, v, scale="1"),
    "scale with gradient": lambda f: f(q, k, v, scale=torch.tensor(1.0, requires_grad=True)),
    "scale of an axis": lambda f: f(q, k, v, scale=torch.ones(1)),
    "gqa int": lambda f: f(q, k, v, enable_gqa=1),
}


@pytest.mark.parametrize("call", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types(call):
    for function in (F.scaled_dot_product_attention, sdpa):
        with pytest.raises(TypeError):
            call(function)


HALF = torch.zeros(4, 5, dtype=torch.float16)
WRONG_VALUES = {  # the argument named, torch's own words, the call
    "1-D": ("query", "at least 2 dim", lambda f: f(q[0, 0, 0], k[0, 0], v[0, 0])),
    "0-D": ("query", None, lambda f: f(*(torch.zeros(()),) * 3)),
    "features": ("key", None, lambda f: f(q, k[..., :7], v)),
    "heads": ("key", None, lambda f: f(torch.zeros(2, 4, 4, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8))),
    "batch": ("key", None, lambda f: f(q, torch.zeros(4, 3, 5, 8), torch.zeros(4, 3, 5, 8))),
    "groups": ("key", "must divide", lambda f: f(torch.zeros(2, 4, 4, 8), k, v, enable_gqa=True)),
    "groups of more": ("key", "must divide", lambda f: f(q[:, :1], k, v, enable_gqa=True)),
    "dtypes": ("key", "same dtype", lambda f: f(q, k.double(), v)),
    "devices": ("key", "same device", lambda f: f(q, k.to("meta"), v)),
    "integers": ("query", None, lambda f: f(q.long(), k.long(), v.long())),
    "mask and causal": ("attn_mask", "Explicit attn_mask", lambda f: f(q, k, v, torch.zeros(4, 5), is_causal=True)),
    "mask rows": ("attn_mask", None, lambda f: f(q, k, v, torch.zeros(6, 5))),
    "mask columns": ("attn_mask", None, lambda f: f(q, k, v, torch.zeros(4, 6))),
    "mask of more axes": ("attn_mask", None, lambda f: f(q, k, v, torch.zeros(1, 2, 3, 4, 5))),
    "mask widens": ("attn_mask", None, lambda f: f(q[:1], k[:1], v[:1], torch.zeros(2, 3, 4, 5))),
    "mask of doubles": ("attn_mask", "attn_mask dtype", lambda f: f(q, k, v, torch.zeros(4, 5).double())),
    "mask of halves": ("attn_mask", "attn_mask dtype", lambda f: f(q, k, v, HALF)),
    "mask of the other halves": ("attn_mask", "attn_mask dtype", lambda f: f(*(x.bfloat16() for x in (q, k, v)), HALF)),
    "mask of integers": ("attn_mask", "attn_mask dtype", lambda f: f(q, k, v, torch.zeros(4, 5).long())),
    "mask elsewhere": ("attn_mask", "expected device", lambda f: f(q, k, v, torch.zeros(4, 5, device="meta"))),
    "probability": ("dropout_p", "dropout probability has to be", lambda f: f(q, k, v, None, 1.5)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "words", "call"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values(name, words, call):
    """torch's class of error and the gist of its words, the argument first."""
    with pytest.raises(RuntimeError, match=words):
        call(F.scaled_dot_product_attention)
    with pytest.raises(RuntimeError, match=words) as caught:
        call(sdpa)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(f"{name}: ")


def test_what_torch_lets_through_and_we_do_not():
    with pytest.raises(ValueError, match="^value: "):
        sdpa(q, k, torch.zeros(2, 3, 6, 8))
    with pytest.raises(ValueError, match="^dropout_p: "):
        sdpa(q, k, v, dropout_p=-0.1)
    with pytest.raises(ValueError, match="^query: .*layout"):
        sdpa(q.to_sparse(), k, v)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
@pytest.mark.parametrize("grad", [False, True])
def test_remembered_calls_are_like_first_ones(options, grad, monkeypatch):
    """The second call of its kind goes a shorter way, to the same bits; any difference that matters makes a first."""
    monkeypatch.setattr("tilewise.torch.again._calls", Remembered())
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = (normal(2, n, 5, 6, dtype=torch.float32, requires_grad=grad) for n in (4, heads, heads))
    mask = None if "is_causal" in options else torch.arange(25).reshape(5, 5) % 3 > 0
    variants = [
        (q, k, v, mask),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, mask),
        (q.double(), k.double(), v.double(), mask),
        (q, k[:, :, :4], v[:, :, :4], None),
        (q, k, v[..., :3], None if mask is None else mask[:1]),
        (q, k, v, None if mask is None else ~mask),
    ]
    for given in variants:
        first, second = (sdpa(*given, **options) for _ in range(2))
        assert torch.equal(first, second) and first.requires_grad == grad
        torch.testing.assert_close(first, stock(*given, **options), rtol=1e-5, atol=1e-5)
        if grad:
            assert all(map(torch.equal, *(torch.autograd.grad(out.sum(), (q, k, v)) for out in (first, second))))
