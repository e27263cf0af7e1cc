"""`attention_fn` in flax.linen and flax.nnx modules, against flax's own attention."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
from accuracy import assert_accurate
from flax import linen, nnx

import tilewise as tw
from tilewise.jax import attention_fn
from tilewise.jax.keys import seed_of

B, S, HEADS, WIDTH = 2, 7, 4, 16


def arrays(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def wide(x):
    return np.asarray(x, "float64")


def pair(**options):
    """flax's module and ours, which share their parameters."""
    theirs = linen.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=WIDTH, **options)
    return theirs, theirs.clone(attention_fn=attention_fn)


CAUSAL = linen.make_causal_mask(jnp.ones((B, S)))  # float32: flax's masks need not be booleans
PADDING = linen.make_attention_mask(jnp.ones((B, S)), jnp.arange(S)[None] < jnp.asarray([[4], [7]]))


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        (None, linen.combine_masks(CAUSAL, PADDING)),
        pytest.param("bfloat16", CAUSAL, marks=pytest.mark.slow),
        pytest.param(None, None, marks=pytest.mark.slow),
        pytest.param("bfloat16", None, marks=pytest.mark.slow),
        pytest.param("float16", PADDING, marks=pytest.mark.slow),
    ],
)
def test_linen_values_and_gradients(dtype, mask):
    theirs, ours = pair(dtype=dtype, normalize_qk=True)
    (x,) = arrays((B, S, WIDTH))
    params = theirs.init(jax.random.key(0), x)
    exact, _ = pair(normalize_qk=True)

    def results(module, x):
        out, back = jax.vjp(jax.jit(lambda p, x: module.apply(p, x, mask=mask)), params, x)
        return out, back(jnp.cos(out))[1]

    got, plain, right = results(ours, x), results(theirs, x), results(exact, x)
    assert got[0].dtype == plain[0].dtype
    for name, a, b, c in zip(("out", "q"), got, plain, right, strict=True):
        assert_accurate(name, a, wide(c), b, dtype=str(a.dtype) if dtype is None else dtype)


@pytest.mark.parametrize("leading", [(), (2,), (3, 2)])
def test_any_number_of_batch_axes(leading):
    q, k, v = arrays(*[(*leading, S, HEADS, 8)] * 3)
    bias, mask = arrays((HEADS, S, S), seed=2)[0], jnp.asarray(np.random.default_rng(0).random((S, S)) < 0.8)
    mask = mask.at[:, 0].set(True)
    if len(leading) == 2:
        mask = jnp.broadcast_to(mask, (3, 1, 1, S, S)).at[1, ..., 1].set(False)  # differs along one batch axis alone
    out = attention_fn(q, k, v, bias, mask)
    assert_accurate("out", out, wide(linen.dot_product_attention(q, k, v, bias, mask)))


def test_cross_attention_in_linen():
    theirs, ours = pair()
    x, y = arrays((B, S, WIDTH), (B, 5, WIDTH))
    params = theirs.init(jax.random.key(0), x, y)
    assert_accurate("out", ours.apply(params, x, y), wide(theirs.apply(params, x, y)))


def test_decoding_in_linen():
    theirs, ours = pair(decode=True)
    (x,) = arrays((B, S, WIDTH))
    variables = theirs.init(jax.random.key(0), x)
    whole = pair()[0].apply({"params": variables["params"]}, x, mask=CAUSAL)
    cache, step = variables["cache"], jax.jit(partial(ours.apply, mutable=["cache"]))
    for t in range(S):
        out, changed = step({"params": variables["params"], "cache": cache}, x[:, t : t + 1])
        cache = changed["cache"]
        assert_accurate("out", out[:, 0], wide(whole[:, t]))
    assert cache["cache_index"] == S


def test_masks_of_tilewise_pass_through_flax():
    _, ours = pair()
    (x,) = arrays((B, S, WIDTH))
    params = ours.init(jax.random.key(0), x)
    mask = tw.causal() & tw.lengths(k=np.array([4, 7]))
    out = ours.apply(params, x, mask=mask)
    assert_accurate("out", out, wide(ours.apply(params, x, mask=linen.combine_masks(CAUSAL, PADDING))))


def test_options_of_tilewise():
    q, k, v = arrays(*[(B, S, HEADS, 8)] * 3)
    module = linen.MultiHeadDotProductAttention(
        HEADS, attention_fn=partial(attention_fn, bias=tw.alibi(np.ones(HEADS)), softcap=2.0, sinks=0.5, scale=0.1)
    )
    module.init(jax.random.key(0), jnp.ones((B, S, WIDTH)))
    out = attention_fn(q, k, v, bias=tw.alibi(np.ones(HEADS)), softcap=2.0, sinks=0.5, scale=0.1)
    same = tw.attention(q, k, v, bias=tw.alibi(np.ones(HEADS)), softcap=2.0, sinks=0.5, scale=0.1, layout="bshd")
    assert jnp.array_equal(out, same)


