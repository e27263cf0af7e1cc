"""First, second and third order, reverse and forward mode, against finite differences in float64."""

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from support.torch_cases import CASES, problem, use_small_tiles  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.func import jvp  # noqa: E402

import tilewise as tw  # noqa: E402


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_first_order(name):
    function, inputs = problem(name)
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=name != "everything")


# The other cases' second order is held against these by the products of `test_functional.py`.
@pytest.mark.parametrize("name", ["causal", "rows that see nothing", "table", "everything"])
def test_second_order(name):
    function, inputs = problem(name)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_third_order(name):
    function, inputs = problem(name)

    def slope(*tensors):
        out, lse = function(*tensors)
        loss = out.square().sum() + (lse * lse).sum()
        return torch.autograd.grad(loss, tensors, create_graph=True)

    assert gradgradcheck(slope, inputs, fast_mode=True)


def _plain(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def _pushed(function, primals, tangents):
    return jvp(function, primals, tangents)[1]


def _pulled_twice(function, primals, tangents):
    """The gradients of (tangents . the first gradients)."""
    leaves = [x.clone().requires_grad_() for x in primals]
    out = function(*leaves)
    slopes = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    return torch.cat([x.flatten() for x in torch.autograd.grad(slopes, leaves, tangents)])


def _check(derivative, ours, plain):
    """A derivative in float32 against that of the plain formula in float64, and in float32 for a yardstick."""
    torch.manual_seed(0)
    primals = tuple(torch.randn(1, 2, size, 16) for size in (13, 17, 17))
    tangents = tuple(torch.randn_like(x) for x in primals)
    exact = derivative(plain, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
    assert_accurate("derivative", derivative(ours, primals, tangents), exact, derivative(plain, primals, tangents))


# float64 cannot show it: autocast leaves that alone, and rounds what is narrower wherever its keys are not excluded.
@pytest.mark.parametrize("derivative", [_pushed, _pulled_twice])
@pytest.mark.parametrize("kernel", ["native", "portable"])
def test_float32_is_not_rounded_to_halves(kernel, derivative):
    _check(derivative, lambda *x: tw.attention(*x, kernel=kernel), _plain)


@pytest.mark.parametrize("derivative", [_pushed, _pulled_twice])
@pytest.mark.parametrize("kernel", ["native", "portable"])
def test_rows_that_a_bias_carries_far_from_0(kernel, derivative):
    """At -1e9 lse has no place for the logarithm of the sum of 17 probabilities that are alike."""
    bias = torch.zeros(13, 17)
    bias[3:6] = -(2.0**100)

    def plain(q, k, v):
        return (q @ k.mT / 4 + bias.to(q.dtype)).softmax(-1) @ v

    _check(derivative, lambda *x: tw.attention(*x, bias=bias, kernel=kernel), plain)
