"""`tilewise.torch.MultiheadAttention` in place of `nn.MultiheadAttention`: parameters, values, derivatives, homes."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

import tilewise  # noqa: E402
from tilewise.torch.multihead import MultiheadAttention  # noqa: E402

close = torch.testing.assert_close
make = partial(torch.randn, dtype=torch.float64)

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 5},
    "separate, no bias": {"kdim": 6, "bias": False},
    "batch first": {"batch_first": True},
}
EACH = pytest.mark.parametrize("name", OPTIONS)
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:The PyTorch API of nested")


def pair(width=8, heads=2, train=False, **options):
    """The original and ours, made with the same seed."""
    modules = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(1)
        modules.append(kind(width, heads, dtype=torch.float64, **options).train(train))
    return modules


def inputs(options, q_len=4, k_len=5, batch=3, width=8):
    q, k, v = (make(n, batch, options.get(dim, width)) for n, dim in ((q_len, ""), (k_len, "kdim"), (k_len, "vdim")))
    return [x.transpose(0, 1) for x in (q, k, v)] if options.get("batch_first") else [q, k, v]


@EACH
def test_parameters_and_checkpoints_are_the_original_s(name):
    original, ours = pair(**OPTIONS[name])
    assert list(original.state_dict()) == list(ours.state_dict())
    for mine, other in zip(ours.parameters(), original.parameters(), strict=True):
        assert torch.equal(mine, other)
    _, other = pair(**OPTIONS[name])
    for source, target in ((original, other), (ours, pair(**OPTIONS[name])[0])):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        target.load_state_dict(source.state_dict())
        given = inputs(OPTIONS[name])
        close(source(*given), target(*given))


@EACH
@pytest.mark.parametrize("train", [False, True])
def test_values_of_every_mask(name, train):
    options = OPTIONS[name]
    original, ours = pair(train=train, **options)
    q, k, v = inputs(options)
    ignore = torch.rand(4, 5) < 0.4
    ignore[:, 1] = False
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True, False, False, True, True]])
    attn_masks = (None, ignore, make(4, 5), ignore.expand(6, 4, 5), make(6, 4, 5))
    paddings = (None, padding, padding.double() * -3)
    for attn_mask, key_padding_mask, need, average in itertools.product(attn_masks, paddings, (0, 1), (0, 1)):
        kwargs = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        kwargs |= {"need_weights": bool(need), "average_attn_weights": bool(average)}
        close(ours(q, k, v, **kwargs), original(q, k, v, **kwargs))


def test_samples_of_torch():
    """torch's own ModuleInfo samples, unbatched inputs with masks, values and gradients."""
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is nn.MultiheadAttention)
    found = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=False)
    assert len(found) >= 64
    for sample in found:
        results = []
        for kind in (nn.MultiheadAttention, MultiheadAttention):
            torch.manual_seed(2)
            construct, forward = sample.constructor_input, sample.forward_input
            module = kind(*construct.args, **construct.kwargs, dtype=torch.float64).eval()
            out = module(*forward.args, **forward.kwargs)
            wanted = (*forward.args, *module.parameters())
            gradients = torch.autograd.grad(sum(part.sin().sum() for part in out), wanted, allow_unused=True)
            results.append((out, gradients))
        close(results[1], results[0])


def test_self_attention_and_shared_keys():
    """Arrays that are the same object are projected at once, with the same result."""
    for options in ({}, {"batch_first": True}):
        original, ours = pair(**options)
        x, y = make(4, 3, 8), make(4, 3, 8)
        for given in ((x, x, x), (x, y, y), (x, x, y), (x, y, x)):
            close(ours(*given), original(*given))


@EACH
@pytest.mark.parametrize("need_weights", [True, False])
def test_derivatives(name, need_weights):
    options = OPTIONS[name]
    _, ours = pair(4, 2, train=True, **{**options, **({"kdim": 3, "vdim": 5} if "kdim" in options else {})})
    given = [x.requires_grad_() for x in inputs({**options, "kdim": ours.kdim, "vdim": ours.vdim}, 2, 3, 2, 4)]
    mask = make(2, 3, requires_grad=True)
    parameters = dict(ours.named_parameters())

    def function(q, k, v, mask, *values):
        named = dict(zip(parameters, values, strict=True))
        keywords = {"attn_mask": mask, "need_weights": need_weights}
        out = torch.func.functional_call(ours, named, (q, k, v), keywords)
        return tuple(part for part in out if part is not None)

    # Sharpened a little: fresh biases are 0, at which a wrong gradient to a product could hide.
    tensors = (*given, mask, *((p.detach() + 0.1).requires_grad_() for p in parameters.values()))
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


def test_dropout_in_training_only():
    _, ours = pair(dropout=0.5, train=True)
    x = make(6, 2, 8)
    torch.manual_seed(3)
    first = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(3)
    close(first, ours(x, x, x, need_weights=False)[0])
    assert not torch.equal(first, ours(x, x, x, need_weights=False)[0])
    assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x)[0])


