"""The accuracy rule on torch tensors of every dtype, forward and backward."""

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from support.portable_cases import arrays, planned  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.contract import Tiles  # noqa: E402
from tilewise.kernels.portable.backward import backward  # noqa: E402
from tilewise.kernels.portable.forward import forward  # noqa: E402
from tilewise.kernels.reference import dense  # noqa: E402


def _plain(q, k, v):
    """Three lines of attention, causal."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_rule(dtype, size):
    given = arrays(batch=1, heads=2, kv=2, q_len=100, k_len=150, dim=32, value=24)
    q, k, v = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in given.values())
    q = q * size
    plan, operands = planned(q, k, v, mask=tw.causal("end"), tiles=Tiles(32, 48))
    exact = dense.attention(plan.problem, operands)
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    plain = _plain(*inputs)
    out, lse = forward(plan, operands)
    assert_accurate("out", out, exact.out, plain)
    assert_accurate("lse", lse, exact.lse)
    d_out = torch.randn_like(out)
    want, got = dense.gradients(exact, d_out), backward(plan, operands, out, lse, d_out, None)
    for name, other in zip("qkv", torch.autograd.grad(plain, inputs, d_out), strict=True):
        assert_accurate(name, getattr(got, name), getattr(want, name), other)
