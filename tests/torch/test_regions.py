"""Regions that torch code puts around a call: autocast, checkpoint, inference mode."""

import pytest

torch = pytest.importorskip("torch")

from support.portable_cases import arrays  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import tilewise as tw  # noqa: E402


def _tensors(dtype=torch.float64):
    return [torch.from_numpy(array).to(dtype).requires_grad_() for array in arrays().values()]


@pytest.mark.parametrize("kernel", ["portable", None])
def test_autocast_casts_the_operands_and_rounds_nothing_else(kernel):
    q, k, v = _tensors(torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = tw.attention(*half, kernel=kernel)
    with torch.autocast("cpu", torch.bfloat16):
        out = tw.attention(q, k.bfloat16(), v, kernel=kernel)
        gradient = torch.autograd.grad(out.sum(), q)[0]
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    (exact,) = torch.autograd.grad(expected.sum(), half[0])
    torch.testing.assert_close(gradient, exact.float(), rtol=0, atol=0)


def test_autocast_leaves_float64():
    q, k, v = _tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = tw.attention(q, k, v)
    torch.testing.assert_close(out, tw.attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    q, k, v = _tensors()

    def f(q, k, v):
        return tw.attention(q, k, v, mask=tw.causal("end"), dropout=tw.Dropout(0.5, 1), kernel="portable")

    got = torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=reentrant).sum(), q) if not reentrant else None
    expected = torch.autograd.grad(f(q, k, v).sum(), q)
    if reentrant:
        checkpoint(f, q, k, v, use_reentrant=True).sum().backward()
        got = (q.grad,)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_inference_mode():
    q, k, v = _tensors()
    with torch.inference_mode():
        out = tw.attention(q, k, v, kernel="portable")
    torch.testing.assert_close(out, tw.attention(q, k, v, kernel="portable").detach())


def test_changed_input_is_noticed():
    q, k, v = _tensors()
    scaled = q * 1
    out = tw.attention(scaled, k, v, kernel="portable")
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(device):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        q, k, v = (torch.empty(array.shape) for array in arrays().values())
        out, lse = tw.attention(q, k, v, mask=tw.causal("end"), sinks=1.0, kernel="portable", return_lse=True)
    assert tuple(out.shape) == (2, 4, 13, 5) and tuple(lse.shape) == (2, 4, 13)