def test_dropout_with_weights_is_the_original_s():
    original, ours = pair(dropout=0.5, train=True)
    x, found = make(6, 2, 8), []
    for module in (original, ours):
        torch.manual_seed(3)
        found.append(module(x, x, x))
    close(*found)


def test_tilewise_masks():
    original, ours = pair(batch_first=True)
    x = make(2, 6, 8)
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    for mask in (
        tilewise.window(1, 1), tilewise.prefix(2), tilewise.lengths(k=torch.tensor([3, 5])),
        tilewise.documents(torch.tensor([0, 0, 1, 1, 0, 2])), tilewise.blocks([[True, False], [True, True]], 3),
        tilewise.predicate(lambda b, h, i, j: (i + j) % 2 == h), ~tilewise.window(0, 0) & tilewise.causal(),
    ):  # fmt: skip
        out, weights = ours(x, x, x, attn_mask=mask, average_attn_weights=False)
        assert torch.equal(weights > 0, torch.from_numpy(tilewise.materialize(mask, 6, 6, batch=2, heads=2)))
        close(out, ours(x, x, x, attn_mask=mask, need_weights=False)[0])
    for need_weights in (True, False):
        expected = original(x, x, x, attn_mask=later, key_padding_mask=padding, need_weights=need_weights)
        got = ours(x, x, x, attn_mask=tilewise.causal(), key_padding_mask=padding, need_weights=need_weights)
        close(got, expected)


