"""Attention on torch tensors through the public door, against the oracle: values and first gradients, every case."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.portable_cases import CASES, SMALL, arrays, planned  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.kernels.portable.backward import backward  # noqa: E402
from tilewise.kernels.portable.forward import forward  # noqa: E402
from tilewise.kernels.reference import dense  # noqa: E402


def tensors(**sizes):
    return {name: torch.from_numpy(array) for name, array in arrays(**sizes).items()}


@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    plan, operands = planned(**tensors(), **CASES[name](torch.as_tensor))
    exact = dense.attention(plan.problem, operands)
    out, lse = forward(plan, operands)
    np.testing.assert_allclose(out.numpy(), exact.out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), exact.lse, rtol=0, atol=1e-12)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    want, got = dense.gradients(exact, d_out, d_lse), backward(plan, operands, out, lse, d_out, d_lse)
    for field in ("q", "k", "v", "table", "sinks"):
        if getattr(want, field) is not None:
            np.testing.assert_allclose(
                getattr(got, field).numpy(), getattr(want, field), rtol=0, atol=1e-11, err_msg=field
            )
    for a, b in zip(got.dense, want.dense, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-11)


def test_numpy_and_torch_agree():
    plan, operands = planned(**arrays(), **CASES["everything"](lambda array: array))
    torch_plan, torch_operands = planned(**tensors(), **CASES["everything"](torch.as_tensor))
    for a, b in zip(forward(plan, operands), forward(torch_plan, torch_operands), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    operands = {
        name: tensor.to(dtype).requires_grad_() for name, tensor in tensors(q_len=40, k_len=70, dim=16, value=8).items()
    }
    slopes = torch.rand(4, requires_grad=True)
    out, lse = tw.attention(
        **operands,
        mask=tw.causal("end"),
        bias=tw.alibi(slopes, "end"),
        softcap=10.0,
        return_lse=True,
        kernel="portable",
    )
    assert out.dtype == dtype and lse.dtype == torch.float32
    (out.float().sum() + lse.sum()).backward()
    assert all(tensor.grad.dtype == dtype for tensor in operands.values()) and slopes.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layout(layout):
    operands = tensors()
    if layout == "bshd":
        operands = {name: tensor.transpose(1, 2).contiguous().requires_grad_() for name, tensor in operands.items()}
    out = tw.attention(**operands, layout=layout, kernel="portable")
    assert out.is_contiguous()
    expected = torch.from_numpy(tw.attention(**arrays(), kernel="portable"))
    torch.testing.assert_close(out, expected if layout == "bhsd" else expected.transpose(1, 2))


def test_other_kernels_forward_with_portable_gradients():
    operands = {name: tensor.requires_grad_() for name, tensor in tensors().items()}
    out = tw.attention(**operands, mask=tw.causal("end"), kernel="reference", allow_quadratic=True)
    first = torch.autograd.grad(out.square().sum(), list(operands.values()))
    out = tw.attention(**operands, mask=tw.causal("end"), kernel="portable")
    for a, b in zip(first, torch.autograd.grad(out.square().sum(), list(operands.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_no_gradient_means_no_graph():
    assert tw.attention(**tensors(), kernel="portable").grad_fn is None
    operands = {name: tensor.requires_grad_() for name, tensor in tensors().items()}
    with torch.no_grad():
        assert tw.attention(**operands, kernel="portable").grad_fn is None


def test_dropout_seed_as_a_tensor():
    number, tensor = (
        tw.attention(**tensors(), dropout=tw.Dropout(0.5, seed), kernel="portable")
        for seed in (7 + 2**33, torch.tensor(7 + 2**33))
    )
    torch.testing.assert_close(number, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("seed", [5, 2**63 + 5, 2**64 - 1])
def test_dropout_seed_as_an_unsigned_tensor(seed):
    q, k, v = (torch.from_numpy(array) for array in arrays().values())
    given = torch.from_numpy(np.array([seed], np.uint64))
    torch.testing.assert_close(
        tw.attention(q, k, v, dropout=tw.Dropout(0.5, given)), tw.attention(q, k, v, dropout=tw.Dropout(0.5, seed)),
        rtol=0, atol=0,
    )  # fmt: skip


def test_small_tiles_are_used():
    plan, _ = planned(**tensors())
    assert plan.tiles == SMALL


def test_numpy_facts_of_any_strides_and_byte_order():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 30, 8)
    rng = np.random.default_rng(0)
    seen, bias, slopes = rng.random((5, 30)) < 0.7, rng.standard_normal((5, 30), np.float32), np.float32([0.5, 0.1])

    def reverse(x):
        return x[..., ::-1].copy()[..., ::-1]

    for got, plain in (
        ({"mask": reverse(seen)}, {"mask": seen}),
        ({"mask": tw.dense(reverse(seen))}, {"mask": seen}),
        ({"bias": reverse(bias)}, {"bias": bias}),
        ({"bias": bias.astype(">f4")}, {"bias": bias}),
        ({"bias": tw.alibi(reverse(slopes), "end")}, {"bias": tw.alibi(slopes, "end")}),
    ):
        assert torch.equal(tw.attention(q, k, k, **got), tw.attention(q, k, k, **plain))
