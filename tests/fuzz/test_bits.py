"""Random parts of random calls of the compiled kernel, on any page and number of threads: the bits of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.portable_cases import planned
from support.random_problems import dropouts, dtypes, groups, key_lengths, lengths, on_page, pages, search, widths

import tilewise as tw
from tilewise.kernels.native.backward import backward
from tilewise.kernels.native.forward import forward

pytest.importorskip("tilewise._native")
pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("loud_memory")]

Place = tuple[slice, slice, slice, int]  # batch rows, kv heads, query rows, number of keys


class Whole:
    """A call, and the options of its parts: `options(heads, place)`, where `heads` are the query heads of a place.

    `seen` says of each pair, (B, Hq, Sq, Sk), whether the mask shows it.
    """

    def __init__(
        self,
        tensors: list[np.ndarray],
        seen: np.ndarray,
        options: Callable[[slice, Place], dict[str, Any]],
    ) -> None:
        self.q, self.k, self.v = tensors
        self.seen, self.options = seen, options

    def __repr__(self) -> str:
        given = {name: type(value).__name__ for name, value in self.part(self.all())[1].items() if value is not None}
        return f"{self.q.dtype} q {self.q.shape}, k {self.k.shape}, v {self.v.shape}, {given}"

    def heads(self, kv_heads: slice) -> slice:
        group = self.q.shape[1] // self.k.shape[1]
        return slice(kv_heads.start * group, kv_heads.stop * group)

    def part(self, place: Place) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
        b, kv_heads, rows, keys = place
        heads = self.heads(kv_heads)
        return (self.q[b, heads, rows], self.k[b, kv_heads, :keys], self.v[b, kv_heads, :keys]), self.options(
            heads, place
        )

    def all(self) -> Place:
        batch, _, rows, keys = self.seen.shape
        return slice(0, batch), slice(0, self.k.shape[1]), slice(0, rows), keys


def _cut(x: np.ndarray, *parts: slice) -> np.ndarray:
    """Each axis cut, but those of one number that stands for all."""
    return x[tuple(part if size > 1 else slice(None) for size, part in zip(x.shape, parts, strict=True))]


@st.composite
def _wholes(draw: st.DrawFn, dtype: str) -> Whole:
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(groups)
    rows, keys = draw(lengths.filter(bool)), draw(key_lengths.filter(bool))
    heads, sizes = kv_heads * group, (batch, kv_heads * group, rows, keys)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dim, value = draw(widths), draw(widths)
    shapes = [(batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value)]
    q, k, v = (draw(st.sampled_from([1, 3])) * rng.standard_normal(shape) for shape in shapes)
    kinds = draw(st.sets(st.sampled_from(["intervals", "dense", "documents", "rule"]), max_size=2))
    starts = rng.integers(-9, keys + 1, (*sizes[:3], draw(st.integers(1, 2))))
    stops = starts + rng.integers(0, keys + 9, starts.shape)
    bits = rng.random(sizes) < draw(st.sampled_from([0.1, 0.7, 0.99]))
    q_ids, k_ids = (rng.integers(0, 3, (batch, length)) for length in (rows, keys))
    period = draw(st.integers(2, 6))
    rule = lambda b, h, i, j: (b + h + 3 * i + j) % period != 0  # noqa: E731
    j = np.arange(keys)
    masks = {
        "intervals": lambda b, h, r, n: tw.intervals(starts[b, h, r], np.minimum(stops[b, h, r], n)),
        "dense": lambda b, h, r, n: tw.dense(bits[b, h, r, :n]),
        "documents": lambda b, h, r, n: tw.documents(q_ids[b, r], k_ids[b, :n]),
        "rule": lambda b, h, r, n: tw.predicate(lambda c, g, i, j: rule(b.start + c, h.start + g, r.start + i, j)),
    }
    visible = {
        "intervals": lambda: ((j >= starts[..., None]) & (j < stops[..., None])).any(-2),
        "dense": lambda: bits,
        "documents": lambda: (q_ids[:, :, None] == k_ids[:, None])[:, None],
        "rule": lambda: rule(*np.ix_(*map(np.arange, sizes))),
    }
    seen = np.ones(sizes, bool)
    for kind in kinds:
        seen = seen & visible[kind]()
    softcap = draw(st.sampled_from([None, None, 2.0]))
    sinks = rng.standard_normal(heads) if draw(st.booleans()) else None
    dropout = draw(st.one_of(st.none(), dropouts(sizes).filter(lambda one: one.strides is not None)))
    bias = table = None
    if draw(st.booleans()):
        bias = rng.standard_normal([size if draw(st.booleans()) else 1 for size in sizes]).astype(np.float32)
    if draw(st.booleans()):
        table = rng.standard_normal((draw(st.sampled_from([1, batch])), heads, rows + keys - 1)).astype(np.float32)

    def options(h: slice, place: Place) -> dict[str, Any]:
        b, _, r, n = place
        given: dict[str, Any] = {"softcap": softcap}
        for kind in sorted(kinds):
            mask = masks[kind](b, h, r, n)
            given["mask"] = given["mask"] & mask if "mask" in given else mask
        if sinks is not None:
            given["sinks"] = sinks[h]
        added: list[Any] = []
        if table is not None:
            first = rows - r.stop
            added.append(tw.relative(_cut(table, b, h, slice(first, first + r.stop - r.start + n - 1))))
        if bias is not None:
            added.append(_cut(bias, b, h, r, slice(n)))
        if added:
            given["bias"] = sum(added[1:], start=added[0])
        if dropout is not None:
            first = dropout.first + np.dot([b.start, h.start, r.start], np.array(dropout.strides[:3], object))
            given["dropout"] = tw.Dropout(dropout.p, dropout.seed, dropout.stream, first % 2**64, dropout.strides)
        return given

    return Whole([x.astype(dtype) for x in (q, k, v)], seen, options)


@st.composite
def _parts(draw: st.DrawFn, invariance: str) -> tuple[Whole, Place]:
    """A call and a part of it: batch rows, kv heads, keys up to the last that it sees or more; by "row", query rows."""
    whole = draw(dtypes.flatmap(_wholes))
    batch, kv_heads, rows, keys = whole.all()

    def part(of: slice) -> slice:
        first = draw(st.integers(0, of.stop - 1))
        return slice(first, draw(st.integers(first + 1, of.stop)))

    batch, kv_heads = part(batch), part(kv_heads)
    rows = part(rows) if invariance == "row" else rows
    seen = whole.seen[batch, whole.heads(kv_heads), rows].any((0, 1, 2))
    least = int(np.flatnonzero(seen).max(initial=0)) + 1
    return whole, (batch, kv_heads, rows, draw(st.integers(least, keys)))


def _check_bits(names: str, got: Any, expected: Any) -> None:
    for name, a, b in zip(names.split(), got, expected, strict=True):
        different = np.ascontiguousarray(a).view(f"u{a.itemsize}") != np.ascontiguousarray(b).view(f"u{b.itemsize}")
        assert not different.any(), f"{name}: {different.sum()} of {a.size} differ, first {np.argwhere(different)[0]}"


@pytest.fixture
def threads_after() -> Iterator[None]:
    yield
    tw.set_num_threads(0)


_threads = st.sampled_from([1, 2, 3])


@pytest.mark.parametrize("invariance", ["row", "batch"])
def test_out_and_lse(invariance: str, threads_after: None) -> None:
    def once(given: tuple[Whole, Place], threads: int, page: str) -> None:
        whole, place = given
        answers = []
        with on_page(page):
            for at, count in ((whole.all(), 1), (place, threads)):
                arrays, options = whole.part(at)
                tw.set_num_threads(count)
                answers.append(
                    tw.attention(*arrays, kernel="native", return_lse=True, invariance=invariance, **options)
                )
        batch, kv_heads, rows, _ = place
        _check_bits("out lse", answers[1], [x[batch, whole.heads(kv_heads), rows] for x in answers[0]])

    search(once, _parts(invariance), _threads, pages())


def test_gradients(threads_after: None) -> None:
    """Those to q, k and v, of batch rows and kv heads, without keys that nobody sees; 0 for these."""

    def once(given: tuple[Whole, Place], threads: int, page: str) -> None:
        whole, place = given
        batch, kv_heads, _, keys = place
        heads, answers = whole.heads(kv_heads), []
        rng = np.random.default_rng(7)
        shape = *whole.q.shape[:3], whole.v.shape[3]
        d_out, d_lse = rng.standard_normal(shape).astype(whole.q.dtype), rng.standard_normal(shape[:3])
        with on_page(page):
            for at, count, part in ((whole.all(), 1, np.s_[:]), (place, threads, np.s_[batch, heads])):
                arrays, options = whole.part(at)
                plan, operands = planned(*arrays, kernel="native", tiles=None, **options)
                tw.set_num_threads(count)
                out, lse = forward(plan, operands)
                found = backward(plan, operands, out, lse, d_out[part], d_lse[part].astype(lse.dtype))
                answers.append([found.q, found.k, found.v])
        expected = [x[batch, own] for x, own in zip(answers[0], (heads, kv_heads, kv_heads), strict=True)]
        assert not any(x[:, :, keys:].astype(np.float32).any() for x in expected[1:])
        _check_bits("d_q d_k d_v", answers[1], [expected[0], *(x[:, :, :keys] for x in expected[1:])])

    search(once, _parts("batch"), _threads, pages())