@pytest.mark.parametrize("kv_heads", [2, pytest.param(HEADS, marks=pytest.mark.slow)])
def test_nnx_values_and_gradients(kv_heads):
    (x,) = arrays((B, S, WIDTH))
    theirs, ours = (
        nnx.MultiHeadAttention(
            HEADS, WIDTH, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(0), param_dtype=jnp.float32, **more
        )
        for more in ({}, {"attention_fn": attention_fn})
    )

    @nnx.jit
    def results(module, x):
        def loss(module, x):
            return jnp.sin(module(x, mask=PADDING, is_causal=True)).sum()

        return nnx.value_and_grad(loss, argnums=1)(module, x)

    (a, d_a), (b, d_b) = results(ours, x), results(theirs, x)
    assert_accurate("out", a, wide(b))
    assert_accurate("q", d_a, wide(d_b))


def test_decoding_in_nnx():
    (x,) = arrays((B, S, WIDTH))
    module = nnx.MultiHeadAttention(
        HEADS, WIDTH, num_kv_heads=2, attention_fn=attention_fn, rngs=nnx.Rngs(0), param_dtype=jnp.float32, decode=False
    )
    whole = module(x, is_causal=True)
    module.init_cache(x.shape)
    for t in range(3):
        assert_accurate("out", module(x[:, t : t + 1], decode=True)[:, 0], wide(whole[:, t]))


def kept(out):
    """(B, S, H, S) booleans from the output for values that are the rows of a unit matrix."""
    return np.asarray(out) != 0


@pytest.fixture
def unit():
    """Equal scores, and values that show which keys were kept."""
    q = jnp.zeros((B, S, HEADS, S), jnp.float32)
    v = jnp.broadcast_to(jnp.eye(S, dtype=jnp.float32)[None, :, None], (B, S, HEADS, S))
    return q, q, v


class TestDropout:
    def test_keys_of_any_generator_are_seeds(self):
        q = jnp.ones((1, 2, 8, 4))
        for kind in ("threefry2x32", "rbg", "unsafe_rbg"):
            key = jax.random.key(5, impl=kind)
            expected = tw.attention(q, q, q, dropout=tw.Dropout(0.4, seed_of(key)))
            assert not np.array_equal(expected, tw.attention(q, q, q))
            np.testing.assert_array_equal(tw.attention(q, q, q, dropout=tw.Dropout(0.4, key)), expected)
            raw = jax.random.key_data(key)
            np.testing.assert_array_equal(tw.attention(q, q, q, dropout=tw.Dropout(0.4, raw)), expected)
            np.testing.assert_array_equal(seed_of(raw), seed_of(key))

    def test_bits_are_those_of_numpy_and_torch(self, unit):
        key = jax.random.key(5)
        words = np.asarray(jax.random.key_data(key))
        seed = int(words[0]) | int(words[1]) << 32
        for given in (key, jax.random.PRNGKey(5), seed):
            out = jax.jit(partial(attention_fn, broadcast_dropout=False, dropout_rng=given, dropout_rate=0.4))(*unit)
            plain = [np.asarray(x) for x in unit]
            same = tw.attention(*plain, dropout=tw.Dropout(0.4, seed), layout="bshd")
            np.testing.assert_allclose(out, same, rtol=1e-6)
        torch = pytest.importorskip("torch")
        other = tw.attention(*map(torch.tensor, plain), dropout=tw.Dropout(0.4, seed), layout="bshd")
        np.testing.assert_array_equal(kept(other), kept(out))

    @pytest.mark.parametrize("kernel", [None, pytest.param("portable", marks=pytest.mark.slow)])
    def test_one_pattern_for_all_rows_and_heads(self, unit, kernel):
        q, k, v = unit
        call = partial(attention_fn, dropout_rng=7, dropout_rate=0.5, kernel=kernel)
        mask = PADDING.at[..., 0].set(1)
        out = kept(call(q, k, v))
        pattern = out[0, :, 0]
        assert (out == pattern[None, :, None]).all() and 0.2 < pattern.mean() < 0.8
        single = tw.attention(*(np.asarray(x)[:1, :, :1] for x in unit), dropout=tw.Dropout(0.5, 7), layout="bshd")
        assert (kept(single)[0, :, 0] == pattern).all()
        # Grouped heads, an array mask of each row, an array bias of each head, sinks of each head, a causal mask.
        (bias,) = arrays((1, HEADS, S, S))
        options = {"mask": mask, "bias": bias, "sinks": jnp.arange(4.0, dtype=jnp.float32), "is_causal": True}
        got = call(q, k[:, :, :2], v[:, :, :2], **options)
        clean = attention_fn(q, k[:, :, :2], v[:, :, :2], deterministic=True, **options)
        np.testing.assert_allclose(
            got, np.where(pattern[None, :, None], 2 * np.asarray(clean), 0), rtol=1e-5, atol=1e-7
        )

    def test_gradients_know_the_pattern(self, unit):
        q, k, v = arrays(*[(B, S, HEADS, 8)] * 3)
        pattern = kept(attention_fn(*unit, dropout_rng=7, dropout_rate=0.5))[0, :, 0]

        def plain(q, k, v):
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5)
            return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(pattern, 2 * weights, 0), v)

        ours = partial(attention_fn, dropout_rng=7, dropout_rate=0.5)
        got, right = (
            jax.jit(jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2)))(q, k, v) for f in (ours, plain)
        )
        for name, a, b in zip("qkv", got, right, strict=True):
            assert_accurate(name, a, wide(b))

    def test_linen_draws_from_its_rng(self):
        _, ours = pair(dropout_rate=0.5)
        (x,) = arrays((B, S, WIDTH))
        params = ours.init(jax.random.key(0), x, deterministic=True)
        apply = jax.jit(lambda key: ours.apply(params, x, deterministic=False, rngs={"dropout": key}))
        a, b, c = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
        assert jnp.array_equal(a, b) and not jnp.allclose(a, c)
        clean = pair()[1].apply(params, x)
        assert jnp.array_equal(ours.apply(params, x, deterministic=True), clean)

    def test_masks_that_may_differ_between_rows_want_their_own_patterns(self, unit):
        call = partial(attention_fn, *unit, dropout_rng=7, dropout_rate=0.5)
        assert kept(call(mask=tw.causal())).any()
        for options in ({"mask": tw.lengths(k=np.array([3, 4]))}, {"bias": tw.alibi(np.ones(HEADS))},
                        {"mask": tw.predicate(lambda b, h, i, j: j <= i)}):  # fmt: skip
            with pytest.raises(ValueError, match="^broadcast_dropout: "):
                call(**options)
            call(**options, broadcast_dropout=False)

    def test_keys_of_every_generator(self):
        assert seed_of(3) == 3
        assert seed_of(jax.random.key(3)).tolist() == [0, 3]
        for implementation in ("rbg", "unsafe_rbg"):
            seeds = [seed_of(jax.random.key(n, impl=implementation)) for n in (1, 2)]
            assert all(seed.shape == (2,) and seed.dtype == jnp.uint32 for seed in seeds)
            assert not jnp.array_equal(*seeds)
        with pytest.raises(ValueError, match="^key: "):
            seed_of(jax.random.split(jax.random.key(0)))


