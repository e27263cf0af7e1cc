"""flash-attention-jax's functions against their formulas, at lengths, dtypes and masks at which the original erred."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from accuracy import assert_accurate  # noqa: E402

import tilewise.compat.lucidrains_flash as lucid  # noqa: E402

B, H, N, M, D, DV = 2, 4, 9, 13, 8, 6


def arrays(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def qkv(dtype="float32", heads=H, dv=DV):
    return arrays((B, H, N, D), (B, heads, M, D), (B, heads, M, dv), dtype=dtype)


MASK = np.random.default_rng(1).random((B, M)) < 0.6


def formula(q, k, v, seen, scale=None):
    """float64; leading axes broadcast; rows that see nothing are 0."""
    q, k, v = (np.asarray(x, "float64") for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = np.where(seen, np.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


def unit(x, whole=False):
    x = np.asarray(x, "float64")
    return x / (np.sqrt((x * x).sum(None if whole else -1, keepdims=True)) + 1e-10)


def bottom_right(rows, columns):
    return np.arange(columns) <= np.arange(rows)[:, None] + columns - rows


@pytest.mark.parametrize("name", ["attention", "plain_attention", "flash_attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("heads", [H, 2, 1])
def test_attention(name, dtype, heads):
    q, k, v = qkv(dtype, heads)
    out = getattr(lucid, name)(q, k, v, MASK)
    assert out.dtype == dtype
    k, v = (jnp.repeat(x, H // heads, 1) for x in (k, v))
    assert_accurate("out", out, formula(q, k, v, MASK[:, None, None]))


@pytest.mark.parametrize("mask", [None, MASK.astype(np.int32), MASK.astype(np.float32)])
def test_kinds_of_masks(mask):
    q, k, v = qkv()
    seen = True if mask is None else MASK[:, None, None]
    assert_accurate("out", lucid.flash_attention(q, k, v, mask), formula(q, k, v, seen))


@pytest.mark.parametrize(("rows", "columns"), [(9, 13), (13, 9), (1, 5)])
def test_causal_from_the_last_query(rows, columns):
    q, k, v = arrays((B, H, rows, D), (B, H, columns, D), (B, H, columns, DV))
    exact = formula(q, k, v, bottom_right(rows, columns))
    for function in (lucid.causal_attention, lucid.causal_flash_attention):
        assert_accurate("out", function(q, k, v), exact)


def test_queries_before_the_first_key_have_gradients_of_zero():
    q, k, v = arrays((B, H, 13, D), (B, H, N, D), (B, H, N, DV))
    gradients = jax.grad(lambda *x: lucid.causal_flash_attention(*x).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in gradients) and not gradients[0][:, :, : 13 - N].any()


@pytest.mark.parametrize(
    "leading", [((), (), ()), ((3,), (3,), (1,)), ((2, 3, 4), (3, 1), (2, 1, 4)), ((1,), (4,), (4,))]
)
def test_causal_with_any_leading_axes(leading):
    q, k, v = arrays((*leading[0], 5, D), (*leading[1], 6, D), (*leading[2], 6, DV))
    out = lucid.causal_attention(q, k, v)
    exact = formula(q, k, v, bottom_right(5, 6))
    assert_accurate("out", out, np.broadcast_to(exact, out.shape))
    assert out.shape == (*np.broadcast_shapes(*leading), 5, DV)


@pytest.mark.parametrize("norm", ["vector", "array"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cosine_similarity(norm, dtype):
    q, k, v = qkv(dtype)
    whole = norm == "array"
    out = lucid.cosine_sim_attention(q, k, v, MASK, norm=norm)
    assert out.dtype == dtype
    assert_accurate("out", out, formula(unit(q, whole), unit(k, whole), v, MASK[:, None, None], 10.0))
    one = lucid.cosine_sim_flash_attention(q[0, 0], k[0, 0], v[0, 0], MASK[0], norm=norm)
    assert_accurate("out", one, formula(unit(q[0, 0], whole), unit(k[0, 0], whole), v[0, 0], MASK[0], 10.0))


def test_cosine_similarity_mapped_over_heads():
    q, k, v = qkv()
    inner = jax.vmap(lucid.cosine_sim_flash_attention, in_axes=(0, 0, 0, None))
    exact = formula(unit(q), unit(k), v, MASK[:, None, None], 10.0)
    assert_accurate("out", jax.vmap(inner)(q, k, v, MASK), exact)


def test_cosine_similarity_of_zeros_has_a_gradient():
    q, k, v = qkv()
    q, k = q.at[0, 0, 0].set(0), k.at[0, 0, 1].set(0)
    gradients = jax.grad(lambda q, k: lucid.cosine_sim_attention(q, k, v).sum(), argnums=(0, 1))(q, k)
    assert all(jnp.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("chunks", [(), (1024, 4096), (4, 3), (0, None)])
def test_rabe(chunks):
    q, k, v = (x[0, 0] for x in qkv())
    assert_accurate("out", lucid.rabe_attention(q, k, v, *chunks), formula(q, k, v, True))


def test_rabe_mapped_with_traced_chunk_sizes():
    q, k, v = qkv()
    function = jax.vmap(jax.vmap(lucid.rabe_attention, in_axes=(0, 0, 0, None, None)), in_axes=(0, 0, 0, None, None))
    assert_accurate("out", jax.jit(function)(q, k, v, 4, 3), formula(q, k, v, True))


def test_beyond_a_chunk_of_the_original():
    """Lengths over 1024 that are no multiple of it."""
    q, k, v = arrays((1, 1, 1030, 4), (1, 1, 1027, 4), (1, 1, 1027, 4))
    mask = np.random.default_rng(3).random((1, 1027)) < 0.5
    assert_accurate("out", lucid.flash_attention(q, k, v, mask), formula(q, k, v, mask[:, None, None]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flash_attention", "bfloat16"),
        pytest.param("cosine_sim_attention", "float32", marks=pytest.mark.slow),
        pytest.param("flash_attention", "float32", marks=pytest.mark.slow),
        pytest.param("cosine_sim_attention", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_masked_keys_neither_show_nor_move(name, dtype):
    q, k, v = qkv(dtype)
    mask = MASK.copy()
    mask[1] = False
    bad_k, bad_v = (jnp.where(mask[:, None, :, None], x, jnp.nan).astype(dtype) for x in (k, v))

    def run(k, v):
        call = lambda *x: getattr(lucid, name)(*x, mask).astype("float32").sum()  # noqa: E731
        return getattr(lucid, name)(q, k, v, mask), *jax.grad(call, argnums=(0, 1, 2))(q, k, v)

    for clean, dirty in zip(run(k, v), run(bad_k, bad_v), strict=True):
        assert clean.dtype == dtype and jnp.array_equal(clean, dirty)
        assert not dirty[1].any()


@pytest.mark.slow
def test_forward_mode_agrees_with_reverse_mode():
    q, k, v = qkv()
    d_q, weight = arrays(q.shape, (B, H, N, DV), seed=4)
    function = lambda q: (lucid.cosine_sim_attention(q, k, v, MASK) * weight).sum()  # noqa: E731
    _, along = jax.jvp(function, (q,), (d_q,))
    assert_accurate("q", along, np.sum(np.asarray(jax.grad(function)(q) * d_q, "float64")))


def test_value_and_grad_difference():
    sizes = {"batch": 1, "heads": 2, "q_seq_len": 5, "k_seq_len": 7, "dim": 4}
    given = []

    def twice(q, k, v, mask):
        given.append((q.shape, k.shape, v.shape, mask.shape, mask.dtype))
        return 2 * lucid.flash_attention(q, k, v, mask)

    out, gradients = lucid.value_and_grad_difference(lucid.flash_attention, twice, **sizes)
    assert given == [((1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 4), (1, 7), jnp.bool_)]
    assert out.shape == () and out > 0.01 and len(gradients) == 3 and gradients[2] > 0.01
    out, gradients = lucid.value_and_grad_difference(lucid.flash_attention, lucid.flash_attention, **sizes)
    assert out == 0 and not any(gradients)


def test_keys_are_fresh_and_reproducible():
    keys, again = lucid.PRNGKeyGenerator(3), lucid.PRNGKeyGenerator(3)
    first, second = next(keys), next(keys)
    assert not jnp.array_equal(first, second)
    assert jnp.array_equal(first, next(again)) and jnp.array_equal(second, next(again))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q", lambda q, k, v: lucid.flash_attention(q[0], k, v)),
        ("k", lambda q, k, v: lucid.rabe_attention(q[0, 0], k, v)),
        ("v", lambda q, k, v: lucid.causal_attention(q, k, v[0, 0, 0])),
        ("key_mask", lambda q, k, v: lucid.attention(q, k, v, MASK[:, 1:])),
        ("norm", lambda q, k, v: lucid.cosine_sim_attention(q, k, v, norm="row")),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(*qkv())
