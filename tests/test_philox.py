"""Philox4x32-10 against its published answers, and the same dropout mask from every framework and tile."""

import numpy as np
import pytest

import tilewise as tw
from tilewise.contract import Dropout
from tilewise.philox import keep_mask, philox

# Known answers published with Random123: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
FAMILIES = ["numpy", "narrow", "torch", "jax"]


def _namespace(family):
    """(xp, wide, array of positions)."""
    if family in ("numpy", "narrow"):
        return np, family == "numpy", np.asarray
    if family == "torch":
        torch = pytest.importorskip("torch")
        return torch, True, torch.as_tensor
    jnp = pytest.importorskip("jax.numpy")
    return jnp, False, lambda a: jnp.asarray(np.asarray(a) & 0xFFFFFFFF, dtype=jnp.uint32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(family, counter, key, expected):
    xp, wide, _ = _namespace(family)
    assert tuple(int(word[0]) for word in philox(counter, key, xp, wide)) == expected


def _keep(family, dropout, rows, keys, sizes=(3, 5, 7, 11), first=(0, 0)):
    batch, heads, q_len, k_len = sizes
    xp, wide, asarray = _namespace(family)
    grid = np.ix_(
        np.arange(batch), np.arange(heads), np.arange(rows.start, rows.stop), np.arange(keys.start, keys.stop)
    )
    b, h, i, j = (asarray(axis.astype(np.int64)) for axis in grid)
    return np.asarray(keep_mask(dropout, b, h, i, j, heads, q_len, k_len, xp, wide))


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_frameworks_agree(family):
    dropout = Dropout(0.3, (12345, 678), 2**40 + 3)
    expected = _keep("numpy", dropout, slice(0, 7), slice(0, 11))
    np.testing.assert_array_equal(_keep(family, dropout, slice(0, 7), slice(0, 11)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_indices_beyond_32_bits(family):
    sizes, rows, keys = (2, 3, 70_001, 90_007), slice(69_990, 70_001), slice(90_000, 90_007)
    got = _keep(family, Dropout(0.5, (7, 9)), rows, keys, sizes)
    for b, h, i, j in ((0, 0, 69_990, 90_000), (1, 2, 70_000, 90_006), (1, 0, 69_995, 90_003)):
        number = ((b * 3 + h) * 70_001 + i) * 90_007 + j
        word = philox((number & 0xFFFFFFFF, number >> 32, 0, 0), (7, 9), np)[0][0]
        assert got[b, h, i - rows.start, j - keys.start] == (word >= 2**31)


def test_sizes_beyond_32_bits_in_narrow_arithmetic():
    sizes = (1, 1, 3, 2**33 + 5)
    b, h, i, j = (np.asarray([value], np.int64) for value in (0, 0, 2, 12))
    wide = keep_mask(Dropout(0.5, (1, 2)), b, h, i, j, 1, *sizes[2:], np)
    narrow = keep_mask(Dropout(0.5, (1, 2)), b, h, i, j, 1, *sizes[2:], np, wide=False)
    np.testing.assert_array_equal(wide, narrow)


def test_a_tile_is_part_of_the_whole():
    dropout = Dropout(0.4, (1, 0))
    whole = _keep("numpy", dropout, slice(0, 7), slice(0, 11))
    np.testing.assert_array_equal(_keep("numpy", dropout, slice(2, 5), slice(3, 9)), whole[:, :, 2:5, 3:9])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1.0])
def test_share_kept(p):
    kept = _keep("numpy", Dropout(p, (3, 4)), slice(0, 100), slice(0, 100), (2, 2, 100, 100)).mean()
    assert abs(kept - (1 - p)) < 0.01


def test_streams_and_seeds_differ():
    masks = [
        _keep("numpy", Dropout(0.5, seed, stream), slice(0, 7), slice(0, 11))
        for seed, stream in (((0, 0), 0), ((1, 0), 0), ((0, 1), 0), ((0, 0), 1))
    ]
    assert len({mask.tobytes() for mask in masks}) == 4


@pytest.mark.parametrize("kernel", ["native", "portable"])
@pytest.mark.parametrize("strides", [(0, 0, 1, 0), (0, 5, 0, 0), (9, 0, 0, 3)])
def test_kernels_draw_by_the_strides_that_are_given(strides, kernel):
    """Keys, rows or heads that share their bits, too."""
    if kernel == "native":
        pytest.importorskip("tilewise._native")
    q, k, v = np.random.default_rng(3).standard_normal((3, 2, 4, 5, 6))
    dropout = Dropout(0.5, 3, first=7, strides=strides)
    expected = tw.attention(q, k, v, dropout=dropout, kernel="reference", allow_quadratic=True)
    np.testing.assert_allclose(tw.attention(q, k, v, dropout=dropout, kernel=kernel), expected, atol=1e-12)


def test_pairs_must_differ_in_their_numbers():
    q = np.ones((1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"^dropout: got strides = \(0, 0, 0, 0\)"):
        tw.attention(q, q, q, dropout=Dropout(0.5, 3, strides=(0, 0, 0, 0)))
