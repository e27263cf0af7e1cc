"""No order of differentiation makes an array that grows with Sq * Sk."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from support.largest import Largest  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.plan.choose import planned  # noqa: E402
from tilewise.torch import call, operator  # noqa: E402, F401
from tilewise.torch.programs import Program  # noqa: E402

MOST = 1 << 14  # scores of a slab of tiles; a length of 700 has 30 times as many


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    for name, scores in (("_HEAD_SCORES", MOST >> 2), ("_SLAB_SCORES", MOST), ("_VARIED_SCORES", MOST)):
        monkeypatch.setattr(f"tilewise.kernels.portable.tiles.{name}", scores)
    planned.cache_clear()
    yield
    planned.cache_clear()


def _first(f, x):
    torch.autograd.grad(f(x).sum(), x)


def _second(f, x):
    (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.autograd.grad(gradient.sum(), x)


def _forward_mode(f, x):
    torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),))


@pytest.fixture
def inside(monkeypatch):
    """Looks at the operations inside our operators, which a mode around them does not see."""
    largest = Largest()

    def watched(function):
        def run(*args):
            with largest:
                return function(*args)

        return run

    monkeypatch.setattr(Program, "run", watched(Program.run))
    for name, part in (("forward_of", "forward"), ("backward_of", "backward")):
        kernel = SimpleNamespace(**{part: watched(getattr(getattr(operator, name)("portable"), part))})
        monkeypatch.setattr(operator, name, lambda _, kernel=kernel: kernel)
    return largest


@pytest.mark.parametrize("order", [_first, _second, _forward_mode])
def test_linear(order, inside):
    length = 700
    x = torch.randn(1, 1, length, 4, requires_grad=True)
    table = torch.randn(2 * length - 1)
    mask = tw.window(60, 0, "end")
    with Largest() as outside:
        order(lambda x: tw.attention(x, x, x, mask=mask, bias=tw.relative(table), kernel="portable"), x)
    assert 0 < inside.elements <= 2 * MOST
    assert 0 < outside.elements <= 2 * MOST


def test_sees_a_quadratic_array():
    x = torch.randn(1, 1, 700, 4)
    with Largest() as largest:
        torch.softmax(x @ x.mT, -1)
    assert largest.elements > 2 * MOST
