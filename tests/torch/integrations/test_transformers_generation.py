"""Generation token for token as with transformers' own attention, by every strategy and with every cache."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.random_models import build  # noqa: E402

from tilewise.torch.integrations.transformers import linear_biases, register  # noqa: E402

register()

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
STRATEGIES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}
CACHES = {"none": {"use_cache": False}, "dynamic": {}, "static": {"cache_implementation": "static"}}


def qwen2():
    return transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SMALL)


def qwen3_sliding():
    config = transformers.Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return transformers.Qwen3ForCausalLM, config


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**SMALL, sliding_window=5, layer_types=kinds)


def latent():
    """DeepSeek's attention: keys of width 16, values of width 12."""
    sizes = {name: x for name, x in SMALL.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(
        **sizes, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM, config


def chosen_keys():
    """Each query sees the five keys that its indexer chose."""
    _, config = latent()
    config = transformers.DeepseekV32Config(
        **{**config.to_dict(), "index_topk": 5, "index_n_heads": 2, "index_head_dim": 16}
    )
    return transformers.DeepseekV32ForCausalLM, config


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration, config


DECODERS = [qwen2, qwen3_sliding, gemma3, latent]


def prompts(side: str = "left") -> dict[str, torch.Tensor]:
    """Three rows of 13 tokens with 0, 3 and 7 of padding."""
    real = torch.ones(3, 13, dtype=torch.int64)
    for row, missing in enumerate((0, 3, 7)):
        real[row, slice(missing) if side == "left" else slice(13 - missing, None)] = 0
    ids = torch.randint(2, 97, (3, 13), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * real, "attention_mask": real}


def same_tokens(model, inputs, **options) -> torch.Tensor:
    """The tokens, which have to be stock's."""
    found = []
    for implementation in ("tilewise", "eager"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(7)
        found.append(model.generate(**inputs, max_new_tokens=10, **options))
    assert torch.equal(*found)
    return found[0]


def crossings():
    """Every decoder with every strategy, each time with another cache; the other caches when asked for."""
    for r, recipe in enumerate(DECODERS):
        for s, strategy in enumerate(STRATEGIES):
            for c, cache in enumerate(CACHES):
                marks = [] if c == (r + s) % 3 else [pytest.mark.slow]
                yield pytest.param(recipe, strategy, cache, marks=marks, id=f"{recipe.__name__}-{strategy}-{cache}")


@pytest.mark.parametrize(("recipe", "strategy", "cache"), [*crossings()])
def test_decoders(recipe, strategy, cache):
    found = same_tokens(build(recipe), prompts(), **STRATEGIES[strategy], **CACHES[cache])
    assert found.shape == (3, 13 + 10)


def test_keys_chosen_by_the_model():
    same_tokens(build(chosen_keys), prompts(), do_sample=False)


def test_a_small_model_assists_a_large_one():
    model, assistant = build(qwen2), build(qwen2, seed=1)
    alone = prompts()
    alone = {name: x[:1] for name, x in alone.items()}  # assistance takes one row
    plain = same_tokens(model, alone, do_sample=False)
    assistant.set_attn_implementation("tilewise")
    assisted = same_tokens(model, alone, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("linear", [False, True])
def test_encoder_decoder(strategy, linear):
    model = build(t5)
    if linear:
        linear_biases(model)
    same_tokens(model, prompts("right"), **STRATEGIES[strategy], **CACHES["static" if linear else "dynamic"])


def test_speech_to_text():
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_mel_bins=16,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=64, pad_token_id=0,
        max_target_positions=64, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = build(lambda: (transformers.WhisperForConditionalGeneration, config))
    model.generation_config.eos_token_id = None
    sound = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(2))
    for strategy in ("greedy", "beams"):
        same_tokens(model, {"input_features": sound}, **STRATEGIES[strategy])
