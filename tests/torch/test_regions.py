"""Regions that torch code puts around a call: autocast, checkpoint, inference mode."""

import pytest

torch = pytest.importorskip("torch")

from support.portable_cases import arrays  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import tilewise as tw  # noqa: E402


def _tensors(dtype=torch.float64):
    return [torch.from_numpy(array).to(dtype).requires_grad_() for array in arrays().values()]


def test_autocast_does_not_round_the_products():
    q, k, v = _tensors(torch.float32)
    expected = tw.attention(q, k, v, kernel="portable")
    with torch.autocast("cpu", torch.bfloat16):
        out = tw.attention(q, k, v, kernel="portable")
        gradient = torch.autograd.grad(out.sum(), q)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), q)[0], rtol=0, atol=0)


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


# Dynamo tells that it traces through an lru_cache, and that it deprecates something of its own.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["values", "gradient", "tangent"])
def test_compiled_callers(what):
    q, k, v = (tensor.detach() for tensor in _tensors())

    def attend(q):
        return tw.attention(q, k, v, mask=tw.causal("end"), kernel="portable")

    functions = {
        "values": attend,
        "gradient": torch.func.grad(lambda q: attend(q).square().sum()),
        "tangent": lambda q: torch.func.jvp(attend, (q,), (q,))[1],
    }
    got = torch.compile(functions[what], backend="aot_eager")(q)
    torch.testing.assert_close(got, functions[what](q), rtol=0, atol=1e-13)


def test_exported_callers():
    class Caller(torch.nn.Module):
        def forward(self, q, k, v):
            return tw.attention(q, k, v, mask=tw.causal("end"), kernel="portable")

    inputs = tuple(tensor.detach() for tensor in _tensors())
    exported = torch.export.export(Caller(), inputs).module()
    torch.testing.assert_close(exported(*inputs), Caller()(*inputs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(device):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        q, k, v = (torch.empty(array.shape) for array in arrays().values())
        out, lse = tw.attention(q, k, v, mask=tw.causal("end"), sinks=1.0, kernel="portable", return_lse=True)
    assert tuple(out.shape) == (2, 4, 13, 5) and tuple(lse.shape) == (2, 4, 13)
