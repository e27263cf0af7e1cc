"""Models of transformers on tilewise: the same embeddings, tokens and gradients as with their own attention."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.random_models import build  # noqa: E402

from tilewise.torch.integrations.transformers import register  # noqa: E402

register()
register()  # again, to no effect

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 4}


def llama():
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER)


def mistral():
    return transformers.MistralForCausalLM, transformers.MistralConfig(**DECODER, sliding_window=5)


def gemma2():
    config = transformers.Gemma2Config(
        **DECODER, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=7
    )
    return transformers.Gemma2ForCausalLM, config


def gpt_oss():
    config = transformers.GptOssConfig(**DECODER, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM, config


def llama4():
    config = transformers.Llama4TextConfig(
        **DECODER, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=6
    )
    return transformers.Llama4ForCausalLM, config


DECODERS = [llama, mistral, gemma2, gpt_oss, llama4]


def bert():
    config = transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    return transformers.BertModel, config


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=None, relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration, config


def bart():
    config = transformers.BartConfig(
        vocab_size=97, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        eos_token_id=None, forced_eos_token_id=None, pad_token_id=0, bos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration, config


def run(model, implementation: str, **inputs):
    model.set_attn_implementation(implementation)
    return model(**inputs)


def batch(rows: int = 3, length: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, rows: int = 3, length: int = 17) -> dict[str, torch.Tensor]:
    """Token ids (rows, length) and their padding mask, with 0, 4 and 9 tokens of padding on a side, or gaps."""
    ids, real = batch(rows, length), torch.ones(rows, length, dtype=torch.int64)
    for row, missing in zip(range(rows), (0, 4, 9), strict=False):
        if side in ("right", "both"):
            real[row, length - missing :] = 0
        if side in ("left", "both"):
            real[row, : missing // (2 if side == "both" else 1)] = 0
        if side == "gaps":
            real[row, 3 : 3 + missing] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, where: torch.Tensor | None = None) -> None:
    """Equal to float32's rounding through a few layers; `where` (B, S) picks the tokens that count."""
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def assert_same_gradient(ours: torch.Tensor, theirs: torch.Tensor, name: str | None = None) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, float(theirs.abs().max())), msg=name)


@pytest.mark.parametrize("side", ["right", "left", "both", "gaps"])
@pytest.mark.parametrize("stock", ["eager", "sdpa"])
def test_encoder_with_padding(side, stock):
    model, inputs = build(bert), padded(side)
    with torch.no_grad():
        ours = run(model, "tilewise", **inputs).last_hidden_state
        theirs = run(model, stock, **inputs).last_hidden_state
    assert_same(ours, theirs, inputs["attention_mask"])


