"""aten's forward functions on packed sequences: each is what it would be alone, and its neighbours stay unseen."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from support.aten_cases import band, make, plain, starts  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

from tilewise.compat import torch_aten as aten  # noqa: E402

close = torch.testing.assert_close
Q_LENGTHS, K_LENGTHS = (3, 0, 5, 2), (4, 3, 2, 0)
MAX_Q, MAX_K = max(Q_LENGTHS), max(K_LENGTHS)
CUTS = (starts(Q_LENGTHS), starts(K_LENGTHS))


def packed(rest=0, dtype=torch.float64, **options):
    """q (Tq + rest, 4, 6), k (Tk, 2, 6), v (Tk, 2, 5)."""
    shapes = ((sum(Q_LENGTHS) + rest, 4, 6), (sum(K_LENGTHS), 2, 6), (sum(K_LENGTHS), 2, 5))
    return tuple(make(*shape, **options).to(dtype) for shape in shapes)


def alone(q, k, v, n, used=None, **options):
    """Plain attention of sequence n as (B = 1, H, S, D), its options being functions of its lengths."""
    (a, b), (c, d) = (cuts[n : n + 2].tolist() for cuts in CUTS)
    d = d if used is None else c + used[n]
    q, k, v = q[a:b], k[c:d], v[c:d]
    given = {name: option(b - a, d - c) for name, option in options.items()}
    return slice(a, b), plain(*(x.transpose(0, 1)[None] for x in (q, k, v)), **given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(None, None), (1, 1), (2, -1)], ids=str)
@pytest.mark.parametrize("slopes", [None, (4,), (4, 4)], ids=str)
@pytest.mark.parametrize("used", [None, (2, 3, 0, 0)], ids=str)
def test_flash(causal, widths, slopes, used):
    q, k, v = packed(rest=2)
    slopes = make(slopes).abs() if slopes else None
    if used:
        for n, length in enumerate(used):
            k[CUTS[1][n] + length : CUTS[1][n + 1]] = v[CUTS[1][n] + length : CUTS[1][n + 1]] = torch.nan
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, *CUTS, MAX_Q, MAX_K, 0.0, causal, False, window_size_left=widths[0], window_size_right=widths[1],
        alibi_slopes=slopes, seqused_k=torch.tensor(used, dtype=torch.int32) if used else None,
    )  # fmt: skip
    assert (out.shape, lse.shape) == ((12, 4, 5), (4, 12))
    left, right = (None if width in (None, -1) else width for width in widths)
    for n in range(4):

        def bias(q_len, k_len, n=n):
            own = slopes if slopes.dim() == 1 else slopes[n]
            return -own[:, None, None] * (torch.arange(k_len) - torch.arange(q_len)[:, None] - k_len + q_len).abs()

        options = {"visible": lambda a, b: band(a, b, b - a, left, 0 if causal else right)}
        options |= {"bias": bias} if slopes is not None else {}
        rows, expected = alone(q, k, v, n, used, **options)
        close((out[rows].transpose(0, 1)[None], lse[None, :, rows]), expected)
    assert out[10:].eq(0).all()  # behind the last sequence
    assert lse[:, 10:].eq(-math.inf).all()


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("used", [None, (2, 3, 1, 0)], ids=str)
def test_efficient(kind, biased, size, used):
    q, k, v = packed()
    bias = make(4, 4, MAX_Q, MAX_K) if biased else None
    out, lse, _, _, max_q, max_k = aten._efficient_attention_forward(
        q[None], k[None], v[None], bias, *CUTS, MAX_Q, MAX_K, 0.0, kind, True, window_size=size,
        seqlen_k=torch.tensor(used, dtype=torch.int32) if used else None,
    )  # fmt: skip
    assert (out.shape, lse.shape, max_q, max_k) == ((1, 10, 4, 5), (4, 4, MAX_Q), MAX_Q, MAX_K)
    for n, length in enumerate(Q_LENGTHS):
        options = {
            "visible": lambda a, b: band(
                a, b, b - a if kind == 2 else 0, size - 1 if size else None, 0 if kind else None
            )
        }
        options |= {"bias": lambda a, b, n=n: bias[n, None, :, :a, :b]} if biased else {}
        rows, expected = alone(q, k, v, n, used, **options)
        close((out[0, rows].transpose(0, 1)[None], lse[n, None, :, :length]), expected)
        assert lse[n, :, length:].eq(-math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (MAX_Q, MAX_K), (4, 1, MAX_Q, MAX_K), (1, 4, MAX_Q, MAX_K)], ids=str)
def test_cudnn(causal, bias_shape):
    q, k, v = packed()
    bias = make(bias_shape) if bias_shape else None
    out, lse, cum_q, cum_k, max_q, max_k, *_ = aten._cudnn_attention_forward(
        q, k, v, bias, *CUTS, MAX_Q, MAX_K, True, 0.0, causal
    )
    assert cum_q is CUTS[0]
    assert cum_k is CUTS[1]
    assert (max_q, max_k) == (MAX_Q, MAX_K)
    full = bias.expand(4, 4, MAX_Q, MAX_K) if bias_shape else None
    for n in range(4):
        options = {"visible": lambda a, b: band(a, b, 0, None, 0 if causal else None)}
        options |= {"bias": lambda a, b, n=n: full[n, None, :, :a, :b]} if bias_shape else {}
        rows, expected = alone(q, k, v, n, **options)
        close((out[rows].transpose(0, 1)[None], lse[None, :, rows]), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_of_self_attention_is_one_call(causal):
    cuts, slopes = starts((3, 5)), torch.rand(2, dtype=torch.float64)
    q, k, v = (make(10, 2, 4) for _ in range(3))
    one, many = (
        aten._flash_attention_forward(q, k, v, cuts, other, 5, 5, 0.0, causal, False, alibi_slopes=slopes)
        for other in (cuts, cuts.clone())
    )
    close(one[0], many[0])
    close(one[1], many[1])
    assert one[0][8:].eq(0).all()


def test_derivatives():
    q, k, v = packed(requires_grad=True)
    slopes = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    bias = make(4, 4, MAX_Q, MAX_K, requires_grad=True)

    def flash(q, k, v, slopes=None):
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, *CUTS, MAX_Q, MAX_K, 0.0, True, False, alibi_slopes=slopes
        )
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    def efficient(q, k, v, bias=None):
        out, lse, *_ = aten._efficient_attention_forward(
            q[None], k[None], v[None], bias, *CUTS, MAX_Q, MAX_K, 0.0, 2, True
        )
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    for function, tensors in ((flash, (q, k, v)), (flash, (q, k, v, slopes)), (efficient, (q, k, v, bias))):
        assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("slopes", [None, torch.zeros(4, dtype=torch.float64)], ids=["at once", "one by one"])
def test_dropout(slopes):
    """Repeated by the seed, and as frequent as it should be."""
    cuts = starts((200, 300))
    q = torch.zeros(500, 4, 2, dtype=torch.float64)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(
            aten._flash_attention_forward(q, q, q + 1, cuts, cuts, 300, 300, 0.3, False, False, alibi_slopes=slopes)
        )
    close(found[0], found[1])
    out = found[0][0]
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert 0.01 < out[..., 0].std() < 0.1
    assert not torch.equal(out[:200], out[200:400])
