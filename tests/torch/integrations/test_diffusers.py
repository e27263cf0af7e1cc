"""Models of diffusers on tilewise: the same pictures and gradients as with their own attention."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: nothing here needs a network

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.models import attention_processor as theirs  # noqa: E402
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn  # noqa: E402

from tilewise.torch.integrations import diffusers as ours  # noqa: E402
from tilewise.torch.integrations.diffusers import attention as module  # noqa: E402

ROWS, WORDS = 2, 9


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def some_words() -> torch.Tensor:
    """Which words are real: all of the first row, five of the second."""
    real = torch.ones(ROWS, WORDS, dtype=torch.bool)
    real[1, 5:] = False
    return real


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return (
        model,
        (noise(ROWS, 4, 8, 8), torch.tensor([3, 7]), noise(ROWS, WORDS, 12)),
        {"encoder_attention_mask": some_words()},
    )


def unet_added_kv():
    """As in Kandinsky and DeepFloyd: the words' keys and values are put before those of the picture."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"), attention_head_dim=4,
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    return model, (noise(ROWS, 4, 8, 8), torch.tensor([3, 7]), noise(ROWS, WORDS, 12)), {}


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, (noise(ROWS, 4, 8, 8),), {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    return model, (noise(ROWS, 4, 8, 8), noise(ROWS, WORDS, 12)), {
        "timestep": torch.tensor([3, 7]), "encoder_attention_mask": some_words(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sd3():
    """Joint attention: words and picture attend to one another in one call."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return model, (noise(ROWS, 4, 8, 8), noise(ROWS, WORDS, 12), noise(ROWS, 16), torch.tensor([3, 7])), {}


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, (noise(ROWS, 16, 4), noise(ROWS, WORDS, 12), noise(ROWS, 16), torch.tensor([0.3, 0.7])), {
        "img_ids": noise(16, 3).abs(), "txt_ids": torch.zeros(WORDS, 3)
    }  # fmt: skip


def wan():
    """Video, by the dispatcher."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, (noise(ROWS, 4, 2, 8, 8), torch.tensor([3, 7]), noise(ROWS, WORDS, 12)), {}


def vae():
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    return model, (noise(ROWS, 3, 8, 8),), {}


MODELS = [unet, unet_added_kv, dit, pixart, sd3, flux, wan, vae]


def build(recipe):
    torch.manual_seed(0)
    model, positional, named = recipe()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.2)
    return model.eval(), positional, named


def trained(model, positional, named):
    """The answer, and the gradients of all weights."""
    model.zero_grad()
    out = model(*positional, **named).sample
    (out * noise(*out.shape)).sum().backward()
    return out.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))
    most = max(float(x.abs().max()) for x in expected[1].values())
    for name, x in expected[1].items():
        torch.testing.assert_close(found[1][name], x, rtol=1e-3, atol=1e-5 * most, msg=name)


@pytest.fixture
def calls(monkeypatch):
    """How often tilewise was called."""
    count = []
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **given: (count.append(1), attention(*args, **given))[1])
    return count


