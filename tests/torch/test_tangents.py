"""Forward mode in torch: the native kernel's tangents, met by every way of asking for them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tilewise._native")

from accuracy import assert_accurate  # noqa: E402
from support.plain import leaves, plain  # noqa: E402
from support.portable_cases import ALL_CASES, arrays, planned  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.func import jacfwd, jacrev, jvp, vmap  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.contract import Tangents  # noqa: E402
from tilewise.kernels.reference import dense as reference  # noqa: E402
from tilewise.torch import operator  # noqa: E402


@pytest.fixture
def pushed(monkeypatch) -> list[str]:
    """The kernels that were asked for tangents."""
    names, real = [], operator.tangent_of
    monkeypatch.setattr(operator, "tangent_of", lambda name: names.append(name) or real(name))
    return names


def _tensors(seed=0, dtype=torch.float64, **sizes):
    return tuple(torch.from_numpy(x).to(dtype) for x in arrays(seed, **sizes).values())


def _attend(**options):
    return lambda q, k, v: tw.attention(q, k, v, mask=tw.causal("end"), return_lse=True, **options)


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_as_accurate_as_torch_s_own(name, dtype, pushed):
    """Through `tilewise.attention`, q, k, v and sinks moving; the yardstick is plain attention pushed by torch."""
    q, k, v = _tensors(dtype=getattr(torch, dtype))
    options = ALL_CASES[name](lambda array: torch.from_numpy(array))
    plan, operands = planned(q, k, v, **options, kernel="native", tiles=None)
    torch.manual_seed(3)
    sinks = operands.sinks
    primals = (q, k, v) if sinks is None else (q, k, v, sinks)
    tangents = tuple(torch.randn_like(x) for x in primals)

    def ours(q, k, v, sinks=None):
        given = options if sinks is None else {**options, "sinks": sinks}
        return tw.attention(q, k, v, return_lse=True, **given)

    _, found = jvp(ours, primals, tangents)
    assert pushed == ["native"]
    oracle = reference.attention(plan.problem, operands)
    _, _, _, *dense, table, _ = leaves(operands)

    def textbook(q, k, v, sinks=None):
        return plain(plan.problem, oracle, (q, k, v, *dense, table, sinks))

    _, yard = jvp(textbook, primals, tangents)
    still = (None,) * len(dense)
    exact = reference.tangents(oracle, Tangents(*tangents[:3], still, None, *tangents[3:]))
    for what, got, truth, measure in zip(("d_out", "d_lse"), found, exact, yard, strict=True):
        assert_accurate(what, got, truth, measure, dtype)


def test_biases_move_too(pushed):
    q, k, v = _tensors()
    torch.manual_seed(1)
    given = torch.randn(2, 1, 13, 17).double(), torch.randn(4, 29).double(), torch.rand(4).double()

    def attend(kernel):
        def function(bias, table, slopes):
            biases = tw.relative(table) + bias + tw.alibi(slopes, "end")
            return tw.attention(q, k, v, bias=biases, softcap=2.0, return_lse=True, kernel=kernel)

        return function

    tangents = tuple(torch.randn_like(x) for x in given)
    found = jvp(attend("native"), given, tangents)
    assert pushed == ["native"]
    _close(found, jvp(attend("portable"), given, tangents))
    assert pushed == ["native"]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(requires_grad, pushed):
    primals, tangents = _tensors(), _tensors(1)

    def moved(*primals):
        return jvp(_attend(kernel="portable"), primals, tangents)[1]

    def total(found):
        return sum(x.sin().sum() for x in found)

    expected, further = moved(*primals), torch.func.grad(lambda *x: total(moved(*x)), (0, 1, 2))(*primals)
    leaf = [x.clone().requires_grad_(requires_grad) for x in primals]
    with forward_ad.dual_level():
        results = _attend()(*map(forward_ad.make_dual, leaf, tangents))
        found = tuple(forward_ad.unpack_dual(x).tangent for x in results)
        assert pushed == ["native"]
        _close(found, expected)
        if requires_grad:  # reverse over forward, plainly
            _close(torch.autograd.grad(total(found), leaf), further)


def test_gradients_with_respect_to_the_tangents(pushed):
    """jvp is linear in the tangents, and its transpose is the pull-back."""
    primals = _tensors()
    tangents = [x.requires_grad_() for x in _tensors(1)]
    found = jvp(_attend(), primals, tuple(tangents))[1]
    assert pushed == ["native"]
    cotangents = tuple(torch.randn_like(x) for x in found)
    _, pull = torch.func.vjp(_attend(), *primals)
    _close(torch.autograd.grad(found, tangents, cotangents), pull(cotangents))


def test_jacobians(pushed):
    q, k, v = _tensors(batch=1, heads=2, kv=1, q_len=3, k_len=4, dim=2, value=2)
    for argument in range(3):
        forward, reverse = (jac(_attend(), argument)(q, k, v) for jac in (jacfwd, jacrev))
        _close(forward, reverse)
    assert pushed == ["native"] * 3  # each one call of a larger batch
    older = torch.autograd.functional.jacobian(_attend(), (q, k, v), vectorize=True, strategy="forward-mode")
    _close(older, tuple(jacrev(_attend(), (0, 1, 2))(q, k, v)))


def test_vmap_of_what_cannot_be_folded(pushed):
    q, k, v = _tensors()
    bias, d_bias = torch.randn(13, 17).double(), torch.randn(3, 13, 17).double()

    def push(kernel):
        def along(d_bias):
            return jvp(lambda bias: tw.attention(q, k, v, bias=bias, kernel=kernel), (bias,), (d_bias,))[1]

        return along

    _close(vmap(push("native"))(d_bias), torch.stack([push("portable")(d) for d in d_bias]))
    assert pushed == ["native"] * 3


@pytest.mark.parametrize("order", ["forward over forward", "reverse over forward", "forward over reverse"])
def test_second_order(order):
    primals, along, further = _tensors(), _tensors(1), _tensors(2)

    def results(attend):
        def loss(*x):
            out, lse = attend(*x)
            return out.sin().sum() + lse.cos().sum()

        if order == "forward over forward":
            return jvp(lambda *x: jvp(loss, x, along)[1], primals, further)
        if order == "reverse over forward":
            return torch.func.grad(lambda *x: jvp(loss, x, along)[1], (0, 1, 2))(*primals)
        return jvp(torch.func.grad(loss, (0, 1, 2)), primals, along)

    _close(results(_attend()), results(_attend(kernel="portable")))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout):
    """Schema, fake shapes and strides, autograd's registration, tracing."""
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bshd" else x for x in _tensors()]
    rest = ([], [], None, f"operands=q,k,v;layout={layout}")
    out, lse = operator.attention(tensors, *rest)
    operands = [x.requires_grad_() for x in tensors]
    for moving in ([0, 1, 2], [1]):
        along = [torch.randn_like(tensors[n]) for n in moving]
        torch.library.opcheck(operator.attention_tangent, (operands, out, lse, along, *rest, moving))


def test_a_tangent_of_zeros_without_memory():
    q, k, v = _tensors()
    nothing = torch._efficientzerotensor(q.shape, dtype=q.dtype)
    with forward_ad.dual_level():
        out, lse = _attend()(forward_ad.make_dual(q, nothing), k, v)
        for x in (out, lse):
            tangent = forward_ad.unpack_dual(x).tangent
            assert tangent is None or not tangent.any()


def test_explained():
    for kernel in ("native", "portable"):
        lines = str(tw.explain(*_tensors(), kernel=kernel)).splitlines()
        assert [line.split() for line in lines if line.startswith("tangents")] == [["tangents", kernel]]
