"""`tilewise.jax.dot_product_attention` against its definition in float64 and against `jax.nn.dot_product_attention`."""

from __future__ import annotations

import inspect
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from accuracy import assert_accurate  # noqa: E402

import tilewise as tw  # noqa: E402
from tilewise.compat.jax_sdpa import dot_product_attention  # noqa: E402

B, T, S, N, K, H = 2, 13, 11, 4, 2, 8


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def sixty_four_bits():
    with jax.enable_x64(True):
        yield


def arrays(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def booleans(*shape, keep=0.7):
    return jnp.asarray(np.random.default_rng(7).random(shape) < keep)


def visible(shape, mask=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None, window=None):
    """What jax's documentation says who sees whom, (B, N, T, S)."""
    batch, _, rows, columns = shape
    t, s = np.arange(rows)[:, None], np.arange(columns)[None]
    seen = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    if is_causal:
        seen &= s <= t
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        seen &= (s >= t - left) & (s <= t + right)
    for lengths, places in ((query_seq_lengths, t), (key_value_seq_lengths, s)):
        if lengths is not None:
            seen &= places[None, None] < np.asarray(lengths).reshape(batch, 1, 1, 1)
    return seen


def definition(q, k, v, bias, seen, scale=None):
    """(out, residual) in the dtype of the arguments, by the formula; in jax only where a derivative is wanted."""
    xp = jnp if any(isinstance(x, jax.core.Tracer) for x in (q, k, v, bias, scale)) else np
    groups = q.shape[2] // k.shape[2]
    k, v = (xp.repeat(x, groups, axis=2) for x in (k, v))
    scores = xp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    weights = xp.where(seen, xp.exp(xp.where(seen, scores, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    out = xp.einsum("bnts,bsnh->btnh", weights / xp.where(total == 0, 1.0, total), v)
    with np.errstate(divide="ignore"):
        return out, xp.log(total)[..., 0].swapaxes(1, 2)


LENGTHS = jnp.asarray([9, 4], "int32"), jnp.asarray([5, 11], "int32")
CASES = {
    "nothing": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 3},
    "window of two sides": {"local_window_size": (2, 1)},
    "window to the left of itself": {"local_window_size": (4, -1)},
    "window and causal": {"local_window_size": (3, 2), "is_causal": True},
    "query lengths": {"query_seq_lengths": LENGTHS[0]},
    "key lengths": {"key_value_seq_lengths": LENGTHS[1]},
    "both lengths and causal": {
        "query_seq_lengths": LENGTHS[0],
        "key_value_seq_lengths": LENGTHS[1],
        "is_causal": True,
    },
    "full bias": {"bias": (B, N, T, S)},
    "bias of one row": {"bias": (1, N, T, S), "is_causal": True},
    "bias of keys": {"bias": (B, 1, 1, S)},
    "bias of queries": {"bias": (N, T, 1)},
    "bias of rank 2": {"bias": (T, S)},
    "full mask": {"mask": (B, N, T, S)},
    "mask of heads": {"mask": (1, N, 1, S)},
    "mask of keys": {"mask": (B, 1, 1, S), "bias": (B, 1, T, S)},
    "mask of queries": {"mask": (B, 1, T, 1)},
    "mask of rank 1": {"mask": (S,), "key_value_seq_lengths": LENGTHS[1]},
    "everything": {
        "bias": (B, N, T, S), "mask": (B, 1, T, S), "is_causal": True, "local_window_size": (6, 0), "scale": 0.2,
        "query_seq_lengths": LENGTHS[0], "key_value_seq_lengths": LENGTHS[1],
    },
}  # fmt: skip


def case(name, dtype="float32"):
    options = dict(CASES[name])
    bias = arrays(options.pop("bias"), dtype=dtype, seed=5)[0] if "bias" in options else None
    mask = booleans(*options.pop("mask")) if "mask" in options else None
    return bias, mask, options


def expected(q, k, v, bias, mask, scale=None, local_window_size=None, **options):
    seen = visible((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), mask, window=local_window_size, **options)
    return definition(q, k, v, bias, seen, scale)


def wide(*given):
    return [None if x is None else np.asarray(x).astype("float64") for x in given]


def test_the_signature_is_that_of_jax():
    ours, theirs = (inspect.signature(f).parameters for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
        (p.name, p.kind, p.default) for p in ours.values() if p.name in theirs
    ]


@pytest.mark.parametrize("name", CASES)
def test_values_and_residual(name):
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H))
    bias, mask, options = case(name)
    out, residual = dot_product_attention(q, k, v, bias, mask, return_residual=True, **options)
    exact, exact_residual = expected(*wide(q, k, v, bias), mask, **options)
    assert out.dtype == residual.dtype == q.dtype
    assert_accurate("out", out, exact)
    assert_accurate("lse", residual, exact_residual)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mask of keys", "float64"),
        ("bias of rank 2", "float16"),
        ("everything", "bfloat16"),
        slow("everything", "float64"),
        slow("everything", "float16"),
        slow("mask of keys", "bfloat16"),
    ],
)
def test_dtypes(name, dtype):
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    bias, mask, options = case(name, dtype)
    out = dot_product_attention(q, k, v, bias, mask, **options)
    assert out.dtype == dtype
    exact, _ = expected(*wide(q, k, v, bias), mask, **options)
    assert_accurate("out", out, exact, jax.nn.dot_product_attention(q, k, v, bias, mask, **options))


