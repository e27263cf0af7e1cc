"""Every road to a mask's picture gives the same picture: its definition, `materialize`, and its lowered facts."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mask_oracle import expected
from support.mask_strategies import KINDS, PREDICATES, masks, primitive, sizes

from tilewise.masks.algebra import Mask
from tilewise.masks.lower import TILE, LoweredMask, lower
from tilewise.masks.materialize import materialize, picture
from tilewise.masks.primitives import blocks, causal, dense, documents, lengths, predicate, prefix, window
from tilewise.masks.ranges import MOST_RANGES, Ranges
from tilewise.masks.site import Site
from tilewise.masks.tiles import EMPTY, FULL, classify


@st.composite
def cases(draw: st.DrawFn, largest: int = 9, **options: bool) -> tuple[Mask, tuple[int, int, int, int]]:
    size = draw(sizes(largest))
    return draw(masks(size, **options)), size


def check_ranges(ranges: Ranges, site: Site) -> None:
    """The invariants that `ranges.py` promises."""
    starts, stops = np.asarray(ranges.starts), np.asarray(ranges.stops)
    assert starts.shape == stops.shape and starts.ndim == 4 and starts.shape[2] == site.q_len
    assert starts.shape[0] in (1, site.batch) and starts.shape[1] in (1, site.heads)
    assert np.all((starts >= 0) & (stops <= site.k_len) & (starts <= stops))
    empty = starts == stops
    assert np.all(np.where(empty, (starts == site.k_len), True)), "an empty interval is not [Sk, Sk)"
    assert np.all(empty[..., 1:] >= empty[..., :-1]), "an empty interval stands before one that is not"
    apart = (starts[..., 1:] > stops[..., :-1]) | empty[..., 1:]
    assert np.all(apart), "intervals overlap, touch or are unsorted"


def unpack(lowered: LoweredMask) -> np.ndarray:
    """(B', H', Sq, Sk) booleans from the packed tiles."""
    site = lowered.site
    bits = lowered.tile_bits(0, site.q_len)
    answer = np.zeros((*bits.index.shape[:2], site.q_len, site.k_len), bool)
    for b, h, iq, ik in np.ndindex(*bits.index.shape):
        number = bits.index[b, h, iq, ik]
        tile = answer[b, h, iq * TILE : (iq + 1) * TILE, ik * TILE : (ik + 1) * TILE]
        if number >= 0:
            rows = np.arange(tile.shape[0], dtype=np.uint64)
            tile[:] = (bits.words[number, None, : tile.shape[1]] >> rows[:, None]) & np.uint64(1)
        else:
            tile[:] = number == -2
    return answer


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_each_primitive_alone_agrees_with_its_definition(kind, data):
    size = data.draw(sizes(7))
    mask = data.draw(primitive(kind, size))
    truth = expected(mask, size)
    np.testing.assert_array_equal(materialize(mask, size[2], size[3], batch=size[0], heads=size[1]), truth)
    np.testing.assert_array_equal(picture(lower(mask, Site(*size))), truth)
    np.testing.assert_array_equal(picture(lower(~mask, Site(*size))), ~truth)


@settings(max_examples=100)
@given(cases())
def test_definition_materialize_and_lowering_agree(case):
    mask, size = case
    truth = expected(mask, size)
    np.testing.assert_array_equal(materialize(mask, size[2], size[3], batch=size[0], heads=size[1]), truth)
    lowered = lower(mask, Site(*size))
    np.testing.assert_array_equal(picture(lowered), truth)
    assert lowered.trivial <= bool(truth.all())
    if lowered.ranges is not None:
        assert lowered.ranges.count <= MOST_RANGES
        check_ranges(lowered.ranges, Site(*size))


@given(cases(), st.integers(1, 5), st.integers(1, 5))
def test_tiles_are_classified_as_the_picture_shows(case, q_tile, k_tile):
    mask, size = case
    states = classify(lower(mask, Site(*size)), q_tile, k_tile)
    truth = expected(mask, size)
    full = (*size[:2], -(-size[2] // q_tile), -(-size[3] // k_tile))
    for b, h, iq, ik in np.ndindex(*full):
        tile = truth[b, h, iq * q_tile : (iq + 1) * q_tile, ik * k_tile : (ik + 1) * k_tile]
        state = np.broadcast_to(states, full)[b, h, iq, ik]
        assert (state == FULL) == tile.all() and (state == EMPTY) == (not tile.any())


@given(cases(), st.data())
def test_a_tile_is_cut_out_of_the_picture(case, data):
    mask, size = case
    cut = [slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in size]
    seen = lower(mask, Site(*size)).visible(cut[2], cut[3], cut[0], cut[1])
    truth = expected(mask, size)[tuple(cut)]
    np.testing.assert_array_equal(np.broadcast_to(True if seen is None else seen, truth.shape), truth)
    assert seen is None or seen.shape[2:] == truth.shape[2:]


def _noise(*shape: int) -> Mask:
    return dense(np.random.default_rng(sum(shape)).random(shape) < 0.5)


LAZY = {
    "predicate": lambda b, h, q, k: predicate(PREDICATES[0]),
    "the same everywhere": lambda b, h, q, k: predicate(lambda b, h, i, j: (i * 7 + j * 5) % 11 < 6),
    "of keys alone": lambda b, h, q, k: predicate(lambda b, h, i, j: j % 3 == 0),
    "a constant": lambda b, h, q, k: predicate(lambda b, h, i, j: True),
    "within ranges": lambda b, h, q, k: predicate(PREDICATES[1]) & window(20, 3, "end") & lengths(k=np.arange(b) * 50),
    "not an array": lambda b, h, q, k: ~_noise(b, 1, q, k),
    "per head": lambda b, h, q, k: _noise(1, h, q, k) | causal("start"),
    "two arrays": lambda b, h, q, k: _noise(q, k) & _noise(b, h, 1, k),
    "labels in a union": lambda b, h, q, k: documents(np.arange(q) % 3, np.arange(k) % 3) | window(2, 2, "start"),
    "many ranges": lambda b, h, q, k: (
        blocks(_noise(-(-q // 3), -(-k // 3)).array, 3) & blocks(_noise(-(-q // 5), -(-k // 5)).array, 5)
    ),
}


@pytest.mark.parametrize(
    "size", [(1, 2, 1, 65), (2, 1, 70, 64), (1, 1, 129, 3), (2, 2, 64, 200), (1, 1, 0, 5), (1, 1, 5, 0)]
)
@pytest.mark.parametrize("name", LAZY)
def test_packed_bits_unpack_to_what_is_left_of_the_mask(name, size):
    mask = LAZY[name](*size)
    lowered = lower(mask, Site(*size))
    rest = picture(replace(lowered, lazy=None))
    truth = materialize(mask, size[2], size[3], batch=size[0], heads=size[1])
    if lowered.lazy is None:
        assert min(size[2:]) < 6, "only a few keys or queries make such a mask ranges alone"
        np.testing.assert_array_equal(rest, truth)
        return
    np.testing.assert_array_equal(unpack(lowered) & rest, truth)
    bits = lowered.tile_bits(0, size[2])
    np.testing.assert_array_equal(np.sort(bits.index[bits.index >= 0]), np.arange(len(bits.words)))
    slabs = [lowered.tile_bits(start, min(start + TILE, size[2])) for start in range(0, size[2], TILE)]
    assert sum(len(slab.words) for slab in slabs) == len(bits.words)
    for row, slab in enumerate(slabs):
        np.testing.assert_array_equal(slab.index < 0, bits.index[:, :, row : row + 1] < 0)


def test_tiles_outside_the_ranges_are_never_evaluated():
    asked = []

    def spy(b, h, i, j):
        asked.append((int(i.max()), int(j.max())))
        return (i + j) % 2 == 0

    lowered = lower(predicate(spy) & window(0, 0), Site(1, 1, 640, 640))
    lowered.tile_bits(0, 640)
    assert all(abs(i - j) < TILE for i, j in asked)


@given(cases(largest=6, far=False))
def test_torch_operands_lower_without_being_looked_at(case):
    torch = pytest.importorskip("torch")
    mask, size = case
    operands = iter([torch.as_tensor(_signed(operand)) for operand in mask.operands()])
    site = Site(*size, family="torch", concrete=False, device=torch.device("cpu"))
    lowered = lower(mask.replace_operands(lambda: next(operands)), site)
    np.testing.assert_array_equal(picture(lowered), expected(mask, size))
    if lowered.ranges is not None:
        check_ranges(lowered.ranges, site)


@settings(max_examples=20)
@given(cases(largest=6, far=False))
def test_jax_operands_lower_without_being_looked_at(case):
    jnp = pytest.importorskip("jax.numpy")
    mask, size = case
    operands = iter([jnp.asarray(_narrow(operand)) for operand in mask.operands()])
    site = Site(*size, family="jax", concrete=False)
    lowered = lower(mask.replace_operands(lambda: next(operands)), site)
    np.testing.assert_array_equal(picture(lowered), expected(_narrowed(mask), size))
    if lowered.ranges is not None:
        check_ranges(lowered.ranges, site)


@settings(max_examples=12)
@given(cases(largest=5, far=False))
def test_jax_lowers_while_tracing(case):
    jax = pytest.importorskip("jax")
    mask, size = case
    mask = _narrowed(mask)
    site = Site(*size, family="jax", concrete=False)

    def traced(operands):
        remaining = iter(operands)
        lowered = lower(mask.replace_operands(lambda: next(remaining)), site)
        seen = lowered.visible(slice(0, size[2]), slice(0, size[3]))
        return jax.numpy.ones(size, bool) if seen is None else jax.numpy.broadcast_to(seen, size)

    np.testing.assert_array_equal(jax.jit(traced)(list(map(jax.numpy.asarray, mask.operands()))), expected(mask, size))


def _signed(array: np.ndarray) -> np.ndarray:
    """torch has no arithmetic on wide unsigned integers."""
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _narrow(array: np.ndarray) -> np.ndarray:
    """jax has 32-bit integers unless told otherwise."""
    return array.astype(np.int32) if array.dtype.itemsize == 8 else array


def _narrowed(mask: Mask) -> Mask:
    operands = iter([_narrow(operand) for operand in mask.operands()])
    return mask.replace_operands(lambda: next(operands))


MILLION = 1_000_000
LONG = {
    "causal": causal() & window(4096, 0),
    "prefix": (causal() | prefix(1000)) & lengths(k=900_000),
    "not": ~(causal() & ~prefix(5)),
    "documents": documents(np.arange(MILLION) // 5000) & causal(),
    "labels": documents(np.arange(MILLION) % 7) & causal(),
    "blocks": blocks(np.tri(1000, dtype=bool), 1000),
    "batch": causal(offset=np.array([0, 5, 10])) & lengths(k=np.array([10, 20, 30])),
}


@pytest.mark.parametrize("name", LONG)
def test_a_million_by_a_million_is_lowered_in_linear_memory(name):
    tracemalloc.start()
    lowered = lower(LONG[name], Site(3, 2, MILLION, MILLION))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lowered.lazy is None and lowered.dense is None
    assert peak < 400 * 2 * MILLION, f"{peak / 2e6:.0f} bytes for each query and key"


def test_a_dense_array_is_read_in_place():
    array = np.ones((1, 1, 40, 50), bool)[:, :, ::2, ::-1]
    lowered = lower(dense(array) & causal("end"), Site(2, 3, 20, 50))
    assert np.shares_memory(lowered.dense, array) and lowered.dense.strides[2:] == array.strides[2:]
    assert lowered.lazy is None and lowered.ranges is not None


def test_one_lowering_is_shared_by_all_calls_with_a_symbolic_mask():
    first, second = (lower(causal() & window(3), Site(b, 2, 8, 8)) for b in (1, 5))
    assert first.ranges.starts is second.ranges.starts
    with pytest.raises(ValueError, match="read-only"):
        first.ranges.starts[...] = 0


@pytest.mark.slow
@settings(max_examples=3000)
@given(cases(largest=14))
def test_many_more_masks(case):
    mask, size = case
    np.testing.assert_array_equal(picture(lower(mask, Site(*size))), expected(mask, size))


def test_bits_are_packed_where_ranges_end_before_the_keys():
    """Ranges leave tiles of keys out on the right, and what is left is no whole number of packing steps."""
    mask = causal("start") & predicate(lambda b, h, i, j: (i + j) % 3 != 0)
    lowered = lower(mask, Site(1, 1, 100, 600))
    bits = lowered.tile_bits(0, 100)
    seen = picture(lowered)[0, 0]
    for row in range(2):
        for tile in range(10):
            number = bits.index[0, 0, row, tile]
            part = seen[row * 64 : row * 64 + 64, tile * 64 : tile * 64 + 64]
            assert (number == -1) == (not part.any())
            if number >= 0:
                columns = bits.words[number][None] >> np.arange(64, dtype=np.uint64)[:, None] & np.uint64(1)
                columns = columns[: part.shape[0], : part.shape[1]].astype(bool)
                i, j = np.ogrid[row * 64 : row * 64 + part.shape[0], tile * 64 : tile * 64 + part.shape[1]]
                np.testing.assert_array_equal(columns & (j <= i), part)
