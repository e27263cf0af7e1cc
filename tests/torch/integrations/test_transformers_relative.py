"""T5's relative bias as a table: the same numbers and gradients, and no matrix over all pairs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.largest import Largest  # noqa: E402

from tilewise.torch.integrations.transformers import linear_biases, register  # noqa: E402
from tilewise.torch.integrations.transformers.relative import RelativeBias  # noqa: E402

register()

SMALL = {
    "vocab_size": 97, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}  # fmt: skip
FAMILIES = {
    "T5": {}, "MT5": {}, "UMT5": {}, "SwitchTransformers": {"num_decoder_layers": 2, "num_experts": 2},
}  # fmt: skip


def build(family: str = "T5"):
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    config._attn_implementation = "tilewise"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.2)
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = torch.ones(3, 17, dtype=torch.int64)
    real[1, 9:] = 0
    ids, labels = (torch.randint(2, 97, (3, length), generator=generator) for length in (17, 11))
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def trained(model):
    model.zero_grad()
    answer = model(**inputs(), use_cache=False)
    answer.loss.backward()
    return answer.logits, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5 * float(expected[0].detach().abs().max()))
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        most = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4 * most, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_and_gradients(family):
    model = build(family)
    expected = trained(model)
    names = [*model.state_dict()]
    assert linear_biases(model) == linear_biases(model) == 6  # again, to no effect
    assert_same(trained(model), expected)
    assert [*model.state_dict()] == names
    model.set_attn_implementation("eager")
    assert_same(trained(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = build().train()
    expected = trained(model)
    linear_biases(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(trained(model), expected)


def test_nothing_quadratic_is_made():
    length = 600
    model, ids = build(), torch.randint(2, 97, (1, length))
    found = []
    for change in (lambda model: None, linear_biases):
        change(model)
        with Largest() as largest:
            model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits.sum().backward()
        found.append(largest.elements)
    assert found[0] >= 4 * length * length
    assert found[1] < length * length / 4


class TestRelativeBias:
    """It is a tensor to whoever looks, and becomes elements, with their gradient, for whoever computes."""

    def layer(self):
        model = build()
        linear_biases(model)
        return model.encoder.block[0].layer[0].SelfAttention

    def test_looks_like_a_tensor(self):
        layer = self.layer()
        bias = layer.compute_bias(5, 9, past_seen_tokens=4)
        assert isinstance(bias, RelativeBias)
        assert (bias.shape, bias.ndim, bias.dtype, bias.device.type) == ((1, 4, 5, 9), 4, torch.float32, "cpu")
        assert "RelativeBias" in repr(bias)

    def test_elements_are_the_tables(self):
        bias = self.layer().compute_bias(5, 9, past_seen_tokens=4)
        table = bias.table()
        assert table.shape == (4, 13)
        i, j = torch.arange(5)[:, None], torch.arange(9)
        assert torch.equal(table[:, j - i + 4][None], bias.dense())

    def test_computing_gives_elements_and_their_gradient(self):
        layer = self.layer()
        bias = layer.compute_bias(5, 9)
        for found in (
            bias[:, :, 1:] + 1,
            bias.float() * 2,
            torch.cat([bias, bias], -1),
            bias.mT,
            torch.softmax(bias, -1),
        ):
            assert type(found) is torch.Tensor
            (gradient,) = torch.autograd.grad(found.square().sum(), layer.relative_attention_bias.weight)
            assert gradient.abs().max() > 0


def test_a_model_without_such_layers_raises():
    with pytest.raises(ValueError, match="^model: Linear has no layer"):
        linear_biases(torch.nn.Linear(2, 2))
