"""aten's backward functions: gradients of the whole, and of a part of a larger whole, as rings of devices need them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from support.aten_cases import band, make, plain, starts  # noqa: E402

import tilewise  # noqa: E402
from tilewise.compat import torch_aten as aten  # noqa: E402

close = torch.testing.assert_close
SIZES = (2, 4, 2, 5, 7, 8, 6)


def inputs(**options):
    batch, heads, kv_heads, q_len, k_len, dim, value_dim = SIZES
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim))
    return tuple(make(*shape, requires_grad=True, **options) for shape in shapes)


def swapped(*arrays):
    return tuple(array.transpose(1, 2) for array in arrays)


def detached(*arrays):
    return tuple(array.detach() if isinstance(array, torch.Tensor) else array for array in arrays)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_flash(p, causal):
    q, k, v = inputs()
    out, lse, cum_q, cum_k, max_q, max_k, state, unused, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, p, causal
    )
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    given = detached(grad, q, k, v, out, lse)
    close(
        aten._scaled_dot_product_flash_attention_backward(*given, cum_q, cum_k, max_q, max_k, p, causal, state, unused),
        expected,
    )
    raw = aten._flash_attention_backward(
        *swapped(*given[:5]), given[5], None, None, max_q, max_k, p, causal, state, unused
    )
    close(swapped(*raw), expected)
    # seed and offset as two tensors, as on AMD
    seed, offset = state.view(torch.int64).unbind()
    close(
        aten._scaled_dot_product_flash_attention_backward(*given, None, None, max_q, max_k, p, causal, seed, offset),
        expected,
    )


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_flash_windows_and_packed(p):
    cuts, left = (starts((3, 2)), starts((4, 3))), 2
    q, k, v = (make(n, 2, 4, requires_grad=True) for n in (5, 7, 7))
    out, lse, state, unused, _ = aten._flash_attention_forward(
        q, k, v, *cuts, 3, 4, p, True, False, window_size_left=left
    )
    grad = torch.randn_like(out)
    found = aten._flash_attention_backward(
        *detached(grad, q, k, v, out, lse), *cuts, 3, 4, p, True, state, unused, window_size_left=left
    )
    close(found, torch.autograd.grad(out, (q, k, v), grad))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", [(True,) * 4, (True, False, True, False)], ids=str)
def test_efficient(p, wanted):
    q, k, v = inputs()
    bias = make(2, 1, 5, 7, requires_grad=True)
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, p, True)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v, bias), grad)
    padded = torch.cat([lse, torch.full((2, 4, 27), torch.inf)], -1)  # as CUTLASS gives it
    found = aten._scaled_dot_product_efficient_attention_backward(
        *detached(grad, q, k, v, bias, out, padded), seed, offset, p, list(wanted), True
    )
    for got, one, want in zip(found, expected, wanted, strict=True):
        assert (got is not None) == want
        if want:
            close(got, one)
    raw = aten._efficient_attention_backward(
        *swapped(*detached(grad, q, k, v)), bias.detach(), *swapped(out.detach()), None, None, 5, 7, lse.detach(), p,
        seed, offset, 1, wanted[3],
    )  # fmt: skip
    close(swapped(*raw[:3]), expected[:3])
    assert (raw[3] is not None) == wanted[3]


def test_efficient_packed():
    cuts = starts((3, 2)), starts((4, 3))
    q, k, v = (make(1, n, 2, 4, requires_grad=True) for n in (5, 7, 7))
    bias = make(2, 2, 3, 4, requires_grad=True)
    for given in (None, bias):
        out, lse, seed, offset, *_ = aten._efficient_attention_forward(q, k, v, given, *cuts, 3, 4, 0.3, 2, True)
        grad = torch.randn_like(out)
        found = aten._efficient_attention_backward(
            *detached(grad, q, k, v, given, out), *cuts, 3, 4, lse.detach(), 0.3, seed, offset, 2, given is not None
        )
        tensors = (q, k, v) if given is None else (q, k, v, given)
        close(found[: len(tensors)], torch.autograd.grad(out, tensors, grad))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_cudnn(p):
    q, k, v = inputs()
    bias = make(4, 5, 7)
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, True, p, True
    )
    grad = torch.randn_like(out)
    for statistics in (lse, lse[..., None]):
        found = aten._scaled_dot_product_cudnn_attention_backward(
            *detached(grad, q, k, v, out, statistics), seed, offset, bias, cum_q, cum_k, max_q, max_k, p, True
        )
        close(found, torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_for_cpu_is_torch_s(causal, masked):
    q, k, v = (make(2, 4, n, 8, requires_grad=True) for n in (5, 7, 7))
    mask = make(2, 1, 5, 7) if masked else None
    ours = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    given = detached(q, k, v)
    theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, causal, attn_mask=mask)
    close(ours, theirs)
    grad = torch.randn_like(ours[0])
    options = (0.0, causal)
    close(
        aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *given, *theirs, *options, attn_mask=mask),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *given, *theirs, *options, attn_mask=mask
        ),
    )


def test_a_part_of_a_larger_whole():
    """Keys in two places, merged: each place gets its share from the merged output and log-sum-exp."""
    q, k, v = inputs()
    visible = band(5, 7, 2, right=0)
    whole, _ = plain(q, k, v, visible=visible)
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    first, second = ((k[:, :, keys].detach(), v[:, :, keys].detach()) for keys in (slice(0, 2), slice(2, 7)))
    query = q.detach()
    parts = [
        aten._scaled_dot_product_flash_attention(query, *first)[:2],
        aten._scaled_dot_product_flash_attention(query, *second, is_causal=True)[:2],
    ]
    out, lse = tilewise.merge(*parts[0], *parts[1])
    close(out, whole.detach())
    found = [
        aten._scaled_dot_product_flash_attention_backward(
            grad, query, *keys, out, lse, None, None, 5, keys[0].shape[2], 0.0, causal, *[torch.zeros(())] * 2
        )
        for keys, causal in ((first, False), (second, True))
    ]
    close(found[0][0] + found[1][0], expected[0])
    for n in (1, 2):
        close(torch.cat([found[0][n], found[1][n]], 2), expected[n])


def test_rows_that_see_nothing_and_gradients_of_gradients():
    q, k, v = (make(1, 2, n, 4, requires_grad=True) for n in (5, 3, 3))
    grad = make(1, 2, 5, 4, requires_grad=True)

    def backward(q, k, v, grad):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, 5, 3, 0.0, True, *[torch.zeros(())] * 2
        )

    found = backward(q, k, v, grad)
    assert all(part.isfinite().all() for part in found)
    assert found[0][:, :, :2].eq(0).all()
    assert torch.autograd.gradcheck(backward, (q, k, v, grad), fast_mode=True)