def test_padding_is_not_attended():
    model, inputs = build(bert), padded("right")
    changed = dict(inputs, input_ids=inputs["input_ids"] + 50 * (1 - inputs["attention_mask"]))
    with torch.no_grad():
        ours = run(model, "tilewise", **inputs).last_hidden_state
        other = run(model, "tilewise", **changed).last_hidden_state
        for row, real in enumerate(inputs["attention_mask"].sum(1).tolist()):
            assert torch.equal(ours[row, :real], other[row, :real])
            alone = run(model, "tilewise", input_ids=inputs["input_ids"][row : row + 1, :real]).last_hidden_state
            assert_same(ours[row, :real], alone[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("recipe", DECODERS)
def test_decoder_with_padding(recipe, side):
    model, inputs = build(recipe), padded(side)
    with torch.no_grad():
        ours = run(model, "tilewise", **inputs).logits
        theirs = run(model, "eager", **inputs).logits
    assert_same(ours, theirs, inputs["attention_mask"])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("recipe", DECODERS)
def test_generation_token_for_token(recipe, cache):
    model, inputs = build(recipe), padded("left")
    options = {"max_new_tokens": 14, "do_sample": False, "use_cache": cache is not None}
    if cache == "static":
        options["cache_implementation"] = "static"
    tokens = []
    for implementation in ("tilewise", "eager"):
        model.set_attn_implementation(implementation)
        tokens.append(model.generate(**inputs, **options))
    assert tokens[0].shape == (3, 17 + 14)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("recipe", [t5, bart])
def test_encoder_decoder_generation(recipe):
    model, inputs = build(recipe), padded("right")
    tokens = []
    for implementation in ("tilewise", "eager"):
        model.set_attn_implementation(implementation)
        tokens.append(model.generate(**inputs, max_new_tokens=10, do_sample=False))
    assert torch.equal(*tokens)
    labels = batch(3, 11, seed=5)
    with torch.no_grad():
        ours, theirs = (run(model, name, **inputs, labels=labels).logits for name in ("tilewise", "eager"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("recipe", [llama, gemma2])
def test_chunked_prefill_equals_one_prefill(recipe):
    model, ids = build(recipe), batch()
    with torch.no_grad():
        whole = run(model, "tilewise", input_ids=ids).logits
        cache, parts = None, []
        for piece in ids.split([6, 7, 4], dim=1):
            answer = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            parts.append(answer.logits)
    assert_same(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("recipe", [llama, mistral])
def test_packed_sequences_do_not_see_each_other(recipe):
    model, ids = build(recipe), batch(1, 21)
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None]
    with torch.no_grad():
        packed = run(model, "tilewise", input_ids=ids, position_ids=positions, use_cache=False).logits
        first, second = (model(input_ids=part).logits for part in ids.split([8, 13], dim=1))
    assert_same(packed, torch.cat([first, second], 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own(dtype):
    model, ids = build(llama), batch()
    seen = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(2)) < 0.5
    seen |= torch.eye(17, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        ours = run(model, "tilewise", input_ids=ids, attention_mask=seen if dtype == torch.bool else added).logits
        theirs = run(model, "eager", input_ids=ids, attention_mask=added).logits
    assert_same(ours, theirs)


@pytest.mark.parametrize("recipe", [bert, gemma2, gpt_oss, t5])
def test_gradients(recipe):
    inputs = padded("right")
    if recipe is t5:
        inputs["labels"] = batch(3, 11, seed=5)
    gradients = []
    for implementation in ("tilewise", "eager"):
        model = build(recipe)
        answer = run(model, implementation, **inputs)[0]
        weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(3))
        counted = inputs["attention_mask"][..., None] if answer.ndim == 3 and answer.shape[1] == 17 else 1
        (answer * weights * counted).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, theirs in gradients[1].items():
        ours = gradients[0][name]
        if theirs is None:
            assert ours is None
            continue
        assert_same_gradient(ours, theirs, name)
    if recipe is gpt_oss:
        assert any(float(grad.abs().max()) > 0 for name, grad in gradients[0].items() if "sinks" in name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    plain, saving = build(gemma2), build(gemma2)
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        run(model.train(), "tilewise", **padded("right"), use_cache=False).logits.square().sum().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.grad.abs().max()))
        )


def test_dropout_in_training():
    kind, config = bert()
    config.attention_probs_dropout_prob, config._attn_implementation = 0.3, "tilewise"
    torch.manual_seed(0)
    model, inputs = kind(config), padded("right")
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(model.train()(**inputs).last_hidden_state)
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])
    assert not torch.allclose(answers[0], model.eval()(**inputs).last_hidden_state)
    answers[2].sum().backward()


def test_autocast():
    model, inputs = build(llama), padded("left")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(model, "tilewise", **inputs).logits
        theirs = run(model, "sdpa", **inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real].float(), theirs[real].float(), rtol=0.1, atol=0.1)


def test_output_attentions_raises_as_transformers_documents():
    model = build(bert)
    model.set_attn_implementation("tilewise")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"^output_attentions: "):
        model(**padded("right"), output_attentions=True)
