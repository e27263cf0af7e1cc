"""Every family of models in transformers that takes attention by name: as with its own, forward, backward, generating.

Models are made from their configurations' own defaults, made small, with random weights. A few families run each time,
all others with `pytest -m slow`; there, a family that this recipe cannot make, or whose attention cannot be chosen, is
skipped and says why.
"""

from __future__ import annotations

import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a network

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.auto import modeling_auto as auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402

from tilewise.torch.integrations.transformers import register  # noqa: E402

register()

FAST = [
    "albert", "apertus", "bart", "beit", "bitnet", "clip_vision_model", "cohere2", "diffllama", "distilbert",
    "electra", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "helium",
    "internlm3", "jetmoe", "llama", "m2m_100", "mistral", "mixtral", "modernbert", "olmo2", "opt", "persimmon", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "smollm3", "stablelm", "starcoder2", "t5", "vit",
    "wav2vec2", "whisper",
]  # fmt: skip

_WIDTH = ["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "projection_dim"]
_INNER = ["intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"]
_DEPTH = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"]
_DEPTH += ["num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"]
_HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"]
_EXPERTS = ["num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"]
_PLACES = ["max_position_embeddings", "max_source_positions", "max_target_positions", "n_positions"]
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_SPEECH = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
_SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_mel_bins": 16, "layerdrop": 0.0}
SMALL = {
    **dict.fromkeys(_WIDTH, 32), **dict.fromkeys(_INNER, 48), **dict.fromkeys(_DEPTH, 2), **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_EXPERTS, 2), **dict.fromkeys(_PLACES, 64), **_LATENT, **_SPEECH,
    "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "sliding_window": 5,
    "attention_chunk_size": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "image_size": 32, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# Some families tie sizes together in ways of their own: what not to make small, tried in turn.
SPARED = (
    [],
    ["head_dim"],
    ["head_dim", "num_key_value_heads"],
    ["patch_size", "image_size"],
    ["projection_dim"],
    [*_LATENT, "head_dim"],
    _EXPERTS,
    [*_SPEECH],
)


def smaller(config, spared) -> dict:
    """The arguments that make a configuration's twin small, configurations inside it included."""
    given = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            given[name] = {**smaller(value, spared), "model_type": value.model_type}
        elif isinstance(value, dict) and "mrope_section" in value:
            given[name] = {**value, "mrope_section": [2, 1, 1]}
        elif name in SMALL and name not in spared and isinstance(value, bool | list) is isinstance(SMALL[name], list):
            if value is not None or name.endswith("_token_id"):
                given[name] = SMALL[name]
        elif isinstance(value, float) and "drop" in name:
            given[name] = 0.0
    return given | fewer_layers(config)


def fewer_layers(config) -> dict:
    """Where layers are listed, one of each kind, and two at least."""
    depth = vars(config).get("num_hidden_layers")
    lists = {name: x for name, x in vars(config).items() if isinstance(x, list) and x and len(x) == depth}
    kinds = {name: [kind for n, kind in enumerate(x) if kind not in x[:n]] for name, x in lists.items()}
    fewer = max([2, *map(len, kinds.values())])
    return {name: (x * fewer)[:fewer] for name, x in kinds.items()} | ({"num_hidden_layers": fewer} if lists else {})


def make(family: str):
    """A small random model of a family and inputs for it; with its own attention it runs."""
    kind, config_kind = kind_of(family)
    reason = None
    for spared in SPARED:
        try:
            config = config_kind(**smaller(config_kind(), spared))
            config._attn_implementation = "eager"
            with torch.device("meta"):
                size = sum(weight.numel() for weight in kind(config).parameters())
            if size > 5_000_000:
                raise ValueError(f"{size} weights")
            torch.manual_seed(0)
            model = kind(config).eval()
            spread(model)
            inputs = inputs_of(model)
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    pytest.skip(f"the recipe does not make {family}: {reason}"[:200])


def kind_of(family: str):
    """The class of models and that of configurations of a family, a language model where there is one."""
    for names in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ):
        if family in names:
            name = names[family] if isinstance(names[family], str) else names[family][0]
            try:
                kind = getattr(transformers, name)
                inspect.signature(kind.forward)
                return kind, getattr(transformers, CONFIG_MAPPING_NAMES[family])
            except (ImportError, AttributeError) as error:
                pytest.skip(f"{name} needs what is not installed: {error}"[:200])
    raise LookupError(family)