@pytest.mark.parametrize("name", ["bias of keys", "everything", slow("scale"), slow("both lengths and causal")])
def test_gradients_under_jit(name):
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H))
    bias, mask, options = case(name)
    if bias is None:
        bias = jnp.zeros((1, 1, 1, S), "float32")
    weight = arrays(q.shape, seed=9)[0]

    def gradient(function):
        return jax.jit(jax.grad(lambda q, k, v, bias: (function(q, k, v, bias) * weight).sum(), argnums=(0, 1, 2, 3)))

    got = gradient(lambda *x: dot_product_attention(*x, mask, **options))(q, k, v, bias)
    exact = gradient(lambda *x: expected(*x, mask, **options)[0])(*wide(q, k, v, bias))
    for operand, ours, right in zip(("q", "k", "v", "bias"), got, exact, strict=True):
        assert_accurate(operand, ours, right)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mapped", [False, True])
def test_grouped_heads_as_repeated_heads(groups, mapped):
    """jax's own case: half precision, the vjp, and `vmap` with unmapped None for bias and mask."""
    q, k, v, g = arrays(
        (2, 24, 4, 8), (2, 24, 4 // groups, 8), (2, 24, 4 // groups, 8), (2, 24, 4, 8), dtype="bfloat16"
    )
    function = partial(dot_product_attention, implementation="xla")
    function = jax.vmap(function, in_axes=(0, 0, 0, None, None)) if mapped else function
    out, back = jax.vjp(function, q, k, v, None, None)
    repeated = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    plain, plain_back = jax.vjp(jax.nn.dot_product_attention, q, *repeated)
    exact, exact_back = jax.vjp(lambda *x: expected(*x, None, None)[0], *wide(q, k, v))
    assert_accurate("out", out, exact, plain)
    for i, name in enumerate("qkv"):
        yardstick = plain_back(g)[i]
        if i:
            yardstick = yardstick.reshape(2, 24, 4 // groups, groups, 8).sum(3)
        assert_accurate(name, back(g)[i], exact_back(g.astype("float64"))[i], yardstick)


MORE = ["causal", "padding", "custom", "causal padding", "bias causal", "causal window"]


@pytest.mark.parametrize("mode", ["bias", "custom padding", *map(slow, MORE)])
def test_masks_with_their_vjp(mode):
    """jax's own case: every array is an argument of the vjp, booleans and lengths too."""
    q, k, v, g, bias = arrays((2, 16, 2, 8), (2, 16, 2, 8), (2, 16, 2, 8), (2, 16, 2, 8), (1, 2, 16, 16))
    lengths = jnp.asarray([8, 4], "int32"), jnp.asarray([4, 8], "int32")
    bias = bias if "bias" in mode else None
    mask = jnp.tril(jnp.ones((16, 16), bool))[None, None] if "custom" in mode else None
    lengths = lengths if "padding" in mode else (None, None)
    window, is_causal = ((3, 2) if "window" in mode else None), "causal" in mode

    def call(function):
        def inner(q, k, v, bias, mask, q_lengths, k_lengths):
            return function(
                q, k, v, bias, mask, is_causal=is_causal, query_seq_lengths=q_lengths,
                key_value_seq_lengths=k_lengths, local_window_size=window,
            )  # fmt: skip

        return inner

    out, back = jax.vjp(call(dot_product_attention), q, k, v, bias, mask, *lengths)
    plain, plain_back = jax.vjp(call(jax.nn.dot_product_attention), q, k, v, bias, mask, *lengths)
    assert_accurate("out", out, plain.astype("float64"))
    ours, theirs = back(g), plain_back(g)
    for name, got, right in zip(("q", "k", "v", "bias"), ours, theirs, strict=False):
        assert (got is None) == (right is None)
        if got is not None:
            assert_accurate(name, got, right.astype("float64"))
    for got, right in zip(ours[4:], theirs[4:], strict=True):
        assert (got is None) == (right is None) and (got is None or got.dtype == right.dtype)


@pytest.mark.parametrize(("batch", "mapped"), [(3, True), slow(1, True), slow(3, False)])
def test_gradient_of_a_bias_beside_a_mask_of_keys(batch, mapped):
    x, bias = arrays((batch, 10, 2, 8), (batch, 2, 10, 10))
    mask = jnp.ones((1, 1, 10), bool)

    def attend(function, x, bias, mask):
        return function(query=x, key=x, value=x, bias=bias, mask=mask, is_causal=False)

    ours, theirs = partial(attend, dot_product_attention), partial(attend, jax.nn.dot_product_attention)
    if mapped:
        ours, theirs = (jax.vmap(f, in_axes=(0, 0, None)) for f in (ours, theirs))
    assert_accurate("out", jax.jit(ours)(x, bias, mask), theirs(x, bias, mask).astype("float64"))
    (_, got, _), (_, right, _) = (jax.jit(lambda f=f: jax.vjp(f, x, bias, mask)[1](x))() for f in (ours, theirs))
    assert_accurate("bias", got, right.astype("float64"))


def test_ranks_mix_as_in_jax():
    q, k, v = arrays((T, N, H), (1, S, N, H), (1, S, N, H))
    ours, theirs = (
        f(q, k, v, jnp.ones(S), booleans(S), return_residual=True)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    assert ours[0].shape == theirs[0].shape == (T, N, H) and ours[1].shape == theirs[1].shape == (T, N)
    assert_accurate("out", ours[0], theirs[0].astype("float64"))
    q, k, v = arrays((N, H), (K, H), (K, H))
    assert dot_product_attention(q, k, v).shape == (N, H)


def test_numpy_arrays_and_lists_are_taken():
    q = np.random.default_rng(0).standard_normal((3, 1, 2))
    out = dot_product_attention(q, q, q, mask=np.ones((3, 3), bool), scale=np.float32(1))
    assert isinstance(out, jax.Array)
    assert jnp.array_equal(out, dot_product_attention(q.tolist(), q.tolist(), q.tolist(), scale=1))


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float32")])
def test_a_traced_scale_has_a_gradient(dtype):
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    weight = arrays(q.shape, seed=9)[0]
    got, pull = jax.vjp(jax.jit(lambda scale: dot_product_attention(q, k, v, scale=scale)), jnp.float32(0.4))
    exact, exact_pull = jax.vjp(lambda scale: definition(*wide(q, k, v), None, True, scale)[0], jnp.float64(0.4))
    assert_accurate("out", got, exact, dot_product_attention(q, k, v, scale=0.4))
    assert_accurate("scale", pull(weight.astype(dtype))[0], exact_pull(wide(weight)[0])[0], dtype=dtype)


def test_a_mask_and_a_bias_may_be_those_of_key_heads():
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H))
    bias, mask = arrays((B, K, T, S), seed=3)[0], booleans(1, K, T, S)
    out = dot_product_attention(q, k, v, bias, mask)
    right = expected(*wide(q, k, v, jnp.repeat(bias, 2, 1)), jnp.repeat(mask, 2, 1))[0]
    assert_accurate("out", out, right)


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H))
    mask = jnp.ones((B, 1, T, S), bool).at[0, 0, 3].set(False)
    k_lengths = jnp.asarray([S, 0], "int32")

    def call(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=k_lengths, return_residual=True)

    (out, residual), back = jax.vjp(call, q, k, v)
    assert not out[0, 3].any() and not out[1].any() and out[0, 4].any()
    assert jnp.isneginf(residual[0, 3]).all() and jnp.isneginf(residual[1]).all()
    d_q, d_k, d_v = back((jnp.ones_like(out), jnp.zeros_like(residual)))
    assert not d_q[0, 3].any() and not d_q[1].any() and not d_k[1].any() and not d_v[1].any()
    assert all(jnp.isfinite(d).all() for d in (d_q, d_k, d_v))


