"""The attention handed to transformers, called as a model would call it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from tilewise.torch.integrations.transformers import attention_forward  # noqa: E402


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True), ("head_mask", torch.ones(4)), ("cache", object()),
        ("block_indices", torch.zeros(1)),
    ],
)  # fmt: skip
def test_what_it_cannot_honour_raises(name, value):
    x = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=f"^{name}: "):
        attention_forward(torch.nn.Module(), x, x, x, None, **{name: value})
    attention_forward(torch.nn.Module(), x, x, x, None, **{name: None})


def test_a_mask_of_another_rank_raises():
    x = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"^attention_mask: has shape \(1, 3\)"):
        attention_forward(torch.nn.Module(), x, x, x, torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(("of_module", "given"), [(True, None), (False, None), (False, True), (True, False)])
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 5), (1, 5), (3, 5)])
def test_no_mask_follows_sdpa(of_module, given, q_len, k_len):
    module = torch.nn.Module()
    module.is_causal = of_module
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (q_len, k_len, k_len))
    ours = attention_forward(module, q, k, v, None, is_causal=given)[0]
    theirs = sdpa_attention_forward(module, q, k, v, None, is_causal=given)[0]
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_batch_of_learned_queries():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(2, 4, 5, 8, generator=generator)
    ours = attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)[0]
    theirs = attention_forward(torch.nn.Module(), q.expand(2, -1, -1, -1), k, k, None, is_causal=False)[0]
    assert torch.equal(ours, theirs)


def test_a_sink_for_each_row():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(2, 4, 5, 1, generator=generator, requires_grad=True)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    found = attention_forward(torch.nn.Module(), q, k, v, None, sinks=sinks)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight, wanted = torch.randn(found.shape, generator=generator), (q, k, v, sinks)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), wanted) for out in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_keys_chosen_for_each_query():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 1, 9, 8, generator=generator)
    indices = torch.rand(2, 5, 9, generator=generator).topk(3).indices
    chosen = torch.zeros(2, 1, 5, 9, dtype=torch.bool).scatter(-1, indices[:, None], True)
    seen = torch.rand(2, 1, 5, 9, generator=generator) < 0.7
    module = torch.nn.Module()
    for mask, both in ((seen, seen & chosen), (torch.ones_like(seen), chosen)):
        found = attention_forward(module, q, k, k, mask, indices=indices)[0]
        assert torch.equal(found, attention_forward(module, q, k, k, both)[0])