@pytest.mark.parametrize("recipe", MODELS)
def test_same_answers_and_gradients(recipe, calls):
    model, *given = build(recipe)
    expected = trained(model, *given)
    names = [*model.state_dict()]
    layers = ours.use(model)
    assert_same(trained(model, *given), expected)
    assert len(calls) >= len(layers) > 0
    assert [*model.state_dict()] == names
    assert ours.use(model) == layers  # again, to no effect
    ours.stop(model)
    calls.clear()
    again = trained(model, *given)
    assert torch.equal(again[0], expected[0])
    assert not calls


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch's norms, with any attention
@pytest.mark.parametrize("recipe", [unet, sd3, flux])
def test_autocast(recipe):
    model, *given = build(recipe)
    found = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for change in (lambda model: None, ours.use):
            change(model)
            found.append(model(*given[0], **given[1]).sample)
    assert found[0].dtype == found[1].dtype
    scale = float(found[0].abs().max())
    torch.testing.assert_close(found[1].float(), found[0].float(), rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("kind", [theirs.AttnProcessor, theirs.SlicedAttnProcessor])
def test_processors_that_make_the_matrix(kind, calls):
    model, *given = build(unet)
    model.set_attn_processor(kind(2) if kind is theirs.SlicedAttnProcessor else kind())
    expected = trained(model, *given)
    ours.use(model)
    assert_same(trained(model, *given), expected)
    assert calls
    ours.stop(model)
    assert all(type(processor) is kind for processor in model.attn_processors.values())


def test_a_layers_own_scale_is_kept(calls):
    torch.manual_seed(0)
    layer = theirs.Attention(query_dim=16, heads=2, dim_head=8, scale_qk=False)
    assert type(layer.processor) is theirs.AttnProcessor
    x = noise(2, 5, 16)
    expected = layer(x)
    assert ours.use(layer) == [""]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert calls


def test_processors_by_hand(calls):
    model, *given = build(unet)
    expected = trained(model, *given)
    model.set_attn_processor(ours.AttnProcessor())
    assert_same(trained(model, *given), expected)
    assert len(calls) == 8
    model.fuse_qkv_projections()
    model.set_attn_processor(ours.FusedAttnProcessor())
    torch.testing.assert_close(model(*given[0], **given[1]).sample, expected[0], rtol=1e-3, atol=1e-4)
    assert len(calls) == 16


def test_arguments_reach_the_processor_that_it_stands_for():
    class Doubling(theirs.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, factor=1.0):
            q = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
            return factor * torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(-2)

    layer = theirs.Attention(query_dim=16, heads=2, dim_head=8, processor=Doubling())
    x = noise(2, 5, 16)
    expected = layer(x, factor=2.0)
    ours.use(layer)
    torch.testing.assert_close(layer(x, factor=2.0), expected, rtol=1e-4, atol=1e-5)


def test_by_the_dispatchers_own_name(calls):
    assert ours.register() is ours.register()
    model, *given = build(flux)
    expected = model(*given[0], **given[1]).sample
    with attention_backend("tilewise"):
        found = model(*given[0], **given[1]).sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("mask", ["keys", "pairs", "added", None])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_dispatcher(mask, is_causal):
    backend = ours.register()
    q, k, v = noise(2, 5, 4, 8), noise(2, 7, 2, 8), noise(2, 7, 2, 6)
    seen = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    seen[..., 0] = True
    given = {"keys": seen[:, 0, 0], "pairs": seen, "added": noise(2, 4, 5, 7), None: None}[mask]
    if is_causal and mask is not None:  # torch knows no mask beside is_causal
        below = torch.ones(5, 7, dtype=torch.bool).tril()
        whole = given[:, None, None] if mask == "keys" else given
        both = whole.masked_fill(~below, -torch.inf) if mask == "added" else whole & below
        expected = dispatch_attention_fn(q, k, v, attn_mask=both, enable_gqa=True)
    else:
        expected = dispatch_attention_fn(q, k, v, attn_mask=given, is_causal=is_causal, enable_gqa=True)
    found = dispatch_attention_fn(q, k, v, attn_mask=given, is_causal=is_causal, enable_gqa=True, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    out, lse = dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True}, backend=backend)
    assert (out.shape, lse.shape) == ((2, 5, 4, 6), (2, 5, 4))


def test_dropout_is_torchs_to_seed():
    backend, q = ours.register(), noise(1, 6, 2, 8)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dispatch_attention_fn(q, q, q, dropout_p=0.5, backend=backend))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_context_parallelism_is_refused():
    q = noise(1, 6, 2, 8)
    with pytest.raises(ValueError, match="^_parallel_config: "):
        dispatch_attention_fn(q, q, q, backend=ours.register(), parallel_config=object())


def test_what_cannot_be_moved_raises():
    with pytest.raises(ValueError, match="^model: Linear has no attention layer"):
        ours.use(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^kind: SanaLinearAttnProcessor2_0"):
        ours.on_tilewise(theirs.SanaLinearAttnProcessor2_0)


def test_compiled_whole():
    model, *given = build(dit)
    ours.use(model)
    with torch.no_grad():
        expected = model(*given[0], **given[1]).sample
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(*given[0], **given[1]).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
