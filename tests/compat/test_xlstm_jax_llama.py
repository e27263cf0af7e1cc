"""xlstm-jax's Llama attention: what its text and its tests state, on one device."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nn = pytest.importorskip("flax.linen")

import jax.numpy as jnp  # noqa: E402
from accuracy import assert_accurate  # noqa: E402
from flax import serialization  # noqa: E402

from tilewise.compat.xlstm_jax_llama import (  # noqa: E402
    ParallelConfig,
    SelfAttention,
    SelfAttentionConfig,
    apply_rotary_emb,
    multihead_attention,
    precompute_freqs,
    segment_mask,
)

B, S, NH, DH = 2, 12, 6, 8
WIDTH = NH * DH
BACKENDS = ["xla", "pallas_triton", "triton", "cudnn", "portable"]


def arrays(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def formula(q, k, v, seen, scale):
    """float64, (B, S, NH, D)."""
    q, k, v = (np.asarray(x, "float64").swapaxes(1, 2) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = np.where(seen, np.exp(scale * q @ k.swapaxes(-1, -2)), 0.0)
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)


def causal(rows, columns):
    return np.arange(columns) <= np.arange(rows)[:, None]


IDS = np.random.default_rng(5).integers(0, 2, (B, S))


class TestRotary:
    def test_tables(self):
        sin, cos = precompute_freqs(DH, max_length=5, theta=100.0)
        angles = np.arange(5)[:, None] * 100.0 ** (-2 * np.arange(DH // 2) / DH)
        assert sin.shape == cos.shape == (1, 5, DH // 2) and sin.dtype == jnp.float32
        np.testing.assert_allclose(sin[0], np.sin(angles), atol=1e-6)
        np.testing.assert_allclose(cos[0], np.cos(angles), atol=1e-6)

    def test_positions_win_over_a_length(self):
        positions = jnp.asarray([[3, 0, 1], [7, 7, 2]])
        sin, cos = precompute_freqs(DH, positions, max_length=99, dtype=jnp.bfloat16)
        whole = precompute_freqs(DH, max_length=8)
        assert sin.shape == (2, 3, DH // 2) and sin.dtype == cos.dtype == jnp.bfloat16
        assert jnp.array_equal(sin, whole[0][0][positions].astype(jnp.bfloat16))

    def test_neither(self):
        with pytest.raises(AssertionError, match="^pos_idx: "):
            precompute_freqs(DH)

    def test_odd_widths_floor(self):
        assert precompute_freqs(7, max_length=2)[0].shape == (1, 2, 3)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_pairs_are_interleaved_and_counted_along_the_sequence(self, dtype):
        q, k = arrays((B, S, NH, DH), (B, S, 2, DH), dtype=dtype)
        turned = apply_rotary_emb(q, k)
        angles = np.arange(S)[:, None, None] * 10000.0 ** (-2 * np.arange(DH // 2) / DH)
        for name, x, got in zip("qk", (q, k), turned, strict=True):
            pairs = np.asarray(x, "float64").reshape(*x.shape[:3], DH // 2, 2)
            z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
            exact = np.stack([z.real, z.imag], -1).reshape(x.shape)
            assert got.dtype == dtype
            assert_accurate(name, got, exact)
        for got, same in zip(apply_rotary_emb(q, k, *precompute_freqs(DH, max_length=S)), turned, strict=True):
            assert jnp.array_equal(got, same)

    def test_wrong_tables(self):
        q = jnp.ones((B, S, NH, DH))
        with pytest.raises(ValueError, match="^freqs_sin: "):
            apply_rotary_emb(q, q, *precompute_freqs(DH, max_length=S + 1))
        with pytest.raises(ValueError, match="^xq: "):
            apply_rotary_emb(q[..., :7], q)


def test_segment_mask():
    mask = segment_mask(jnp.asarray([[1, 2, 1]]))
    assert mask.dtype == jnp.bool_ and mask.shape == (1, 1, 3, 3)
    assert np.asarray(mask)[0, 0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


class TestMultiheadAttention:
    @pytest.mark.parametrize("segment_ids", [None, IDS])
    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_values(self, segment_ids, is_causal, backend):
        q, k, v = arrays((B, S, NH, DH), (B, S, 2, DH), (B, S, 2, 5))
        seen = np.ones((B, 1, S, S), bool) if segment_ids is None else np.asarray(segment_mask(segment_ids))
        seen = seen & causal(S, S) if is_causal else seen
        out = multihead_attention(q, k, v, segment_ids, is_causal, backend=backend)
        assert_accurate("out", out, formula(q, k, v, seen, DH**-0.5))

    def test_scales(self):
        q, k, v = arrays(*[(B, S, NH, DH)] * 3)
        for options, scale in (
            ({"qk_scale": 0.2}, 0.2),
            ({"qk_scale": jnp.float32(0.2)}, 0.2),
            ({"reference_scale": "num_heads"}, NH**-0.5),
            ({"reference_scale": "num_heads", "qk_scale": 0.2}, 0.2),
        ):
            out = multihead_attention(q, k, v, **options)
            assert_accurate("out", out, formula(q, k, v, causal(S, S), scale))

    def test_one_sequence_without_a_batch(self):
        q, k, v = arrays(*[(S, NH, DH)] * 3)
        out = multihead_attention(q, k, v, IDS[0])
        assert jnp.array_equal(out, multihead_attention(q[None], k[None], v[None], IDS[:1])[0])

    def test_lengths_that_differ(self):
        q, k, v = arrays((B, 4, NH, DH), (B, S, NH, DH), (B, S, NH, DH))
        assert_accurate("out", multihead_attention(q, k, v), formula(q, k, v, causal(4, S), DH**-0.5))
        with pytest.raises(ValueError, match="^segment_ids: "):
            multihead_attention(q, k, v, IDS)

    def test_unknown_names(self):
        q = jnp.ones((B, S, NH, DH))
        with pytest.raises(ValueError, match="^backend: "):
            multihead_attention(q, q, q, backend="pallas")
        with pytest.raises(ValueError, match="^reference_scale: "):
            multihead_attention(q, q, q, reference_scale="heads")
        with pytest.raises(ValueError, match="^q: "):
            multihead_attention(q[None], q, q)


def test_configurations():
    config = SelfAttentionConfig(32, True, dtype="bfloat16", parallel=ParallelConfig(model_axis_size=2))
    assert config.head_dim == 32 and config.qk_norm and config._dtype is jnp.bfloat16
    fields = config.to_dict()
    assert fields["dtype"] == "bfloat16" and fields["dropout_rate"] == 0.0 and isinstance(fields["parallel"], str)
    parallel = ParallelConfig(remat=["AttnBlock"])
    assert (parallel.data_axis_size, parallel.fsdp_min_weight_size, parallel.model_axis_name) == (-1, 2**18, "tp")
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match="^fsdp_gather_dtype: "):
            ParallelConfig(fsdp_gather_dtype="float8")
    with pytest.raises(TypeError):
        ParallelConfig(1)


def build(**options):
    module = SelfAttention(SelfAttentionConfig(head_dim=DH, **options))
    (x,) = arrays((B, S, WIDTH))
    return module, module.init(jax.random.key(0), x), x


def moved(params, amount=0.1):
    """Parameters with noise, so that zeros and ones count, too."""
    leaves, tree = jax.tree.flatten(params)
    noise = arrays(*[leaf.shape for leaf in leaves], seed=3)
    return jax.tree.unflatten(tree, [leaf + amount * n for leaf, n in zip(leaves, noise, strict=True)])


class TestModule:
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_the_tree(self, use_bias):
        module = SelfAttention(SelfAttentionConfig(DH, qk_norm=True, use_bias=use_bias, dtype="bfloat16"))
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((B, S, WIDTH)))
        shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), variables)
        heads = {"kernel": ((WIDTH, NH, DH), "float32")} | ({"bias": ((NH, DH), "float32")} if use_bias else {})
        out = {"kernel": ((NH, DH, WIDTH), "float32")} | ({"bias": ((WIDTH,), "float32")} if use_bias else {})
        norm = {"scale": ((DH,), "float32")}
        assert shapes == {
            "params": {"dense_q": heads, "dense_k": heads, "dense_v": heads, "dense_out": out,
                       "q_norm": norm, "k_norm": norm}
        }  # fmt: skip

    def test_first_values(self):
        width, layers = 128, 5
        config = SelfAttentionConfig(head_dim=64, num_layers=layers, use_bias=True)
        params = SelfAttention(config).init(jax.random.key(1), jnp.ones((1, 2, width)))["params"]
        for name in ("dense_q", "dense_k", "dense_v"):
            assert abs(params[name]["kernel"].std() / (2 / (5 * width)) ** 0.5 - 1) < 0.03
        assert abs(params["dense_out"]["kernel"].std() * layers * width**0.5 - 1) < 0.03
        assert not any(params[name]["bias"].any() for name in ("dense_q", "dense_k", "dense_v", "dense_out"))

    def test_the_output_begins_as_a_flax_dense_of_that_name(self):
        class Dense(nn.Module):
            @nn.compact
            def __call__(self, x):
                std = 1 / (12 * WIDTH**0.5)
                init = nn.initializers.normal(std)
                return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, kernel_init=init, name="dense_out")(x)

        _, variables, _ = build()
        theirs = Dense().init(jax.random.key(0), jnp.ones((B, S, NH, DH)))
        assert jnp.array_equal(variables["params"]["dense_out"]["kernel"], theirs["params"]["dense_out"]["kernel"])

    def test_backends_begin_with_the_same_bits_and_agree(self):
        trees, outs, gradients, ids = [], [], [], jnp.asarray(IDS)
        for backend in ("xla", "pallas_triton"):
            module, variables, x = build(attention_backend=backend, qk_norm=True)

            def loss(variables, x, module=module):
                return jnp.sin(9 * module.apply(variables, x, segment_ids=ids)).sum()

            trees.append(variables)
            outs.append(module.apply(variables, x, segment_ids=ids))
            gradients.append(jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x))
        for tree in trees[1:]:
            jax.tree.map(np.testing.assert_array_equal, tree, trees[0])
        for out, gradient in zip(outs[1:], gradients[1:], strict=True):
            np.testing.assert_allclose(out, outs[0], atol=1e-3, rtol=1e-3)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-4, rtol=1e-3), gradient, gradients[0])

    @pytest.mark.parametrize("reference_scale", [None, "num_heads"])
    def test_values_by_the_formula(self, reference_scale):
        """And a tree of plain NumPy arrays loads as a checkpoint."""
        module, variables, x = build(qk_norm=True, use_bias=True, reference_scale=reference_scale)
        checkpoint = jax.tree.map(np.asarray, moved(variables))
        loaded = serialization.from_bytes(variables, serialization.to_bytes(checkpoint))
        p = {name: {k: v.astype("float64") for k, v in part.items()} for name, part in checkpoint["params"].items()}
        wide = np.asarray(x, "float64")
        heads = {
            n: np.einsum("bsd,dnh->bsnh", wide, p[n]["kernel"]) + p[n]["bias"]
            for n in p
            if n[-2:] in ("_q", "_k", "_v")
        }

        def norm(x, scale):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

        with jax.enable_x64(True):
            turned = (norm(heads[f"dense_{n}"], p[f"{n}_norm"]["scale"]) for n in "qk")
            q, k = apply_rotary_emb(*(jnp.asarray(x) for x in turned))
        scale = DH**-0.5 if reference_scale is None else NH**-0.5
        out = formula(q, k, heads["dense_v"], causal(S, S), scale)
        exact = np.einsum("bsnh,nhd->bsd", out, p["dense_out"]["kernel"]) + p["dense_out"]["bias"]
        np.testing.assert_allclose(module.apply(loaded, x), exact, atol=1e-4)

    def test_tables_may_be_given(self):
        module, variables, x = build()
        same = module.apply(variables, x, precompute_freqs(DH, max_length=S))
        assert jnp.array_equal(same, module.apply(variables, x))
        other = module.apply(variables, x, precompute_freqs(DH, jnp.arange(S)[None] * 2))
        assert not jnp.allclose(other, same)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtypes(self, dtype):
        module, variables, x = build(dtype=dtype)
        out = module.apply(variables, x)
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype("float32"), build()[0].apply(variables, x), atol=2e-2)

    @pytest.mark.parametrize("backend", ["xla", "pallas_triton"])
    def test_one_token_changes_no_other_row_and_nothing_before_it(self, backend):
        module, variables, x = build(attention_backend=backend)
        apply = jax.jit(module.apply)
        a, b = apply(variables, x), apply(variables, x.at[0, 7].add(1.0))
        assert jnp.array_equal(a[1], b[1]) and jnp.array_equal(a[0, :7], b[0, :7])
        assert not jnp.allclose(a[0, 7:], b[0, 7:], atol=1e-4)

    def test_documents_do_not_see_one_another(self):
        module, variables, x = build()
        ids = jnp.asarray([[0] * 5 + [1] * 7] * B)
        a, b = (module.apply(variables, y, segment_ids=ids) for y in (x, x.at[:, :5].add(1.0)))
        np.testing.assert_allclose(a[:, 5:], b[:, 5:], atol=1e-6)

    def test_swapping_two_documents_permutes_the_output(self):
        module, variables, x = build(qk_norm=True)
        order = np.r_[5:12, 0:5]
        ids, positions = jnp.asarray([[0] * 5 + [1] * 7] * B), jnp.asarray([[*range(5), *range(7)]] * B)
        a = module.apply(variables, x, precompute_freqs(DH, positions), ids)
        b = module.apply(variables, x[:, order], precompute_freqs(DH, positions[:, order]), ids[:, order])
        np.testing.assert_allclose(a[:, order], b, atol=1e-5)

    def test_dropout_of_the_output_alone_in_training_alone(self):
        module, variables, x = build(dropout_rate=0.5)
        clean, key = module.apply(variables, x), {"dropout": jax.random.key(1)}
        noisy = module.apply(variables, x, train=True, rngs=key)
        kept = np.asarray(noisy != 0)
        np.testing.assert_allclose(np.asarray(noisy)[kept], 2 * np.asarray(clean)[kept], rtol=1e-5)
        assert 0.4 < kept.mean() < 0.6
        build()[0].apply(variables, x, train=True)  # a rate of zero wants no rng

    def test_a_width_that_does_not_split(self):
        for error in (AssertionError, ValueError):
            with pytest.raises(error, match="^x: "):
                SelfAttention(SelfAttentionConfig(head_dim=7)).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