def test_what_is_masked_does_not_show():
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H))
    lengths = jnp.asarray([6, 6], "int32")
    bad_k, bad_v = (x.at[:, 6:].set(jnp.nan) for x in (k, v))
    call = partial(dot_product_attention, key_value_seq_lengths=lengths)
    assert jnp.array_equal(call(q, k, v), call(q, bad_k, bad_v))
    gradient = jax.grad(lambda q, k, v: call(q, k, v).sum(), argnums=(0, 1, 2))
    for clean, dirty in zip(gradient(q, k, v), gradient(q, bad_k, bad_v), strict=True):
        assert jnp.array_equal(clean, dirty)


def test_no_infinity_is_made_with_float64_and_a_mask():
    """jax's own case (its issue 37422)."""
    with jax.debug_infs(True), jax.debug_nans(True):
        zeros = jnp.zeros((5, 6, 11)), jnp.zeros((7, 3, 11)), jnp.zeros((7, 3, 11))
        out = dot_product_attention(*zeros, mask=np.arange(7) <= 3)
    assert not out.any()


def test_no_gradient_flows_through_the_residual():
    q, k, v = arrays((T, N, H), (S, K, H), (S, K, H))
    assert not jax.grad(lambda q: dot_product_attention(q, k, v, return_residual=True)[1].sum())(q).any()


