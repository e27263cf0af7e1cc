"""Tensors that are not what they seem: lazy signs and zeros, no strides, and a default device that is another one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.portable_cases import arrays  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.torch import KVCache, PagedKVCache, varlen_attention  # noqa: E402


def _tensors():
    return [torch.from_numpy(array).float() for array in arrays().values()]


@pytest.fixture
def elsewhere():
    """New tensors go to a device without numbers, unless told otherwise."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def _equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_a_sign_that_torch_has_yet_to_flip(name):
    q, k, v = _tensors()
    given = {"q": q, "k": k, "v": v, "bias": torch.randn(q.shape[2], k.shape[2]), "sinks": torch.randn(q.shape[1])}
    flipped = {**given, name: -given[name]}
    lazy = {**given, name: torch._neg_view(given[name])}
    for _ in range(2):  # the second call is one that was seen before
        _equal(tw.attention(**lazy), tw.attention(**flipped))


def test_zeros_that_torch_has_yet_to_write():
    q, k, v = _tensors()
    _equal(tw.attention(q, k, torch._efficientzerotensor(v.shape)), tw.attention(q, k, 0 * v))
    q.requires_grad_()
    out = tw.attention(q, k, v)
    (gradient,) = torch.autograd.grad(out, q, torch._efficientzerotensor(out.shape))
    _equal(gradient, torch.zeros_like(q))


@pytest.mark.parametrize("layout", ["sparse", "opaque", "nested"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_without_strides_are_refused_by_name(name, layout):
    call = dict(zip("qkv", _tensors(), strict=True))
    tw.attention(**call)  # a call of the same shapes was fine
    convert = {
        "sparse": torch.Tensor.to_sparse,
        "opaque": torch.Tensor.to_mkldnn,
        "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    }
    call[name] = convert[layout](call[name])
    with pytest.raises(TypeError, match=rf"^{name}: got a (nested )?tensor"):
        tw.attention(**call)


@pytest.mark.parametrize("name", ["bias", "mask", "sinks"])
def test_sparse_options_are_refused_by_name(name):
    q, k, v = _tensors()
    given = {"bias": torch.ones(k.shape[2]), "mask": torch.ones(k.shape[2], dtype=torch.bool)}
    option = given.get(name, torch.ones(q.shape[1])).to_sparse()
    with pytest.raises(TypeError, match=rf"^{name}: got a tensor of layout"):
        tw.attention(q, k, v, **{name: option})


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_numbers_that_want_a_gradient_are_refused(name):
    q, k, v = _tensors()
    number = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=rf"^{name}: requires a gradient"):
        tw.attention(q, k, v, **{name: number})
    with torch.no_grad():
        _equal(tw.attention(q, k, v, **{name: number}), tw.attention(q, k, v, **{name: 0.5}))


OPTIONS = {
    "lengths": lambda n: {"mask": tw.lengths(k=[n - 1] * 2)},
    "documents": lambda n: {"mask": tw.documents([0] * n, [0] * (n - 2) + [1] * 2)},
    "predicate": lambda n: {"mask": tw.predicate(lambda b, h, i, j: j <= i)},
    "bias of numpy": lambda n: {"bias": np.linspace(0, 1, n, dtype=np.float32)},
    "t5": lambda n: {"bias": tw.t5(np.ones((8, 4), np.float32).cumsum(0))},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_default_device_changes_nothing(option, request):
    n = 6
    q, k, v = (torch.randn(2, 4, n, 8) for _ in range(3))
    expected = tw.attention(q, k, v, **OPTIONS[option](n))
    request.getfixturevalue("elsewhere")
    _equal(tw.attention(q, k, v, **OPTIONS[option](n)), expected)


def test_the_default_device_changes_no_packed_or_cached_call(request):
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))

    def calls():
        pages = PagedKVCache(kv_heads=2, head_dim=8, page_size=2, device="cpu")
        tokens = KVCache(layout="bshd")
        assert tokens.lengths.device.type == "cpu"
        return (
            varlen_attention(q[0], k[0], v[0], [0, 2, 5], mask=tw.lengths(k=np.array([1, 3]))),
            pages.append_and_attend(q, k, v, [pages.add()], mask=tw.causal("end")),
            tokens.append_and_attend(q, k, v),
        )

    expected = calls()
    request.getfixturevalue("elsewhere")
    _equal(calls(), expected)
