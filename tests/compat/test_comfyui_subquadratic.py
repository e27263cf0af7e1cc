"""The names of ComfyUI's sub-quadratic attention against the formula written out."""

from functools import partial

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from tilewise.compat import comfyui_subquadratic as ours  # noqa: E402

BH, TQ, TK, C, CV = 6, 37, 53, 8, 5


def some(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def folded(dtype=torch.float64):
    """query, key_t, value."""
    return some(BH, TQ, C, dtype=dtype), some(BH, C, TK, seed=1, dtype=dtype), some(BH, TK, CV, seed=2, dtype=dtype)


def plain(query, key_t, value, mask=None, scale=None):
    s = query @ key_t * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    return torch.nan_to_num(s.softmax(-1), 0.0) @ value


MASKS = {
    "none": None,
    "full": some(BH, TQ, TK, seed=3),
    "of all heads": some(1, TQ, TK, seed=4),
    "of keys": some(BH, 1, TK, seed=5),
    "of keys of all": some(1, 1, TK, seed=6),
    "matrix": some(TQ, TK, seed=7),
    "holes": torch.where(some(BH, TQ, TK, seed=8) > 0, 0.0, -torch.inf),
    "large": torch.where(some(1, TQ, TK, seed=9) > 0, 0.0, -1e4).double(),
    "integers": (some(1, TQ, TK, seed=9) * 2).long(),
    "bool": some(BH, TQ, TK, seed=10) > 0,
    "bool of keys": some(BH, 1, TK, seed=11) > 0.5,
    "bool matrix": some(TQ, TK, seed=12) > 0,
    "nobody": torch.zeros(1, TQ, TK, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", [{}, {"query_chunk_size": 10, "kv_chunk_size": 9}])
def test_masks(name, sizes):
    mask = MASKS[name]
    got = ours.efficient_dot_product_attention(*folded(), mask=mask, **sizes)
    torch.testing.assert_close(got, plain(*folded(), mask), rtol=0, atol=1e-13)


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("query_chunk_size", [1, 7, 37, 1024])
@pytest.mark.parametrize(
    "keys",
    [{}, {"kv_chunk_size": 1}, {"kv_chunk_size": 53}, {"kv_chunk_size": 900}, {"kv_chunk_size_min": 20}],
    ids=str,
)
def test_chunk_sizes_change_nothing(query_chunk_size, keys, use_checkpoint):
    got = ours.efficient_dot_product_attention(*folded(), query_chunk_size, use_checkpoint=use_checkpoint, **keys)
    assert torch.equal(got, ours.efficient_dot_product_attention(*folded()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upcast", [True, False])
def test_dtypes(dtype, upcast):
    operands, mask = folded(dtype), MASKS["full"].float()
    got = ours.efficient_dot_product_attention(*operands, upcast_attention=upcast, mask=mask)
    assert got.dtype == dtype
    exact = plain(*(x.double() for x in operands), mask.double())
    assert_accurate("out", got, exact, plain(*operands, mask.to(dtype)))


def test_large_scores_need_the_upcast_that_is_always_made():
    query, key_t, value = (100 * some(1, 5, 64), 100 * some(1, 64, 9, seed=1), some(1, 9, 4, seed=2))
    got = ours.efficient_dot_product_attention(query.half(), key_t.half(), value.half())
    exact = plain(query.half().double(), key_t.half().double(), value.half().double())
    assert_accurate("out", got, exact)


def test_values_of_another_dtype():
    query, key_t, value = folded()
    got = ours.efficient_dot_product_attention(query.float(), key_t.float(), value.half(), upcast_attention=True)
    assert got.dtype == torch.float16
    assert_accurate("out", got, plain(query.float().double(), key_t.float().double(), value.half().double()))


@pytest.mark.parametrize("mask", ["none", "full", "holes", "bool"])
def test_derivatives(mask):
    small = some(2, 3, 2), some(2, 2, 4, seed=1), some(2, 4, 3, seed=2)
    leaves = [x.requires_grad_() for x in small]
    mask = MASKS[mask]
    mask = None if mask is None else mask[:2, :3, :4]
    if mask is not None and mask.isfinite().all() and mask.is_floating_point():
        leaves.append(mask.clone().requires_grad_())
        function = lambda q, k, v, m: ours.efficient_dot_product_attention(q, k, v, 2, 3, mask=m)  # noqa: E731
    else:
        function = lambda q, k, v: ours.efficient_dot_product_attention(q, k, v, 2, 3, mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_of_many_chunks():
    leaves = [x.requires_grad_() for x in folded()]
    got = torch.autograd.grad(ours.efficient_dot_product_attention(*leaves, 10, 9).square().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(plain(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_nothing(sizes):
    bh, tq, tk = sizes
    got = ours.efficient_dot_product_attention(some(bh, tq, 3), some(bh, 3, tk), some(bh, tk, 2))
    assert got.shape == (bh, tq, 2) and (got == 0).all()


def test_dynamic_slice():
    x = some(4, 5, 6)
    got = ours.dynamic_slice(x, [1, 2, 0], [2, 3, 6])
    assert torch.equal(got, x[1:3, 2:5, 0:6]) and got.shape == (2, 3, 6) and got.data_ptr() == x[1, 2].data_ptr()
    assert torch.equal(ours.dynamic_slice(x, (0, torch.tensor(4)), (4, 9)), x[:, 4:])
    with pytest.raises(ValueError, match="^sizes"):
        ours.dynamic_slice(x, [1, 2], [2])


def test_tuples():
    chunk = ours.AttnChunk(1, 2, 3)
    assert chunk._fields == ("exp_values", "exp_weights_sum", "max_score")
    assert ours.ScannedChunk(4, chunk).attn_chunk.max_score == 3 and ours.ScannedChunk._fields[0] == "chunk_idx"
    for protocol in (ours.SummarizeChunk, ours.ComputeQueryChunkAttn):
        assert callable(protocol.__call__)


@pytest.mark.parametrize("mask", ["none", "full", "holes", "bool of keys", "nobody"])
def test_chunks_by_themselves(mask):
    query, key_t, value = folded()
    mask = MASKS[mask]
    scale = C**-0.5
    chunk = ours._summarize_chunk(query, key_t, value, scale, False, mask)
    s = query @ key_t * scale
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    peak = s.amax(-1)
    torch.testing.assert_close(chunk.max_score, peak)
    weights = torch.exp(s - peak.nan_to_num(neginf=0.0)[..., None])
    torch.testing.assert_close(chunk.exp_weights_sum, weights.sum(-1))
    torch.testing.assert_close(chunk.exp_values, weights @ value)
    summarize = partial(ours._summarize_chunk, scale=scale, upcast_attention=True)
    for size in (1, 9, 53, 100):
        got = ours._query_chunk_attention(query, key_t, value, summarize, size, mask=mask)
        torch.testing.assert_close(got, plain(query, key_t, value, mask), rtol=0, atol=1e-12)
    whole = ours._get_attention_scores_no_kv_chunking(query, key_t, value, scale, False, mask)
    torch.testing.assert_close(whole, plain(query, key_t, value, mask), rtol=0, atol=1e-13)


def test_chunks_are_differentiable_and_can_be_checkpointed():
    leaves = [x.requires_grad_() for x in folded()]
    summarize = partial(ours._summarize_chunk, scale=C**-0.5, upcast_attention=False)
    out = ours._query_chunk_attention(*leaves, partial(checkpoint, summarize, use_reentrant=False), 20)
    got = torch.autograd.grad(out.square().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(plain(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


HEADS = 3


def split(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_apart(query, key, value, mask=None, scale=None):
    out = plain(split(query), split(key).mT, split(value), mask, scale)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("mask", "four"),
    [
        (None, None),
        (some(TQ, TK, seed=3), some(TQ, TK, seed=3)),
        (some(2, TQ, TK, seed=4), some(2, TQ, TK, seed=4)[:, None]),
        (some(1, 1, TK, seed=5), some(1, 1, TK, seed=5)[:, None]),
        (some(2, HEADS, TQ, TK, seed=6), some(2, HEADS, TQ, TK, seed=6)),
        (some(2, 1, TQ, TK, seed=7) > 0, some(2, 1, TQ, TK, seed=7) > 0),
        (some(2, TK, seed=8) > 0, (some(2, TK, seed=8) > 0)[:, None, None]),
    ],
    ids=["none", "matrix", "batch", "keys", "heads", "bool", "padding"],
)
def test_attention_sub_quad(mask, four):
    query, key, value = some(2, TQ, HEADS * C), some(2, TK, HEADS * C, seed=1), some(2, TK, HEADS * C, seed=2)
    expected = heads_apart(query, key, value, four)
    got = ours.attention_sub_quad(query, key, value, HEADS, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    apart = [split(x) for x in (query, key, value)]
    got = ours.attention_sub_quad(*apart, HEADS, mask=mask, skip_reshape=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    got = ours.attention_sub_quad(query, key, value, HEADS, mask=mask, skip_output_reshape=True)
    torch.testing.assert_close(got, split(expected), rtol=0, atol=1e-13)


def test_attention_sub_quad_options():
    query, key, value = some(2, TQ, 4 * C), some(2, TK, 2 * C, seed=1), some(2, TK, 2 * C, seed=2)
    k, v = (split(x, 2).repeat_interleave(2, 1) for x in (key, value))
    expected = plain(split(query, 4), k.mT, v, scale=0.3)
    options = {"scale": 0.3, "enable_gqa": True, "transformer_options": {}, "low_precision_attention": False}
    got = ours.attention_sub_quad(query, key, value, 4, attn_precision=torch.float32, **options)
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-13)
    half = ours.attention_sub_quad(query.half(), key.half(), value.half(), 4, enable_gqa=True)
    assert half.dtype == torch.float16


def test_errors():
    query, key_t, value = folded()
    for message, call in (
        ("^query_chunk_size", lambda: ours.efficient_dot_product_attention(query, key_t, value, 0)),
        ("^kv_chunk_size", lambda: ours.efficient_dot_product_attention(query, key_t, value, 4, -1)),
        ("^query: has shape", lambda: ours.efficient_dot_product_attention(query[0], key_t, value)),
        ("^key_t: has shape", lambda: ours.efficient_dot_product_attention(query, key_t.mT, value)),
        ("^value: has shape", lambda: ours.efficient_dot_product_attention(query, key_t, value[:, 1:])),
        ("^bias", lambda: ours.efficient_dot_product_attention(query, key_t, value, mask=some(BH, TQ, 3))),
        ("^query: has shape", lambda: ours.attention_sub_quad(query, query, query, 3)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
