"""Ours in the place of torch's function: for a block, for good, under torch's own modules, in threads, compiled."""

from __future__ import annotations

import threading
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from tilewise import _api  # noqa: E402
from tilewise.compat import torch_sdpa  # noqa: E402

close = torch.testing.assert_close
STOCK = scaled_dot_product_attention  # at import it is torch's own


@pytest.fixture(autouse=True)
def left_as_it_was():
    yield
    torch_sdpa.uninstall()
    assert F.scaled_dot_product_attention is STOCK
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one for every call of ours."""
    made = []
    attention = _api.attention

    def counted(*args, **options):
        made.append(options)
        return attention(*args, **options)

    monkeypatch.setattr("tilewise._api.attention", counted)
    monkeypatch.setattr("tilewise.compat.torch_sdpa.again.key_of", lambda *args: None)  # each call goes the whole way
    return made


def x(*shape):
    return torch.randn(*(shape or (2, 3, 5, 8)), generator=torch.Generator().manual_seed(1))


HELD = {
    "the name": lambda q: F.scaled_dot_product_attention(q, q, q),
    "an import": lambda q: STOCK(q, q, q),
    "the builtin": lambda q: torch._C._nn.scaled_dot_product_attention(q, q, q),
    "a default argument": lambda q, f=STOCK: f(q, q, q),
    "a partial": partial(lambda f, q: f(q, q, q), STOCK),
}


@pytest.mark.parametrize("call", HELD.values(), ids=HELD)
def test_within_a_block_however_it_is_held(call, calls):
    q = x()
    expected = call(q)
    assert not calls
    with torch_sdpa.sdpa():
        close(call(q), expected)
        assert len(calls) == 1
    call(q)
    assert len(calls) == 1


def test_blocks_nest_and_survive_exceptions(calls):
    q = x()
    with pytest.raises(KeyError), torch_sdpa.sdpa():
        with torch_sdpa.sdpa():
            STOCK(q, q, q)
        F.scaled_dot_product_attention(q, q, q)
        assert len(calls) == 2
        raise KeyError
    assert F.scaled_dot_product_attention is STOCK
    STOCK(q, q, q)
    assert len(calls) == 2


def test_a_block_is_of_its_thread(calls):
    """Two threads in overlapping blocks; a third never enters one."""
    q, barrier, counts = x(), threading.Barrier(3, timeout=30), {}

    def enter(name):
        with torch_sdpa.sdpa():
            barrier.wait()
            barrier.wait()
            counts[name] = F.scaled_dot_product_attention(q, q, q)

    def outside():
        barrier.wait()
        assert F.scaled_dot_product_attention is not STOCK
        before = len(calls)
        F.scaled_dot_product_attention(q, q, q)
        counts["stock"] = len(calls) - before
        barrier.wait()

    threads = [threading.Thread(target=enter, args=("a",)), threading.Thread(target=enter, args=("b",))]
    threads.append(threading.Thread(target=outside))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts["stock"] == 0
    assert len(calls) == 2
    close(counts["a"], counts["b"])


def test_installed_for_every_thread_and_import(calls):
    q = x()
    torch_sdpa.install()
    torch_sdpa.install()
    worker = threading.Thread(target=lambda: F.scaled_dot_product_attention(q, q, q))
    worker.start()
    worker.join()
    assert len(calls) == 1
    scaled_dot_product_attention(q, q, q)  # this module's own name
    assert len(calls) == 2
    with torch_sdpa.sdpa():
        F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 3
    F.scaled_dot_product_attention(q, q, q)
    STOCK(q, q, q)
    held = F.scaled_dot_product_attention
    torch_sdpa.uninstall()
    torch_sdpa.uninstall()
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention, held):
        function(q, q, q)
    assert len(calls) == 4
    assert scaled_dot_product_attention is STOCK


def test_whoever_patched_before_is_put_back_and_after_is_left():
    def before(*args, **options):
        return "before"

    def after(*args, **options):
        return ours(*args, **options)

    F.scaled_dot_product_attention = before
    try:
        torch_sdpa.install()
        ours = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = after
        torch_sdpa.uninstall()
        assert F.scaled_dot_product_attention is after
        assert F.scaled_dot_product_attention(1, 2, 3) == "before"
        F.scaled_dot_product_attention = before
        with torch_sdpa.sdpa():
            pass
        assert F.scaled_dot_product_attention is before
    finally:
        F.scaled_dot_product_attention = STOCK


def test_the_fast_path_is_restored_as_it_was():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch_sdpa.install()
        torch_sdpa.uninstall()
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 2)


def decoder():
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerDecoder(layer, 2)


def multihead():
    return nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)


TOKENS, MEMORY = (torch.randn(3, n, 16, dtype=torch.float64) for n in (6, 4))
PADDING = torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6, [0, 0, 1, 1, 1, 1]]).bool()
FLOATS = torch.zeros(PADDING.shape, dtype=torch.float64).masked_fill(PADDING, -torch.inf)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
MODULES = {  # module, call, number of attentions
    "encoder": (encoder, lambda m: m(TOKENS), 2),
    "encoder, padding": (encoder, lambda m: m(TOKENS, src_key_padding_mask=PADDING), 2),
    "encoder, causal": (encoder, lambda m: m(TOKENS, mask=CAUSAL, is_causal=True), 2),
    "encoder, causal and padding": (encoder, lambda m: m(TOKENS, mask=CAUSAL, src_key_padding_mask=FLOATS), 2),
    "decoder": (decoder, lambda m: m(TOKENS, MEMORY, tgt_mask=CAUSAL, tgt_is_causal=True), 4),
    "decoder, padding": (decoder, lambda m: m(TOKENS, MEMORY, tgt_key_padding_mask=PADDING), 4),
    "heads": (multihead, lambda m: m(TOKENS, TOKENS, TOKENS, need_weights=False)[0], 1),
    "heads, causal": (
        multihead, lambda m: m(TOKENS, TOKENS, TOKENS, need_weights=False, attn_mask=CAUSAL, is_causal=True)[0], 1,
    ),
    "heads, padding": (
        multihead, lambda m: m(MEMORY, TOKENS, TOKENS, need_weights=False, key_padding_mask=PADDING)[0], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("installed", [False, True], ids=["block", "installed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("make", "call", "count"), MODULES.values(), ids=MODULES)
def test_modules_of_torch(make, call, count, training, installed, calls):
    """In evaluation without gradients torch would take paths that never call the function."""
    torch.manual_seed(0)
    module = make().train(training)
    expected = call(module)  # with gradients, so not by a fast path, which writes zeros where padding is
    with torch.set_grad_enabled(training):
        if installed:
            torch_sdpa.install()
            out = call(module)
        else:
            with torch_sdpa.sdpa():
                out = call(module)
    assert len(calls) == count
    close(out, expected.detach() if not training else expected)
    if training:
        weights = list(module.parameters())
        close(*(torch.autograd.grad(o.square().sum(), weights) for o in (out, expected)))


def test_causal_biases_of_torch(calls):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = x(1, 2, 3, 8), x(1, 2, 7, 8)
    for bias in (causal_upper_left(3, 7), causal_lower_right(3, 7)):
        expected = F.scaled_dot_product_attention(q, k, k, bias)
        calls.clear()
        with torch_sdpa.sdpa():
            close(F.scaled_dot_product_attention(q, k, k, bias), expected)
            close(STOCK(q, k, k, bias), expected)
        torch_sdpa.install()
        close(F.scaled_dot_product_attention(q, k, k, bias), expected)
        torch_sdpa.uninstall()
        assert len(calls) == 3
        assert not any(options["bias"] is not None for options in calls), "a causal mask, not one written out"


def test_errors_come_through(calls):
    q = x()
    with torch_sdpa.sdpa(), pytest.raises(RuntimeError, match="Explicit attn_mask"):
        STOCK(q, q, q, torch.zeros(5, 5), is_causal=True)


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_compiled_within_and_without():
    """One compiled model takes the function that is in place when it is called."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(targets(graph))
        return graph.forward

    @partial(torch.compile, fullgraph=True, backend=backend)
    def model(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True) + STOCK(q, q, q)

    q = x()
    expected = model(q)
    assert not any("tilewise" in target for target in graphs[-1])
    with torch_sdpa.sdpa():
        close(model(q), expected)
    assert sum("tilewise.attention" in target for target in graphs[-1]) == 2
    assert len(graphs) == 2
    close(model(q), expected)
    torch_sdpa.install()
    close(model(q), expected)
    assert sum("tilewise.attention" in target for target in graphs[-1]) == 1, "what was kept is torch's"


def test_compiled_modules_of_torch():
    """A compiled graph holds the module's whole function, which finds ours when it is traced further."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(targets(graph))
        return graph.forward

    heads = multihead()
    compiled = torch.compile(heads, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))

    def run():
        return compiled(TOKENS, TOKENS, TOKENS, need_weights=False)[0]

    expected = run()
    assert not any("tilewise" in target for target in graphs[-1])
    with torch_sdpa.sdpa():
        close(run(), expected)
    assert any("tilewise" in target for target in graphs[-1])


@torch.no_grad()  # torch's compiler warns of gradients of what it finds between two graphs
def test_block_inside_a_compiled_function(calls):
    """A break of the graph: an error where one graph is asked for, else ours all the same."""
    heads = multihead()

    def model(tokens):
        with torch_sdpa.sdpa():
            return heads(tokens, tokens, tokens, need_weights=False)[0]

    with pytest.raises(Exception, match="context manager"):
        torch.compile(model, fullgraph=True, backend="eager")(TOKENS)
    out = torch.compile(model, backend="eager")(TOKENS)
    assert calls
    close(out, heads(TOKENS, TOKENS, TOKENS, need_weights=False)[0])
