"""First, second and third order, reverse and forward mode, against finite differences in float64."""

import pytest

torch = pytest.importorskip("torch")

from support.torch_cases import CASES, problem, use_small_tiles  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402


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