def test_integers_are_promoted_and_dtype_decides():
    q = jnp.ones((S, 1, 2), jnp.int32)
    assert attention_fn(q, q, q).dtype == jnp.result_type(jnp.float32, jnp.int32)
    assert attention_fn(q, q, q, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    calls = []
    attention_fn(
        q, q, q, promote_dtype=lambda arrays, dtype: calls.append(dtype) or [x.astype("float32") for x in arrays]
    )
    assert calls == [None]


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        (None, "DEFAULT"),
        ("highest", "HIGHEST"),
        (jax.lax.Precision.HIGH, "HIGH"),
        ((None, "float32"), "HIGHEST"),
        (("default", "high"), "HIGH"),
    ],
)
def test_precision_reaches_the_products_forward_and_backward(precision, name):
    q = jnp.ones((S, 1, 4), jnp.float32)
    call = partial(attention_fn, precision=precision, kernel="portable")
    text = jax.jit(jax.grad(lambda q: call(q, q, q).sum())).lower(q).as_text()
    found = set(re.findall(r"precision = \[(\w+), (\w+)\]", text))
    assert found == {(name, name)}


def test_weights_are_not_stored():
    _, ours = pair()
    (x,) = arrays((B, S, WIDTH))
    params = ours.init(jax.random.key(0), x)
    with pytest.raises(tw.QuadraticMemory, match="^module: "):
        ours.apply(params, x, sow_weights=True, mutable=["intermediates"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dropout_rng", {"dropout_rate": 0.5}),
        ("qk_attn_weights_einsum", {"qk_attn_weights_einsum": jnp.einsum}),
        ("mask", {"mask": np.ones((3, 1, 1, 1))}),
        ("bias", {"bias": np.ones((1, 1, 1, 1, 1))}),
        ("query", {"query": np.ones((S, 4))}),
        ("key", {"key": np.ones((3, S, 1, 4))}),
    ],
)
def test_errors_name_the_argument(name, options):
    q = np.ones((2, S, 1, 4))
    with pytest.raises(ValueError, match=f"^{name}: "):
        attention_fn(**{"query": q, "key": q, "value": q} | options)