def test_a_query_that_sees_nothing():
    """The output is that of zeros, where the original's is NaN; its gradients are zero."""
    original, ours = pair(batch_first=True, train=True)
    x = make(2, 4, 8, requires_grad=True)
    padding = torch.tensor([[False] * 4, [True] * 4])
    for need_weights in (True, False):
        out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        close(out[1], ours.out_proj.bias.expand(4, 8))
        loss = out.sum() + (weights.square().sum() if need_weights else 0)
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient[1].eq(0).all()
        assert gradient[0].ne(0).any()
    assert original(x, x, x, key_padding_mask=padding)[0][1].isnan().all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_a_transformer(train, norm_first):
    """Ours runs in evaluation, too, where the layer's own fused path would pass it by."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    original = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).train(train)
    ours, called = copy.deepcopy(original), []
    for part in ours.layers:
        part.self_attn = MultiheadAttention.of(part.self_attn)
        part.self_attn.register_forward_hook(lambda *_: called.append(1))
    x = make(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [2], [3]])
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for options in (
        {},
        {"src_key_padding_mask": padding},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": padding.double().masked_fill(padding, -torch.inf)},
    ):
        for grad in (True, False):
            called.clear()
            with torch.set_grad_enabled(grad):
                got, expected = ours(x, **options), original(x, **options)
            assert len(called) == 2
            keep = ~padding if "src_key_padding_mask" in options else slice(None)
            close(got[keep], expected[keep])


def test_the_fused_path_is_not_taken_without_any_hook_of_the_caller(monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    called = []
    monkeypatch.setattr(MultiheadAttention, "forward", lambda *args, **_: called.append(1) or (args[1], None))
    for module in (MultiheadAttention.of(layer.self_attn), pickle.loads(pickle.dumps(layer.self_attn))):
        layer.self_attn = module
        with torch.no_grad():
            layer(torch.randn(2, 3, 8))
    assert called == [1]


def test_inside_a_decoder():
    original = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(original)
    ours.self_attn, ours.multihead_attn = (MultiheadAttention.of(x) for x in (ours.self_attn, ours.multihead_attn))
    x, memory = make(2, 4, 8), make(2, 6, 8)
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    options = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    close(ours(x, memory, **options), original(x, memory, **options))


def test_copies_pickles_and_twins():
    original, ours = pair(add_bias_kv=True)
    given = inputs({})
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    expected = original(*given)
    twin = MultiheadAttention.of(original)
    for module in (copy.deepcopy(ours), torch.load(buffer, weights_only=False), twin):
        close(module(*given), expected)
        assert len(module._forward_pre_hooks) == 1
    assert twin.in_proj_weight is original.in_proj_weight
    assert not original._forward_pre_hooks
    twin.out_proj = None
    assert original.out_proj is not None
    state = ours.__dict__.copy()
    del state["_qkv_same_embed_dim"]  # as checkpoints of torch 1.1 are
    old = MultiheadAttention.__new__(MultiheadAttention)
    nn.Module.__init__(old)
    old.__setstate__(state)
    close(old(*given), expected)


def test_factory_arguments_and_errors():
    module = MultiheadAttention(8, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert isinstance(module, nn.MultiheadAttention)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(8, 3)
    with pytest.raises(ValueError, match="must be greater than 0"):
        MultiheadAttention(8, 0)
    _, ours = pair()
    x = make(4, 3, 8)
    with pytest.raises(RuntimeError, match="The shape of the 2D attn_mask is"):
        ours(x, x, x, attn_mask=torch.zeros(4, 5))
    with pytest.raises(AssertionError, match="only bool and floating types of key_padding_mask"):
        ours(x, x, x, key_padding_mask=torch.zeros(3, 4).int())
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, is_causal=True)


LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])


@LAYOUTS
@pytest.mark.parametrize("average", [True, False])
def test_nested_is_the_original_s_fast_path(layout, average):
    """Which takes the strided layout alone, and no gradients."""
    original, ours = pair(batch_first=True)
    sequences = [make(3, 8), make(6, 8)]
    x = torch.nested.nested_tensor(sequences, layout=layout)
    with torch.no_grad():
        strided = torch.nested.nested_tensor(sequences)
        expected = original(strided, strided, strided, average_attn_weights=average)
        got = ours(x, x, x, average_attn_weights=average)
    assert got[0].layout == layout
    for mine, other in zip(got[0].unbind(), expected[0].unbind(), strict=True):
        close(mine, other)
    close(got[1], expected[1])
    x + got[0]  # the very same raggedness


@LAYOUTS
@EACH
def test_nested_is_each_sequence_on_its_own(layout, name):
    """With other keys, masks, added keys, in training and with gradients, none of which the original can."""
    _, ours = pair(train=True, **{**OPTIONS[name], "batch_first": True})
    q_rows, k_rows, v_rows = (
        [make(length, width, requires_grad=True) for length in lengths]
        for lengths, width in (((3, 6), 8), ((5, 2), ours.kdim), ((5, 2), ours.vdim))
    )
    nest = partial(torch.nested.as_nested_tensor, layout=layout)
    floats = make(6, 5)
    kept = torch.tensor([[False, True, False, False, False], [False] * 5])
    for options in ({}, {"attn_mask": floats, "key_padding_mask": kept}, {"key_padding_mask": kept.double()}):
        out, weights = ours(nest(q_rows), nest(k_rows), nest(v_rows), **options)
        loss = sum(rows.square().sum() for rows in out.unbind()) + weights.square().sum()
        gradients = torch.autograd.grad(loss, [*q_rows, *k_rows, *v_rows])
        alone_loss = 0
        for n, (q, k, v) in enumerate(zip(q_rows, k_rows, v_rows, strict=True)):
            own = {key: mask[: len(q), : len(k)] for key, mask in options.items() if key == "attn_mask"}
            own |= {key: mask[n : n + 1, : len(k)] for key, mask in options.items() if key == "key_padding_mask"}
            alone, alone_weights = ours(q[None], k[None], v[None], **own)
            close(out.unbind()[n], alone[0])
            close(weights[n, : len(q), : len(k)], alone_weights[0, :, : len(k)])
            assert weights[n, len(q) :].eq(0).all()
            alone_loss = alone_loss + alone.square().sum() + alone_weights.square().sum()
        close(gradients, torch.autograd.grad(alone_loss, [*q_rows, *k_rows, *v_rows]))


def test_nested_errors():
    _, ours = pair(batch_first=True)
    x, y = (torch.nested.nested_tensor([make(3, 8), make(n, 8)]) for n in (6, 5))
    dense = make(2, 6, 8)
    for given, words in (
        ((x, dense, dense), "^key: is dense"),
        ((dense, x, x), "^query: is dense"),
        ((x, x, y), "^value: has lengths"),
        (
            (torch.nested.nested_tensor([]),) * 3,
            "should be unbatched 2D or batched 3D tensor but received 1-D query tensor",
        ),
    ):
        with pytest.raises(AssertionError, match=words):
            ours(*given)
    with pytest.raises(AssertionError, match="batch_first was not True"):
        pair()[1](x, x, x)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_without_a_break(need_weights):
    _, ours = pair(batch_first=True, train=True)
    x, padding = make(2, 6, 8), torch.arange(6) >= torch.tensor([[6], [4]])
    for mask in (None, torch.ones(6, 6, dtype=torch.bool).triu(1), tilewise.causal()):
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        found = []
        for module in (compiled, ours):
            out = module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
            found.append((out, torch.autograd.grad(out[0].sin().sum(), list(ours.parameters()))))
        close(*found)


def test_dropout_compiles_to_what_runs_without():
    _, ours = pair(batch_first=True, dropout=0.4, train=True)
    x, found = make(2, 6, 8), []
    for module in (torch.compile(ours, fullgraph=True, backend="aot_eager"), ours):
        torch.manual_seed(5)
        found.append(module(x, x, x, need_weights=False)[0])
    close(*found)


def test_gradients_per_sample():
    _, ours = pair(batch_first=True)
    x, parameters = make(3, 5, 8), dict(ours.named_parameters())

    def loss(parameters, row):
        given = (row[None],) * 3
        return torch.func.functional_call(ours, parameters, given, {"need_weights": False})[0].sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for n, row in enumerate(x):
        alone = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        close([gradient[n] for gradient in found.values()], list(alone))


def test_autocast():
    torch.manual_seed(0)
    ours = MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = ours(x, x, x, attn_mask=torch.zeros(5, 5))
        alone = ours(x, x, x, need_weights=False)[0]
    assert out.dtype == alone.dtype == torch.bfloat16
    assert weights.shape == (2, 5, 6)
    close(out.float(), ours(x, x, x)[0], rtol=0.05, atol=0.05)
