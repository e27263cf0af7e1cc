"""The fixture loud_memory, on which other tests rely to see elements that nobody wrote."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np
import pytest

FLOATING = ["float64", "float32", "float16", "bfloat16"]


@pytest.mark.usefixtures("loud_memory")
@pytest.mark.parametrize("dtype", FLOATING)
def test_numpy(dtype) -> None:
    like = np.zeros((3, 5), dtype)
    fresh = [np.empty(7, dtype), np.empty(shape=(2, 3), dtype=like.dtype), np.empty_like(like), np.empty((), dtype)]
    assert all(array.dtype == like.dtype and np.isnan(array).all() for array in fresh)
    assert not np.isnan(like).any()


@pytest.mark.usefixtures("loud_memory")
def test_numpy_where_there_is_no_nan() -> None:
    assert np.empty(3, np.int64).dtype == np.int64
    assert np.empty(3, [("a", np.float32), ("b", np.int8)]).dtype.names == ("a", "b")
    assert np.empty(3, "V2").dtype.itemsize == 2  # the bytes of a bfloat16, but not one


@pytest.mark.parametrize("dtype", FLOATING)
def test_torch(dtype, request) -> None:
    torch = pytest.importorskip("torch")
    request.getfixturevalue("loud_memory")  # which fills torch's memory where torch is loaded
    kind = getattr(torch, dtype)
    like = torch.zeros(3, 5, dtype=kind)
    fresh = [torch.empty(7, dtype=kind), torch.empty_like(like), like.new_empty(2, 3)]
    fresh.append(torch.empty_strided((2, 3), (1, 2), dtype=kind))
    assert all(tensor.dtype == kind and tensor.isnan().all() for tensor in fresh)
    assert not like.isnan().any()
