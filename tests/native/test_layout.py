"""Heads between the rows of keys and values change no bit, though such rows are copied before they are used."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest
from support.portable_cases import planned

import tilewise as tw
from tilewise.kernels.native.backward import backward
from tilewise.kernels.native.forward import forward

pytest.importorskip("tilewise._native")
pytestmark = pytest.mark.usefixtures("page", "loud_memory")

HEADS = 9


@pytest.fixture(autouse=True)
def one_thread():
    """More would be given fewer tiles each, of which too few are not worth a copy."""
    tw.set_num_threads(1)
    yield
    tw.set_num_threads(0)


def _between_heads(array: np.ndarray) -> np.ndarray:
    """The same numbers (B, H, S, D) with the rows of H heads beside each other, and rubbish where no row ends."""
    batch, heads, length, width = array.shape
    memory = np.full((batch, length, heads, width + 3), np.nan, array.dtype)
    memory[..., :width] = array.swapaxes(1, 2)
    return memory[..., :width].swapaxes(1, 2)


def _results(q, k, v, d_out, **options) -> list[np.ndarray]:
    plan, operands = planned(q=q, k=k, v=v, kernel="native", tiles=None, **options)
    out, lse = forward(plan, operands)
    found = backward(plan, operands, out, lse, d_out, None)
    return [out, lse, found.q, found.k, found.v]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 64), (40, 130), (1, 65)], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["finite", "NaN behind the mask"])
def test_heads_between_rows(dtype, dims, hidden) -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, HEADS, 300, dims[0]), (1, HEADS, 333, dims[0]), (1, HEADS, 333, dims[1]), (1, HEADS, 300, dims[1])]
    q, k, v, d_out = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    if hidden:
        k[:, :, 200] = v[:, :, 201] = np.nan
    seen = np.ones((1, 1, 300, 333), bool)
    seen[..., 200:202] = False
    options = {"mask": tw.dense(seen)}
    close = _results(q, k, v, d_out, **options)
    apart = _results(q, _between_heads(k), _between_heads(v), d_out, **options)
    for got, expected in zip(apart, close, strict=True):
        assert np.isfinite(expected.astype("float64")).all()
        assert got.tobytes() == expected.tobytes()
