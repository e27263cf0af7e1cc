"""Biases: tables over the distance against the dense array they stand for, sums, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilewise as tw
from tilewise.masks.biases import LoweredBias, lower_bias, t5_buckets
from tilewise.masks.site import Site

LENGTHS = st.tuples(st.integers(0, 9), st.integers(0, 9))


def spread(lowered: LoweredBias, site: Site) -> np.ndarray:
    """(B, H, Sq, Sk): the sum of all that was lowered."""
    full = (site.batch, site.heads, site.q_len, site.k_len)
    total = np.zeros(full)
    for array in lowered.dense:
        total += np.asarray(array)
    if lowered.table is not None:
        table = np.broadcast_to(np.asarray(lowered.table), (*full[:2], max(site.q_len + site.k_len - 1, 0)))
        for i, j in np.ndindex(full[2:]):
            total[:, :, i, j] += table[:, :, j - i + site.q_len - 1]
    return total


def in_numpy(bias: object, site: Site) -> np.ndarray:
    return spread(lower_bias(bias, site, np, np.float64), site)


@given(LENGTHS, st.sampled_from(["start", "end", None]), st.booleans())
def test_alibi_is_minus_slope_times_distance(lengths, align, per_batch):
    q_len, k_len = lengths
    if align is None:
        k_len = q_len
    site = Site(2, 3, q_len, k_len)
    slopes = np.random.default_rng(0).random((2, 3) if per_batch else 3)
    offset = k_len - q_len if align == "end" else 0
    distance = np.abs(np.arange(k_len) - (np.arange(q_len)[:, None] + offset))
    want = -np.broadcast_to(slopes, (2, 3))[..., None, None] * distance
    np.testing.assert_allclose(in_numpy(tw.alibi(slopes, align), site), want, rtol=1e-15)


@given(LENGTHS, st.sampled_from([(), (1,), (3,), (1, 1), (1, 3), (2, 1), (2, 3)]))
def test_relative_adds_the_value_of_the_distance(lengths, leading):
    q_len, k_len = lengths
    site = Site(2, 3, q_len, k_len)
    table = np.random.default_rng(1).standard_normal((*leading, max(q_len + k_len - 1, 0)))
    got = in_numpy(tw.relative(table), site)
    full = np.broadcast_to(table, (2, 3, table.shape[-1]))
    for b, h, i, j in np.ndindex(2, 3, q_len, k_len):
        assert got[b, h, i, j] == full[b, h, j - i + q_len - 1]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (8, 128), (64, 1000), (4, 8)])
def test_t5_buckets_are_those_of_the_original(bidirectional, buckets, max_distance):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-3000, 3001)
    want = modeling.T5Attention._relative_position_bucket(
        torch.as_tensor(distance), bidirectional, buckets, max_distance
    )
    np.testing.assert_array_equal(t5_buckets(distance, buckets, bidirectional, max_distance), want.numpy())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("offset", [0, 7])
def test_t5_adds_the_weight_of_the_bucket(bidirectional, offset):
    site, weight = Site(1, 4, 6, 13), np.random.default_rng(2).standard_normal((8, 4))
    got = in_numpy(tw.t5(weight, bidirectional=bidirectional, max_distance=10, offset=offset), site)
    distance = np.arange(13) - np.arange(6)[:, None] - offset
    want = weight[t5_buckets(distance, 8, bidirectional, 10)].transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (4, 5), (3, 1, 5), (1, 4, 5), (2, 3, 4, 5), (2, 1, 1, 5)])
def test_an_array_is_a_dense_bias_in_place(shape):
    array = np.random.default_rng(3).standard_normal(shape)
    site = Site(2, 3, 4, 5)
    lowered = lower_bias(tw.alibi(np.zeros(3), "end") + array, site, np, np.float64)
    assert len(lowered.dense) == 1 and np.shares_memory(lowered.dense[0], array)
    np.testing.assert_array_equal(spread(lowered, site), np.broadcast_to(array, (2, 3, 4, 5)))


def test_sums_add_up_and_tables_become_one():
    site, rng = Site(2, 3, 4, 4), np.random.default_rng(4)
    dense, slopes, table = rng.standard_normal((4, 4)), rng.random(3), rng.standard_normal(7)
    total = dense + tw.alibi(slopes) + (tw.relative(table) + dense[None])
    lowered = lower_bias(total, site, np, np.float64)
    assert len(lowered.dense) == 2 and lowered.table.shape == (1, 3, 7)
    apart = in_numpy(tw.alibi(slopes), site) + in_numpy(tw.relative(table), site) + 2 * dense
    np.testing.assert_allclose(spread(lowered, site), apart, rtol=1e-14)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (3, 0), (1, 1), (4, 6)])
def test_torch_tables_are_numpys_and_carry_gradients(lengths):
    torch = pytest.importorskip("torch")
    from tilewise._arrays import namespace

    site, xp = Site(2, 3, *lengths), namespace("torch", torch.device("cpu"))
    parts = {
        tw.alibi: torch.rand(3, dtype=torch.float64),
        tw.relative: torch.rand(2, 3, max(sum(lengths) - 1, 0), dtype=torch.float64),
        tw.t5: torch.rand(8, 3, dtype=torch.float64),
    }
    for make, operand in parts.items():
        options = {"align": "end"} if make is tw.alibi else {}
        bias = make(operand.requires_grad_(), **options)
        table = lower_bias(bias, site, xp, torch.float64).table
        flat = make(operand.detach().numpy(), **options)
        np.testing.assert_allclose(table.detach(), lower_bias(flat, site, np, np.float64).table, rtol=1e-14)
        assert table.requires_grad
        assert next(iter(bias.operands())) is operand


def test_jax_tables_are_numpys_also_while_tracing():
    jax = pytest.importorskip("jax")
    site = Site(2, 3, 4, 6)
    slopes = np.linspace(0.1, 0.3, 3, dtype=np.float32)
    traced = jax.jit(lambda s: lower_bias(tw.alibi(s, "end"), site, jax.numpy, jax.numpy.float32).table)
    want = lower_bias(tw.alibi(slopes, "end"), site, np, np.float32).table
    np.testing.assert_allclose(traced(slopes), want, rtol=1e-6)


FLOATS = np.zeros(3)
WRONG = [
    (TypeError, "slopes", lambda: tw.alibi(np.arange(3))),
    (TypeError, "slopes", lambda: tw.alibi(0.5)),
    (ValueError, "align", lambda: tw.alibi(FLOATS, "middle")),
    (TypeError, "table", lambda: tw.relative("table")),
    (TypeError, "table", lambda: tw.relative(np.zeros(3, bool))),
    (TypeError, "weight", lambda: tw.t5(np.zeros((8, 2), int))),
    (ValueError, "weight", lambda: tw.t5(np.zeros((3, 2)))),
    (ValueError, "weight", lambda: tw.t5(np.zeros((7, 2)))),
    (TypeError, "bias", lambda: tw.alibi(FLOATS) + np.zeros((3, 3), bool)),
    (TypeError, "bias", lambda: tw.alibi(FLOATS) + 3),
    (TypeError, "bias", lambda: tw.alibi(FLOATS) + tw.causal()),
]


@pytest.mark.parametrize(("kind", "argument", "build"), WRONG)
def test_a_wrong_argument_is_named_first(kind, argument, build):
    with pytest.raises(kind, match=rf"^{argument}: "):
        build()


MISFITS = [
    tw.alibi(np.zeros(4), "end"), tw.alibi(np.zeros((3, 3)), "end"), tw.alibi(np.zeros(()), "end"),
    tw.alibi(np.zeros(3)),
    tw.relative(np.zeros(9)), tw.relative(np.zeros((2, 8))), tw.relative(np.zeros((3, 3, 8))),
    tw.relative(np.zeros((1, 1, 1, 8))),
    tw.relative(np.zeros(())), tw.t5(np.zeros((8, 4))), tw.t5(np.zeros((8,))), tw.t5(np.zeros((8, 1, 3))),
    tw.alibi(np.zeros(3), "end") + np.zeros((5, 5)), tw.alibi(np.zeros(3), "end") + np.zeros((1,) * 5),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MISFITS)))
def test_a_bias_that_does_not_fit_says_so(number):
    with pytest.raises(ValueError, match="^bias: "):
        lower_bias(MISFITS[number], Site(2, 3, 4, 5), np, np.float64)


def test_booleans_are_sent_to_the_mask():
    with pytest.raises(TypeError, match="mask="):
        tw.alibi(FLOATS) + np.zeros((3, 3), bool)
