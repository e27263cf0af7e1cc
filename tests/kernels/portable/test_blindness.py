"""What is masked cannot be seen: NaN and inf reach exactly the rows that see them, forward and backward."""

import numpy as np
import pytest
from support.poison import MASKS, poisoned, rows_that_see
from support.portable_cases import SMALL, arrays, planned

import tilewise as tw
from tilewise.contract import Tiles
from tilewise.kernels.portable.backward import backward
from tilewise.kernels.portable.forward import forward
from tilewise.kernels.reference import dense


@pytest.mark.parametrize("tiles", [SMALL, Tiles(13, 17)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MASKS)
def test_forward(name, value, tiles):
    mask = MASKS[name]()
    plan, operands = planned(**poisoned(arrays(), value), mask=mask, tiles=tiles)
    out, lse = forward(plan, operands)
    clean_plan, clean = planned(**arrays(), mask=mask, tiles=tiles)
    clean_out, clean_lse = forward(clean_plan, clean)
    blind = ~rows_that_see(mask)
    np.testing.assert_array_equal(out[blind], clean_out[blind])
    np.testing.assert_array_equal(lse[blind], clean_lse[blind])
    exact = dense.attention(plan.problem, operands)
    np.testing.assert_allclose(out, exact.out, atol=1e-12)
    np.testing.assert_allclose(lse, exact.lse, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_a_visible_nan_reaches_every_row_that_sees_it(name):
    mask = MASKS[name]()
    plan, operands = planned(**poisoned(arrays(), np.nan), mask=mask)
    out, _ = forward(plan, operands)
    assert np.isnan(out[..., 1:3]).all(-1)[rows_that_see(mask)].all()


@pytest.mark.parametrize("tiles", [SMALL, Tiles(13, 17)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", MASKS)
def test_backward(name, value, tiles):
    mask = MASKS[name]()
    plan, operands = planned(**poisoned(arrays(), value), mask=mask, tiles=tiles)
    exact = dense.attention(plan.problem, operands)
    rng = np.random.default_rng(4)
    d_out, d_lse = rng.standard_normal(exact.out.shape), rng.standard_normal(exact.lse.shape)
    d_out[0, 1, 4] = value  # the gradient of a row may be spoilt as well
    got = backward(plan, operands, exact.out, exact.lse, d_out, d_lse)
    want = dense.gradients(exact, d_out, d_lse)
    for field in ("q", "k", "v"):
        np.testing.assert_array_equal(
            np.isfinite(getattr(got, field)), np.isfinite(getattr(want, field)), err_msg=field
        )
        np.testing.assert_allclose(
            np.nan_to_num(getattr(got, field), posinf=0, neginf=0),
            np.nan_to_num(getattr(want, field), posinf=0, neginf=0),
            atol=1e-11,
        )


def test_rows_that_see_nothing_pass_nothing_on():
    operands = arrays()
    operands["q"][:, :, 8:] = np.nan
    mask = tw.lengths(q=np.array([8, 8]))
    plan, operands = planned(**operands, mask=mask, sinks=0.3)
    out, lse = forward(plan, operands)
    assert (out[:, :, 8:] == 0).all() and (lse[:, :, 8:] == -np.inf).all()
    d_out = np.ones_like(out)
    d_out[:, :, 8:] = np.nan
    got = backward(plan, operands, out, lse, d_out, np.where(np.arange(13) >= 8, np.nan, 1.0) + 0 * out[..., 0])
    assert (got.q[:, :, 8:] == 0).all()
    assert all(np.isfinite(getattr(got, field)).all() for field in ("q", "k", "v", "sinks"))


def test_bias_hides_what_it_forbids():
    operands = arrays()
    bias = np.zeros((13, 17))
    bias[:, 5] = -np.inf
    bias[3] = -np.inf
    operands["k"][:, :, 5], operands["v"][:, :, 5] = np.nan, np.inf
    plan, given = planned(**operands, bias=bias)
    out, lse = forward(plan, given)
    assert np.isfinite(out).all() and (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -np.inf).all()
    got = backward(plan, given, out, lse, np.ones_like(out), np.ones_like(lse))
    assert np.isfinite(got.q).all() and np.isfinite(got.k).all() and np.isfinite(got.v).all()
    assert np.isfinite(got.dense[0]).all() and (got.dense[0][..., 5] == 0).all()