def test_a_kernel_may_be_named():
    q, k, v = arrays((B, T, N, H), (B, S, K, H), (B, S, K, H))
    a, b = (dot_product_attention(q, k, v, implementation=name) for name in ("portable", None))
    assert_accurate("out", a, b.astype("float64"))
    with pytest.raises(tw.KernelRefused):
        dot_product_attention(q, k, v, implementation="triton")


def test_cudnn_is_that_of_jax_or_its_error():
    q = arrays((1, 8, 1, 8))[0]
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match="cuDNN"):
            dot_product_attention(q, q, q, implementation="cudnn")


def test_empty_arrays():
    q, k = arrays((B, 0, N, H), (B, S, K, H))
    assert dot_product_attention(q, k, k).shape == (B, 0, N, H)
    q, k = arrays((B, T, N, H), (B, 0, K, H))
    assert not dot_product_attention(q, k, k).any()


X = np.zeros((B, T, N, H), np.float32)
Y = np.zeros((B, S, K, H), np.float32)
WRONG = {
    "value": (X, Y, Y[..., :4]),
    "query": (X[..., :4], Y, Y),
    "query dtype": (X.astype("float16"), Y, Y),
    "query heads": (X[:, :, :3], Y, Y),
    "key": (X, Y[None], Y[None]),
    "mask": (X, Y, Y, None, np.ones((T, S), np.float32)),
    "mask shape": (X, Y, Y, None, np.ones((T + 1, S), bool)),
    "bias": (X, Y, Y, np.ones((1, 1, 1, T, S), np.float32)),
    "bias shape": (X, Y, Y, np.ones((3, N, T, S), np.float32)),
    "query_seq_lengths": (X, Y, Y, {"query_seq_lengths": np.ones(B, np.int16)}),
    "key_value_seq_lengths": (X, Y, Y, {"key_value_seq_lengths": np.ones(B + 1, np.int32)}),
    "implementation": (X, Y, Y, {"implementation": "pallas"}),
    "scale": (X, Y, Y, {"scale": np.ones(2)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    given = [x for x in WRONG[name] if not isinstance(x, dict)]
    options = next((x for x in WRONG[name] if isinstance(x, dict)), {})
    with pytest.raises(ValueError, match=f"^{name.split()[0]}: "):
        dot_product_attention(*given, **options)
