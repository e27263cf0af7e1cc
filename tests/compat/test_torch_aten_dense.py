"""aten's forward functions on dense inputs: all places of the result, against torch where it runs, else the formula."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from support.aten_cases import band, make, plain, schema  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

from tilewise.compat import torch_aten as aten  # noqa: E402

close = torch.testing.assert_close
SHAPES = [
    (2, 4, 4, 5, 5, 8, 8),
    (2, 4, 2, 3, 7, 8, 6),
    (1, 2, 2, 6, 4, 3, 3),
    (3, 2, 1, 1, 5, 4, 4),
    (0, 2, 2, 3, 3, 4, 4),
]


def inputs(shape=(2, 4, 2, 5, 7, 8, 6), **options):
    batch, heads, kv_heads, q_len, k_len, dim, value_dim = shape
    return (
        make(batch, heads, q_len, dim, **options),
        make(batch, kv_heads, k_len, dim, **options),
        make(batch, kv_heads, k_len, value_dim, **options),
    )


def lower_right(q, k):
    return band(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], right=0)


def upper_left(q, k):
    return band(q.shape[2], k.shape[2], 0, right=0)


def swapped(*arrays):
    return tuple(array.transpose(1, 2) for array in arrays)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_flash(shape, causal, scale):
    q, k, v = inputs(shape)
    found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    assert len(found) == schema("_scaled_dot_product_flash_attention")[1]
    out, lse, cum_q, cum_k, max_q, max_k, state, unused, debug = found
    close((out, lse), plain(q, k, v, visible=lower_right(q, k) if causal else None, scale=scale))
    assert (cum_q, cum_k, max_q, max_k) == (None, None, shape[3], shape[4])
    assert (state.shape, state.dtype, unused.shape, unused.dtype) == ((2,), torch.uint64, (), torch.uint64)
    assert (debug.shape, debug.dtype) == ((0,), q.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_efficient(shape, causal, biased):
    q, k, v = inputs(shape)
    bias = make(shape[0], 1, shape[3], shape[4]) if biased else None
    found = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
    assert len(found) == schema("_scaled_dot_product_efficient_attention")[1]
    out, lse, seed, offset = found
    close((out, lse), plain(q, k, v, visible=upper_left(q, k) if causal else None, bias=bias))
    assert {(x.shape, x.dtype) for x in (seed, offset)} == {((), torch.int64)}
    silent = aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, causal)
    assert silent[1].shape == (*shape[:2], 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias_shape", [None, (5, 7), (1, 5, 7), (4, 5, 7), (2, 1, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7)])
def test_cudnn(shape, bias_shape):
    q, k, v = inputs()
    bias = make(bias_shape) if bias_shape else None
    for causal in (False, True):
        found = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal)
        assert len(found) == schema("_scaled_dot_product_cudnn_attention")[1]
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, debug = found
        close((out, lse), plain(q, k, v, visible=upper_left(q, k) if causal else None, bias=bias))
        assert (cum_q, cum_k, max_q, max_k, debug) == (None, None, 5, 7, None)
        assert seed.dtype == offset.dtype == torch.int64
        raw = aten._cudnn_attention_forward(q, k, v, bias, None, None, 5, 7, False, 0.0, causal)
        close(raw[0], out)
        assert raw[1] is None


@pytest.mark.parametrize("rank", [1, 5])
def test_cudnn_refuses_a_bias_of_another_rank(rank):
    with pytest.raises(RuntimeError, match=r"^attn_bias: cuDNN SDPA expects either a 2D, 3D, or 4D attn_bias but got"):
        aten._scaled_dot_product_cudnn_attention(*inputs(), make([1] * rank), True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(None, None), (-1, -1), (2, 1), (0, 0), (3, None), (None, 2), (2, -1)], ids=str)
def test_flash_forward_windows(causal, widths):
    q, k, v = inputs()
    found = aten._flash_attention_forward(
        *swapped(q, k, v), None, None, 5, 7, 0.0, causal, False, window_size_left=widths[0], window_size_right=widths[1]
    )
    assert len(found) == schema("_flash_attention_forward")[1]
    left, right = (None if width in (None, -1) else width for width in widths)
    expected = plain(q, k, v, visible=band(5, 7, 2, left, 0 if causal else right))
    close((found[0].transpose(1, 2), found[1]), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("slopes", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("used", [None, (7, 3)], ids=str)
def test_flash_forward_alibi_and_used_keys(causal, slopes, used):
    """Positions are counted back from the last key that exists; what lies behind it is never seen."""
    q, k, v = inputs()
    slopes = make(slopes).abs()
    lengths = torch.tensor(used or (7, 7), dtype=torch.int32)
    if used:
        k[1, :, 3:] = v[1, :, 3:] = torch.nan
    out, lse, *_ = aten._flash_attention_forward(
        *swapped(q, k, v), None, None, 5, 7, 0.0, causal, False,
        alibi_slopes=slopes, seqused_k=lengths if used else None, window_size_left=4,
    )  # fmt: skip
    for n, length in enumerate(lengths.tolist()):
        own = slopes if slopes.dim() == 1 else slopes[n]
        distance = (torch.arange(length) - torch.arange(5)[:, None] - (length - 5)).abs()
        expected = plain(
            q[n : n + 1], k[n : n + 1, :, :length], v[n : n + 1, :, :length],
            visible=band(5, length, length - 5, 4, 0 if causal else None), bias=-own[:, None, None] * distance,
        )  # fmt: skip
        close((out[n : n + 1].transpose(1, 2), lse[n : n + 1]), expected)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("size", [None, 0, 1, 3])
@pytest.mark.parametrize("used", [None, (7, 4)], ids=str)
def test_efficient_forward(kind, size, used):
    q, k, v = inputs()
    bias = make(2, 4, 5, 7)
    lengths = torch.tensor(used or (7, 7), dtype=torch.int32)
    found = aten._efficient_attention_forward(
        *swapped(q, k, v), bias, None, None, None, None, 0.0, kind, True,
        seqlen_k=lengths if used else None, window_size=size,
    )  # fmt: skip
    assert len(found) == schema("_efficient_attention_forward")[1]
    out, lse, _, _, max_q, max_k = found
    assert (max_q, max_k) == (5, 7)
    for n, length in enumerate(lengths.tolist()):
        visible = band(5, 7, length - 5 if kind == 2 else 0, size - 1 if size else None, 0 if kind else None)
        visible &= torch.arange(7) < length
        expected = plain(q[n : n + 1], k[n : n + 1], v[n : n + 1], visible=visible, bias=bias[n : n + 1])
        close((out[n : n + 1].transpose(1, 2), lse[n : n + 1]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_log_sum_exps_are_float32(dtype):
    q, k, v = (x.to(dtype) for x in inputs())
    results = [
        aten._scaled_dot_product_flash_attention(q, k, v),
        aten._scaled_dot_product_efficient_attention(q, k, v, None, True),
        aten._scaled_dot_product_cudnn_attention(q, k, v, None, True),
        aten._scaled_dot_product_flash_attention_for_cpu(q, k, v),
    ]
    exact = plain(q.double(), k.double(), v.double())[1]
    for out, lse, *_ in results:
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        close(lse.double(), exact, rtol=4e-6, atol=4e-6)


def test_batches_beyond_65535_even_with_dropout():
    """aten runs them in slices and refuses dropout there."""
    batch = 2**16 + 3
    q, k, v = (make(batch, 1, 2, 4) for _ in range(3))
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    close(out[-3:], plain(q[-3:], k[-3:], v[-3:])[0])
    assert lse.shape == (batch, 1, 2)
    torch.manual_seed(1)
    dropped, _, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.5)
    assert dropped.eq(0).all(-1).double().mean() == pytest.approx(0.25, abs=0.01)  # both keys of a row dropped
    grad = torch.randn_like(out)
    found = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, dropped, lse, seed, offset, 0.5, [False, False, True, False]
    )
    close((found[2] * v).sum(), (grad * dropped).sum())  # out is linear in v, with the very pattern


def test_a_row_that_sees_nothing():
    q, k, v = inputs((1, 2, 2, 5, 3, 4, 4), requires_grad=True)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)
    assert out[:, :, :2].eq(0).all()
    assert lse[:, :, :2].eq(-math.inf).all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient[:, :, :2].eq(0).all()


def test_derivatives():
    """Of every tensor given, in reverse and forward mode and twice, through the log-sum-exp as well."""
    q, k, v = inputs((1, 2, 1, 3, 4, 2, 3), requires_grad=True)
    bias, slopes = make(1, 2, 3, 4, requires_grad=True), torch.rand(2, dtype=torch.float64, requires_grad=True)
    calls = {
        (q, k, v): lambda *x: aten._scaled_dot_product_flash_attention(*x, 0.0, True)[:2],
        (q, k, v, bias): lambda *x: aten._scaled_dot_product_efficient_attention(*x, True)[:2],
        (k, v, q, slopes): lambda k, v, q, slopes: aten._flash_attention_forward(
            *swapped(q, k, v), None, None, 3, 4, 0.0, False, False, alibi_slopes=slopes, window_size_left=2
        )[:2],
    }
    for tensors, function in calls.items():
        assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, tensors, fast_mode=True)


def test_dropout_is_repeated_by_the_seed_and_shown_by_the_debug_mask():
    q, k, v = inputs((2, 2, 2, 4, 6, 4, 4))
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(aten._scaled_dot_product_flash_attention(q, k, v, 0.4, True, True))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][6], found[1][6])
    assert not torch.equal(found[0][0], found[2][0])
    out, lse, *_, debug = found[0]
    visible = lower_right(q, k)
    weights = torch.exp((q @ k.mT / 2).masked_fill(~visible, -math.inf) - lse[..., None])
    close(debug.abs(), weights)
    close((debug.clamp(min=0) / 0.6) @ v, out)
    assert 0.2 < (debug < 0)[..., visible].double().mean() < 0.6
    undropped = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, True)
    close(undropped[-1], weights)
    assert undropped[6].view(torch.int64).eq(0).all()


def test_errors():
    q, k, v = inputs()
    four = swapped(q, k, v)
    for call, words in (
        (
            lambda: aten._scaled_dot_product_flash_attention(q, k, v[:, :, :3]),
            "^value: Key and Value must have the same",
        ),
        (lambda: aten._scaled_dot_product_flash_attention(q[0], k, v), "^query: has shape .* expected 4 axes"),
        (
            lambda: aten._flash_attention_forward(*four, torch.tensor([0, 5]), None, 5, 7, 0.0, False, False),
            "^cum_seq_k: .*must be both set or both not set",
        ),
        (
            lambda: aten._flash_attention_forward(
                *four, None, None, 5, 7, 0.0, False, False, block_table=torch.zeros(2, 1)
            ),
            "^block_table: ",
        ),
        (lambda: aten._efficient_attention_forward(*four, *[None] * 5, 0.0, 3), "^custom_mask_type: got 3"),
        (
            lambda: aten._efficient_attention_forward(*four, None, torch.tensor([0, 5]), None, 5, 7, 0.0, 0),
            "^cu_seqlens_k: got None",
        ),
        (
            lambda: aten._efficient_attention_forward(*four, None, *[torch.tensor([0, 5])] * 2, 5, 7, 0.0, 0),
            "cu_seqlens only supports batch size 1",
        ),
        (lambda: aten._cudnn_attention_forward(q, k, v, None, None, torch.tensor([0, 5]), 5, 7, True), "^cum_seq_q: "),
        (lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5), "do not support dropout > 0"),
        (lambda: aten._scaled_dot_product_flash_attention_for_cpu(q[0], k, v), "Accept only 4 dims"),
        (
            lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=torch.zeros(1, 5, 7)),
            r"mask dim in \{2, 4\}, got 3",
        ),
        (
            lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=torch.ones(5, 7).bool()),
            "Attention mask is the same data type as query",
        ),
    ):
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match=words):
                call()
