"""No family makes an array of all pairs of tokens; and decoders compile whole."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.largest import Largest  # noqa: E402

from tilewise.torch.integrations.transformers import register  # noqa: E402

register()

LENGTH = 1024
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MODELS = {
    "BertModel": SIZES, "LlamaForCausalLM": GROUPED, "Qwen2ForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 50}, "Phi3ForCausalLM": GROUPED,
    "Gemma2ForCausalLM": {**GROUPED, "sliding_window": 50},
    "Gemma3ForCausalLM": {**GROUPED, "sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOssForCausalLM": {**GROUPED, **EXPERTS, "sliding_window": 50},
    "Llama4ForCausalLM": {**GROUPED, **EXPERTS, "attention_chunk_size": 100, "intermediate_size_mlp": 32},
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH},
    "OPTForCausalLM": {
        "vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": LENGTH, "word_embed_proj_dim": 16,
    },
    "ModernBertModel": {**SIZES, "local_attention": 64, "global_attn_every_n_layers": 2},
    "DeepseekV3ForCausalLM": {
        **SIZES, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "n_group": 1,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "topk_group": 1,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip


def build(name: str, **changes):
    kind = getattr(transformers, name)
    config = kind.config_class(**{**MODELS[name], **changes})
    config._attn_implementation = "tilewise"
    torch.manual_seed(0)
    return kind(config)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_quadratic(name, padding):
    model = build(name).eval()
    real = torch.ones(1, LENGTH, dtype=torch.int64)
    if padding:
        real[:, slice(100) if padding == "left" else slice(LENGTH - 100, None)] = 0
    ids = torch.randint(3, 64, (1, LENGTH))
    with Largest() as largest:
        model(input_ids=ids, attention_mask=real if padding else None)[0].sum().backward()
    assert largest.elements <= LENGTH * LENGTH // 8


def test_stock_is_quadratic():
    model = build("LlamaForCausalLM")
    model.set_attn_implementation("eager")
    with Largest() as largest:
        model(input_ids=torch.ones(1, LENGTH, dtype=torch.int64))
    assert largest.elements >= LENGTH * LENGTH


@pytest.fixture
def fresh_compiler():
    """Programs of other tests count against the number of times that the same code may be compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("LlamaForCausalLM", True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("LlamaForCausalLM", "GPT2LMHeadModel")),
        *(pytest.param("Gemma3ForCausalLM", dynamic, marks=pytest.mark.slow) for dynamic in (False, True)),
    ],
)
def test_compiled_whole(name, dynamic):
    model = build(name, **({"num_hidden_layers": 1} if name.startswith("Llama") else {})).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (19, 33):
        real = torch.ones(2, length, dtype=torch.int64)
        real[1, :5] = 0
        ids = torch.randint(3, 64, (2, length))
        found = []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(input_ids=ids, attention_mask=real, use_cache=False).logits
            logits[real.bool()].square().sum().backward()
            found.append([logits.detach()[real.bool()], *(w.grad for w in model.parameters() if w.grad is not None)])
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_dropout():
    model = build("LlamaForCausalLM", num_hidden_layers=1).train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, found = torch.randint(3, 64, (2, 19)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(compiled(input_ids=ids, use_cache=False).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
