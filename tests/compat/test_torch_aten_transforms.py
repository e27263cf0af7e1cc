"""aten's functions under torch's compiler, under vmap, and with nothing to do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from support.aten_cases import make  # noqa: E402

from tilewise.compat import torch_aten as aten  # noqa: E402

close = torch.testing.assert_close
CUTS = torch.tensor([0, 5, 10]), torch.tensor([0, 7, 14])


def rows(x):
    """(B, H, S, D) packed as (B * S, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


CALLS = {
    "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2],
    "flash, dropout": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.3, True)[:2],
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.3, True)[:2],
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2],
    "packed": lambda q, k, v: aten._flash_attention_forward(
        rows(q), rows(k), rows(v), *CUTS, 5, 7, 0.0, True, False, window_size_left=3
    )[:2],
    "efficient, packed": lambda q, k, v: aten._efficient_attention_forward(
        rows(q)[None], rows(k)[None], rows(v)[None], None, *CUTS, 5, 7, 0.0, 1, True
    )[:2],
}


def inputs():
    return tuple(make(2, 2, n, 4, requires_grad=True) for n in (5, 7, 7))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    given, found = inputs(), []
    for function in (torch.compile(CALLS[name], fullgraph=True, backend="aot_eager"), CALLS[name]):
        torch.manual_seed(4)
        out, lse = function(*given)
        found.append((out, lse, torch.autograd.grad(out.sin().sum(), given)))
    close(*found)


@pytest.mark.parametrize("name", [name for name in CALLS if "dropout" not in name and name != "efficient"])
def test_vmap(name):
    q, k, v = inputs()
    many = torch.stack([q, q + 1, 2 * q])
    found = torch.vmap(lambda q: CALLS[name](q, k, v))(many)
    alone = [CALLS[name](q, k, v) for q in many]
    close(found, tuple(torch.stack(parts) for parts in zip(*alone, strict=True)))


def test_vmap_draws_as_it_is_told():
    q, k, v = inputs()
    many = q.expand(2, *q.shape)
    for randomness, same in (("same", True), ("different", False)):
        out, _ = torch.vmap(lambda q: CALLS["flash, dropout"](q, k, v), randomness=randomness)(many)
        assert torch.equal(out[0], out[1]) == same


@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens(sequences):
    nothing, cuts = make(0, 2, 4), torch.zeros(sequences + 1, dtype=torch.int32)
    for other in (cuts, cuts.clone()):
        for slopes in (None, torch.ones(2)):
            out, lse, *_ = aten._flash_attention_forward(
                nothing, nothing, nothing, cuts, other, 0, 0, 0.1, True, False, alibi_slopes=slopes
            )
            assert (out.shape, lse.shape) == ((0, 2, 4), (2, 0))
    given = (nothing[None],) * 3
    out, lse, *_ = aten._efficient_attention_forward(*given, None, cuts, cuts, 0, 0, 0.1, 1, True)
    assert (out.shape, lse.shape) == ((1, 0, 2, 4), (sequences, 2, 0))