def spread(model) -> None:
    """Weights large enough that attention is not uniform."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0.0, 0.2)
            elif "sink" in name or not weight.isfinite().all():
                weight.normal_()


def inputs_of(model, rows: int = 2, length: int = 14) -> dict[str, torch.Tensor]:
    """What the model takes: token ids with the second row padded on the right, pictures or sound."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    taken, main = inspect.signature(model.forward).parameters, model.main_input_name
    inputs = {}
    if main == "input_ids":
        real = torch.ones(rows, length, dtype=torch.int64)
        real[1, length - 5 :] = 0
        inputs |= {"input_ids": torch.randint(5, 90, (rows, length), generator=generator), "attention_mask": real}
    if main == "pixel_values" or ("pixel_values" in taken and hasattr(config, "projection_dim")):
        vision = getattr(config, "vision_config", config)
        size = (rows, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(size, generator=generator)
    if main == "input_values":
        inputs["input_values"] = torch.randn(rows, 400, generator=generator)
    if main == "input_features":
        inputs["input_features"] = torch.randn(rows, config.num_mel_bins, 128, generator=generator)
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = torch.randint(5, 90, (rows, 7), generator=generator)
    return inputs


def floats(value, path: str = ""):
    """The tensors of floats in a model's answer, by name; without caches and probabilities."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield path, value
    elif hasattr(value, "items"):
        for name, part in value.items():
            if name not in ("past_key_values", "attentions"):
                yield from floats(part, f"{path}.{name}")
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from floats(part, f"{path}[{number}]")


def answers(model, inputs) -> dict[str, torch.Tensor]:
    """The answers at real tokens; a few models hide parts of their input at random."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # theirs
    real = inputs.get("attention_mask")
    found = dict(floats(model(**inputs)))
    return {name: x[real.bool()] if real is not None and x.shape[:2] == real.shape else x for name, x in found.items()}


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in answers(model, inputs).values())
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def tokens(model, inputs) -> torch.Tensor:
    """Six tokens generated after prompts that are padded on the left."""
    inputs = {name: x.flip(1) if name == "attention_mask" else x for name, x in inputs.items()}
    inputs.pop("decoder_input_ids", None)
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def compare(family: str) -> None:
    model, inputs = make(family)
    model.set_attn_implementation("tilewise")
    if model.config._attn_implementation != "tilewise":
        pytest.skip(f"transformers lets nobody choose the attention of {family}")
    assert_close(answers, model, inputs, 1e-4)
    assert_close(gradients, model.train(), inputs, 2e-3)
    model.eval()
    if model.can_generate() and "input_ids" in inputs and generates(model, inputs):
        found = [tokens(on(model, name), inputs) for name in ("eager", "tilewise")]
        assert torch.equal(*found), f"{family} generates other tokens"


def generates(model, inputs) -> bool:
    """Whether the model generates with its own attention; some only do so with inputs of their own."""
    try:
        tokens(on(model, "eager"), inputs)
    except Exception:
        return False
    return True


def on(model, implementation: str):
    model.set_attn_implementation(implementation)
    return model


def assert_close(function, model, inputs, tolerance: float) -> None:
    """Equal to `tolerance` times the largest element of each tensor, and to the rounding of the largest of all."""
    theirs, ours = (function(on(model, name), inputs) for name in ("eager", "tilewise"))
    assert theirs.keys() == ours.keys()
    most = max(map(largest, theirs.values()))
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance * largest(expected) + 1e-5 * most, equal_nan=True,
            msg=lambda text, name=name: f"{function.__name__}{name}: {text}",
        )  # fmt: skip


def largest(x: torch.Tensor) -> float:
    finite = x.detach()[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


@pytest.mark.parametrize("family", FAST)
def test_as_stock(family):
    compare(family)


def test_where_transformers_takes_no_attention_it_keeps_its_own():
    model, inputs = make("deberta")
    before = answers(model, inputs)
    model.set_attn_implementation("tilewise")
    assert model.config._attn_implementation == "eager"
    after = answers(model, inputs)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", sorted(set(auto.MODEL_MAPPING_NAMES) & set(CONFIG_MAPPING_NAMES) - set(FAST)))
def test_as_stock_everywhere(family):
    compare(family)
