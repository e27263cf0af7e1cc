"""Rotary embedding against transformers' own functions, and what must hold of any rotation."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tilewise.torch.positions.rotary import (  # noqa: E402
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    YarnScaling,
    rotary,
    rotary_frequencies,
    rotary_tables,
)


def some(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def llama(**parameters):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, **parameters},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_llama(dtype):
    theirs = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = some(2, 4, 9, 16, dtype=dtype), some(2, 2, 9, 16, dtype=dtype, seed=1)
    positions = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 400, 401, 402, 403, 404]])
    cos, sin = theirs.LlamaRotaryEmbedding(llama())(q, positions)
    for expected, x in zip(theirs.apply_rotary_pos_emb(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(rotary(x, positions, theta=5e5), expected)
        assert torch.equal(rotary(x, cos=cos, sin=sin), expected)
        swapped = rotary(x.transpose(1, 2), positions, theta=5e5, layout="bshd")
        assert torch.equal(swapped.transpose(1, 2), expected)


def test_gptj():
    theirs = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = some(2, 9, 4, 16, dtype=torch.float32)
    sin, cos = theirs.create_sinusoidal_positions(20, 12)[torch.arange(5, 14)].expand(2, -1, -1).split(6, -1)
    expected = torch.cat([theirs.apply_rotary_pos_emb(x[..., :12], sin, cos), x[..., 12:]], -1)
    got = rotary(x, 5, interleaved=True, dims=12, layout="bshd")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    wide = [table.repeat_interleave(2, -1) for table in (cos, sin)]
    assert torch.equal(rotary(x, cos=wide[0], sin=wide[1], interleaved=True, dims=12, layout="bshd"), expected)


@pytest.mark.parametrize(
    ("kind", "scaling", "parameters"),
    [
        ("linear", LinearScaling(3.0), {"factor": 3.0}),
        ("dynamic", NtkScaling(4.0), {"factor": 2.0}),
        (
            "llama3",
            Llama3Scaling(8.0, 1.0, 4.0, 128),
            {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ("yarn", YarnScaling(4.0, 128), {"factor": 4.0, "original_max_position_embeddings": 128}),
        (
            "yarn",
            YarnScaling(4.0, 128, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
            {
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16,
                "beta_slow": 2,
                "attention_factor": 1.5,
            },
        ),
    ],
)
def test_scalings(kind, scaling, parameters):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    # Their dynamic rule at 2.5 times the trained length: 2 * 2.5 - (2 - 1) = 4.
    expected, magnitude = rope.ROPE_INIT_FUNCTIONS[kind](llama(rope_type=kind, **parameters), "cpu", seq_len=1280)
    torch.testing.assert_close(rotary_frequencies(16, theta=5e5, scaling=scaling), expected, rtol=1e-5, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude)
    cos, _ = rotary_tables(torch.tensor([0, 7]), 16, theta=5e5, scaling=scaling)
    torch.testing.assert_close(cos[1], (7 * expected).cos() * magnitude)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "^factor", lambda: LinearScaling(0.0)),
        (ValueError, "^factor", lambda: NtkScaling(-2.0)),
        (TypeError, "^factor", lambda: NtkScaling("2")),
        (ValueError, "^original_length", lambda: YarnScaling(4.0, 0)),
        (ValueError, "^beta_slow", lambda: YarnScaling(4.0, 128, beta_slow=0.0)),
        (ValueError, "^beta_fast", lambda: YarnScaling(4.0, 128, beta_fast=0.5)),
        (ValueError, "^attention_factor", lambda: YarnScaling(4.0, 128, attention_factor=0.0)),
        (ValueError, "^high_freq_factor", lambda: Llama3Scaling(8.0, 4.0, 4.0)),
        (ValueError, "^theta", lambda: rotary_frequencies(16, theta=1.0, scaling=YarnScaling(4.0, 128))),
    ],
)
def test_scalings_are_checked_when_made(error, message, make):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation(interleaved):
    x, y = some(1, 1, 1, 10), some(1, 1, 1, 10, seed=1)

    def product(a, b):
        return (rotary(x, a, interleaved=interleaved) * rotary(y, b, interleaved=interleaved)).sum()

    torch.testing.assert_close(product(3, 8), product(103, 108))
    torch.testing.assert_close(rotary(x, 9, interleaved=interleaved).norm(), x.norm())
    pairs = x.reshape(5, 2) if interleaved else x.reshape(2, 5).T
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(5).double(), 7 * rotary_frequencies(10, dtype=torch.float64)
    )
    turned = torch.view_as_real(turned)
    torch.testing.assert_close(
        rotary(x, 7, interleaved=interleaved).flatten(), (turned if interleaved else turned.T).flatten()
    )


@pytest.mark.parametrize(
    "options", [{}, {"interleaved": True}, {"dims": 4}, {"scaling": YarnScaling(4.0, 128)}], ids=str
)
def test_inverse(options):
    x = some(2, 3, 5, 8)
    turned = rotary(x, 11, **options)
    assert not torch.equal(turned, x)
    torch.testing.assert_close(rotary(turned, 11, inverse=True, **options), x)


def test_lists_and_arrays():
    x, positions = some(2, 3, 5, 8), [4, 0, 9, 1, 2]
    expected = rotary(x, torch.tensor(positions))
    assert torch.equal(rotary(x, positions), expected)
    assert torch.equal(rotary(x, np.array(positions)), expected)
    cos, sin = rotary_tables(positions, 8, dtype=torch.float64)
    assert torch.equal(rotary(x, cos=cos.numpy(), sin=sin.numpy()), expected)
    assert torch.equal(rotary(x, np.int64(3)), rotary(x, 3))


def test_packed():
    x, positions = some(7, 3, 8), torch.tensor([0, 1, 2, 0, 1, 2, 3])
    got = rotary(x, positions, layout="thd")
    assert torch.equal(got[3:], rotary(x[3:].transpose(0, 1)[None])[0].transpose(0, 1))


def test_angles_do_not_suffer_from_half_types():
    x = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16)
    far = rotary(x, 100_003)
    torch.testing.assert_close(far, rotary(x.float(), 100_003).bfloat16(), rtol=0, atol=1e-2)
    exact = rotary_tables(torch.tensor([1e9], dtype=torch.float64), 2, dtype=torch.float64)[0]
    assert exact.item() == torch.tensor(1e9, dtype=torch.float64).cos().item()


def test_derivatives():
    x = some(1, 2, 3, 6).requires_grad_()
    positions = torch.tensor([4, 0, 9])
    for options in ({}, {"interleaved": True, "dims": 4}):
        turn = lambda x, options=options: rotary(x, positions, **options)  # noqa: E731
        assert torch.autograd.gradcheck(turn, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(turn, x)
        mapped = torch.func.vmap(turn)(torch.stack([x, 2 * x]))
        torch.testing.assert_close(mapped[1], 2 * turn(x))


def test_compiles_whole():
    x = some(1, 2, 5, 8, dtype=torch.float32)
    compiled = torch.compile(lambda x, p: rotary(x, p), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, torch.arange(5)), rotary(x))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "^dims", {"dims": 3}),
        (ValueError, "^dims", {"dims": 10}),
        (ValueError, "^positions: has shape", {"positions": torch.arange(4)}),
        (ValueError, "^positions", {"positions": torch.arange(5), "cos": torch.ones(5, 4), "sin": torch.ones(5, 4)}),
        (ValueError, "^sin", {"cos": torch.ones(5, 4)}),
        (ValueError, "^cos: has shape", {"cos": torch.ones(5, 3), "sin": torch.ones(5, 4)}),
        (ValueError, "^layout", {"layout": "dshb"}),
        (ValueError, "^x: has shape", {"layout": "thd"}),
        (TypeError, "^x", {"x": torch.ones(2, 3, 5, 8, dtype=torch.int64)}),
        (TypeError, "^scaling", {"scaling": 2.0}),
        (ValueError, "^theta", {"theta": 0.0}),
        (TypeError, "^theta", {"theta": "10000"}),
        (TypeError, "^dims", {"dims": 4.0}),
        (TypeError, "^positions", {"positions": "all"}),
        (TypeError, "^positions", {"positions": [True] * 5}),
        (ValueError, "^positions", {"positions": [[0, 1], [2]]}),
        (TypeError, "^sin", {"cos": torch.ones(5, 4), "sin": "none"}),
    ],
)
def test_errors(error, message, change):
    with pytest.raises(error, match=message):
        rotary(**{"x": some(2, 3, 5, 8), **change})
