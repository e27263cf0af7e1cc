"""What is masked cannot be seen, at any order of differentiation and in forward mode."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.poison import MASKS, poisoned, rows_that_see  # noqa: E402
from support.portable_cases import arrays, planned  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.kernels.portable.backward import backward  # noqa: E402
from tilewise.kernels.portable.forward import forward  # noqa: E402
from tilewise.kernels.reference import dense  # noqa: E402


def _tensors(operands):
    return {name: torch.from_numpy(array) for name, array in operands.items()}


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name):
    mask = MASKS[name]()
    plan, operands = planned(**_tensors(poisoned(arrays(), np.nan)), mask=mask)
    out, lse = forward(plan, operands)
    exact = dense.attention(plan.problem, operands)
    np.testing.assert_allclose(out.numpy(), exact.out, atol=1e-12)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    got, want = backward(plan, operands, out, lse, d_out, d_lse), dense.gradients(exact, d_out, d_lse)
    for field in ("q", "k", "v"):
        np.testing.assert_allclose(getattr(got, field).numpy(), getattr(want, field), atol=1e-11)


def _hvp(operands, mask, cotangent, spoilt=None):
    """q's part of the Hessian of a loss over the rows that `cotangent` selects, in three ways."""
    q, k, v = (tensor.clone().requires_grad_() for tensor in operands.values())
    tangents = [torch.ones_like(tensor) for tensor in (q, k, v)]
    if spoilt is not None:
        tangents[1][:, :, spoilt] = tangents[2][:, :, spoilt] = torch.nan

    def loss(q, k, v):
        out = tw.attention(q, k, v, mask=mask, kernel="portable")
        return (torch.where(cotangent[..., None], out, 0.0) ** 2).sum()

    first = torch.autograd.grad(loss(q, k, v), (q, k, v), create_graph=True)
    rows = first[0][cotangent.expand(q.shape[:3])]
    twice = torch.autograd.grad((rows * torch.ones_like(rows)).sum(), q)[0]
    forward = torch.func.jvp(torch.func.grad(loss), (q.detach(), k.detach(), v.detach()), tuple(tangents))[1]
    return twice[cotangent.expand(q.shape[:3])], forward[cotangent.expand(q.shape[:3])]


@pytest.mark.parametrize("name", MASKS)
def test_second_order(name):
    mask, clean = MASKS[name](), arrays()
    blind = torch.from_numpy(~rows_that_see(mask))
    spoilt = _tensors(poisoned(clean, np.nan))
    expected = _hvp(_tensors(clean), mask, blind)
    got = _hvp(spoilt, mask, blind, [2, 9])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", MASKS)
def test_tangents(name):
    mask, clean = MASKS[name](), _tensors(arrays())
    blind = torch.from_numpy(~rows_that_see(mask))
    tangents = {key: torch.ones_like(value) for key, value in clean.items()}
    spoilt_tangents = {key: value.clone() for key, value in tangents.items()}
    for key in ("k", "v"):
        spoilt_tangents[key][:, :, [2, 9]] = torch.inf
    spoilt = _tensors(poisoned(arrays(), np.nan))

    def f(q, k, v):
        return tw.attention(q, k, v, mask=mask, return_lse=True, kernel="portable")

    expected = torch.func.jvp(f, tuple(clean.values()), tuple(tangents.values()))
    got = torch.func.jvp(f, tuple(spoilt.values()), tuple(spoilt_tangents.values()))
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a[blind], b[blind], rtol=0, atol=1e-11)


def test_rows_that_see_nothing_have_no_tangent():
    operands = tuple(_tensors(arrays()).values())
    mask = tw.causal("start") & ~tw.prefix(3)
    out, tangent = torch.func.jvp(
        lambda *x: tw.attention(*x, mask=mask, sinks=0.5, return_lse=True, kernel="portable"),
        operands,
        tuple(torch.full_like(x, torch.nan) if n == 0 else torch.ones_like(x) for n, x in enumerate(operands)),
    )
    assert (out[1][:, :, :3] == -torch.inf).all()
    assert (tangent[0][:, :, :3] == 0).all() and (tangent[1][:, :, :3] == 0).all()
