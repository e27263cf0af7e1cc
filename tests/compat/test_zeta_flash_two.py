"""`FlashAttentionTwo`: its documented examples as they stand, the formula, and heads split over two processes."""

import subprocess
import sys
import textwrap
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import linear  # noqa: E402

from tilewise.compat.zeta_flash_two import FlashAttentionTwo  # noqa: E402

# The examples of zeta's documentation with their import of zeta changed. They use torch without importing it.
BASIC = """
from torch import nn
from tilewise.compat.zeta_flash_two import FlashAttentionTwo

model = FlashAttentionTwo(dim=512)
x = torch.randn(1, 10, 512)
out = model(x)
"""
WITH_MASK = """
from torch import nn
from tilewise.compat.zeta_flash_two import FlashAttentionTwo

model = FlashAttentionTwo(dim=512)
x = torch.randn(1, 10, 512)
mask = torch.ones(1, 10)
out = model(x, mask=mask)
"""
WITH_CONTEXT = """
from torch import nn
from tilewise.compat.zeta_flash_two import FlashAttentionTwo

model = FlashAttentionTwo(dim=512)
x = torch.randn(1, 10, 512)
context = torch.randn(1, 10, 512)
out = model(x, context=context)
"""


@pytest.mark.parametrize("example", [BASIC, WITH_MASK, WITH_CONTEXT], ids=["basic", "mask", "context"])
def test_documented_examples(example):
    names = {"torch": torch}
    exec(example, names)
    model, x, out = names["model"], names["x"], names["out"]
    assert out.shape == (1, 10, 512) and out.dtype == torch.float32
    torch.testing.assert_close(out, plain(model, x, names.get("context")))


def plain(model, x, context=None, mask=None):
    """The formula written out, with the module's weights."""
    context = x if context is None else context
    split = lambda y: y.unflatten(-1, (model.heads, -1)).transpose(1, 2)  # noqa: E731
    k, v = (split(y) for y in linear(context, model.to_kv.weight).chunk(2, -1))
    s = split(linear(x, model.to_q.weight)) @ k.mT * model.dim_head**-0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool)
    if model.causal:
        seen = seen.tril(s.shape[-1] - s.shape[-2])
    seen = seen if mask is None else seen & mask.bool()[:, None, None]
    weights = torch.nan_to_num(s.masked_fill(~seen, -torch.inf).softmax(-1), 0.0)
    return linear((weights @ v).transpose(1, 2).flatten(2), model.to_out.weight)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(**options):
    torch.manual_seed(0)
    return FlashAttentionTwo(**{"dim": 12, "heads": 3, "dim_head": 4, **options}).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5), (1, 6)])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32, torch.int64], ids=str)
def test_formula(causal, lengths, mask):
    model = module(causal=causal, q_bucket_size=2, k_bucket_size=3)
    x, context = some(2, lengths[0], 12).requires_grad_(), some(2, lengths[1], 12, seed=1).requires_grad_()
    if mask is not None:
        mask = (some(2, lengths[1], seed=2) > 0).to(mask)
    got, expected = model(x, context, mask, q_bucket_size=1, k_bucket_size=100), plain(model, x, context, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    leaves = [x, context, *model.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_row_without_keys_is_zero():
    model, x = module(), some(2, 4, 12)
    out = model(x, mask=torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1]]))
    assert (out[0] == 0).all() and (out[1] != 0).all()


def test_state_dict():
    shapes = {name: tuple(value.shape) for name, value in FlashAttentionTwo(dim=12, heads=3).state_dict().items()}
    assert shapes == {"to_q.weight": (192, 12), "to_kv.weight": (384, 12), "to_out.weight": (12, 192)}


@pytest.mark.parametrize("causal", [False, True])
def test_mixed_precision(causal):
    exact = module(causal=causal)
    model = module(causal=causal, mixed_precision=True).float()
    x = some(2, 9, 12)
    out = model(x.float())
    assert out.dtype == torch.float32 and not torch.equal(out, model.to_out(model.to_out.weight.new_zeros(2, 9, 12)))
    torch.testing.assert_close(out.double(), plain(exact, x), rtol=0, atol=2e-2)
    assert (out.double() - plain(exact, x)).abs().max() > 1e-5  # it was not float32
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_without_a_group_parallel_says_so_once(monkeypatch):
    monkeypatch.setattr(FlashAttentionTwo, "_told", False)
    x = some(1, 3, 12)
    with pytest.warns(UserWarning, match="no effect without a process group"):
        out = module(parallel=True)(x)
    assert torch.equal(out, module()(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(parallel=True)(x)


WORKER = """
import gc
import sys
import weakref
import torch
import torch.distributed as dist
from tilewise.compat.zeta_flash_two import FlashAttentionTwo

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
calls, attend = [], FlashAttentionTwo._attend
FlashAttentionTwo._attend = lambda self, q, k, v, heads, mask: calls.append(heads) or attend(self, q, k, v, heads, mask)
for heads in (1, 3, 4):
    torch.manual_seed(0)
    modules = [
        FlashAttentionTwo(dim=12, heads=heads, dim_head=4, causal=True, parallel=parallel).double()
        for parallel in (True, False)
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    context = torch.randn(2, 7, 12).double().requires_grad_()
    mask = torch.rand(2, 7) > 0.2
    for given in (None, context):
        x = torch.randn(2, 5, 12).double().requires_grad_()
        outs = [model(x, given, mask[:, :5] if given is None else mask) for model in modules]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-13)
        found = []
        for out, model in zip(outs, modules):
            leaves = [x, *model.parameters()] + ([] if given is None else [context])
            found.append(torch.autograd.grad(out.sin().sum(), leaves))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
assert calls[::4] == [[0, 1, 2], [1, 2, 2]][rank], calls
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
gc.collect()
assert group() is None, "a graph keeps the group alive"
print("agreed")
"""


def test_two_processes_share_the_heads(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    command, pipes = [sys.executable, str(script)], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], text=True, **pipes) for rank in (0, 1)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers) and all("agreed" in text for text in outputs), outputs


def test_errors():
    x = some(2, 4, 12)
    for message, call in (
        ("^heads", lambda: FlashAttentionTwo(dim=4, heads=0)),
        ("^k_bucket_size", lambda: FlashAttentionTwo(dim=4, k_bucket_size=0)),
        ("^q_bucket_size", lambda: module()(x, q_bucket_size=0)),
        ("^x: has shape", lambda: module()(x[0])),
        ("^context: has shape", lambda: module()(x, x[..., 1:])),
        ("^context: has 1 as batch size", lambda: module()(x, x[:1])),
        ("^mask: has shape", lambda: module()(x, mask=torch.ones(4))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError):
        FlashAttentionTwo(12)
