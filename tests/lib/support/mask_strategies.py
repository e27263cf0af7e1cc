"""Random masks for hypothesis: sizes, every primitive with awkward operands, and trees of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tilewise.masks.algebra import Mask
from tilewise.masks.primitives import blocks, causal, dense, documents, intervals, lengths, predicate, prefix, window

Sizes = tuple[int, int, int, int]

PREDICATES: tuple[Callable, ...] = (
    lambda b, h, i, j: (b + 2 * h + i + j) % 3 == 0,
    lambda b, h, i, j: (i * 7 + j * 5) % 11 < 6,
    lambda b, h, i, j: j <= i + h,
    lambda b, h, i, j: j % 2 == 0,
    lambda b, h, i, j: (b == 0) & (i >= 0) & (j >= 0),
)


def sizes(largest: int = 9) -> st.SearchStrategy[Sizes]:
    """(B, H, Sq, Sk), zeros and ones included; half of them with Sq = Sk."""
    length = st.integers(0, largest)
    lengths_ = st.one_of(st.tuples(length, length), length.map(lambda n: (n, n)))
    return st.tuples(st.integers(0, 3), st.integers(0, 3), lengths_).map(lambda t: (t[0], t[1], *t[2]))


def masks(size: Sizes, *, far: bool = True, lazy: bool = True, leaves: int = 4) -> st.SearchStrategy[Mask]:
    """Trees over all primitives that fit `size`.

    Args:
        far: whether offsets may lie beyond 32 bits. lazy: whether predicates occur.
    """
    tree = st.recursive(
        primitives(size, far=far, lazy=lazy),
        lambda part: st.one_of(
            st.tuples(part, part).map(lambda pair: pair[0] & pair[1]),
            st.tuples(part, part).map(lambda pair: pair[0] | pair[1]),
            part.map(lambda mask: ~mask),
        ),
        max_leaves=leaves,
    )
    return tree


def primitives(size: Sizes, *, far: bool = True, lazy: bool = True) -> st.SearchStrategy[Mask]:
    """One primitive of any kind."""
    kinds = [primitive(kind, size, far=far) for kind in KINDS if lazy or kind != "predicate"]
    return st.one_of(*kinds)


def primitive(kind: str, size: Sizes, *, far: bool = True) -> st.SearchStrategy[Mask]:
    """One primitive of a kind of `KINDS`."""
    return KINDS[kind](size, far)


def _integers(low: int, high: int) -> Callable[[tuple[int, ...]], st.SearchStrategy[np.ndarray]]:
    """Integer arrays of a shape, of any integer dtype that holds the bounds."""
    dtypes = [dtype for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
              if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max]  # fmt: skip

    def of(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
        count = int(np.prod(shape))
        values = st.lists(st.integers(low, high), min_size=count, max_size=count)
        return st.tuples(values, st.sampled_from(dtypes)).map(lambda t: np.array(t[0], dtype=t[1]).reshape(shape))

    return of


def _per_batch(size: Sizes, low: int, high: int) -> st.SearchStrategy[np.ndarray | int]:
    of = _integers(low, high)
    return st.one_of(st.integers(low, high), of(()), of((1,)), of((size[0],)))


def _booleans(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    count = int(np.prod(shape))
    values = st.one_of(
        st.lists(st.booleans(), min_size=count, max_size=count), st.booleans().map(lambda b: [b] * count)
    )
    return values.map(lambda bits: np.array(bits, dtype=bool).reshape(shape))


def _placed(size: Sizes, far: bool) -> st.SearchStrategy[dict]:
    """Keyword arguments that name a diagonal."""
    reach = size[2] + size[3]
    aligned = st.sampled_from(["start", "end"] + ([None] if size[2] == size[3] else [])).map(lambda a: {"align": a})
    near = _per_batch(size, -reach - 2, reach + 2).map(lambda o: {"offset": o})
    distant = _per_batch(size, -(2**40), 2**40) if far else _per_batch(size, -(2**20), 2**20)
    return st.one_of(aligned, near, distant.map(lambda o: {"offset": o}))


def _causals(size: Sizes, far: bool) -> st.SearchStrategy[Mask]:
    return _placed(size, far).map(lambda place: causal(**place))


def _windows(size: Sizes, far: bool) -> st.SearchStrategy[Mask]:
    width = st.one_of(st.none(), st.integers(0, 4), st.integers(0, 2**41 if far else 2**21))
    met = st.integers(-(2**20), 2**20).flatmap(  # an offset far away and a window that just reaches back
        lambda offset: st.integers(0, 12).map(lambda extra: window(abs(offset) + extra, abs(offset) + 3, offset=offset))
    )
    drawn = st.tuples(width, width, _placed(size, far)).map(lambda t: window(t[0], t[1], **t[2]))
    return st.one_of(drawn, drawn, met)


def _prefixes(size: Sizes) -> st.SearchStrategy[Mask]:
    return _per_batch(size, 0, size[3] + 2).map(prefix)


def _lengths(size: Sizes) -> st.SearchStrategy[Mask]:
    queries, keys = _per_batch(size, 0, size[2] + 2), _per_batch(size, 0, size[3] + 2)
    return st.one_of(
        queries.map(lambda q: lengths(q=q)),
        keys.map(lambda k: lengths(k=k)),
        st.tuples(queries, keys).map(lambda t: lengths(q=t[0], k=t[1])),
    )


def _documents(size: Sizes) -> st.SearchStrategy[Mask]:
    of = st.one_of(st.just(_integers(0, 2)), st.just(_integers(-(2**40), 2**40)))

    def ids(length: int) -> st.SearchStrategy[np.ndarray]:
        shapes = st.sampled_from([(length,), (1, length), (size[0], length)])
        drawn = st.tuples(of, shapes).flatmap(lambda t: t[0](t[1]))
        ordered = drawn.map(lambda array: np.sort(array, axis=-1))
        return st.one_of(drawn, ordered)

    two = st.tuples(ids(size[2]), ids(size[3])).map(lambda t: documents(*t))
    return st.one_of(two, ids(size[2]).map(documents)) if size[2] == size[3] else two


def _intervals(size: Sizes) -> st.SearchStrategy[Mask]:
    batch, heads, q_len, k_len = size

    def of_shape(shape: tuple[int, ...]) -> st.SearchStrategy[Mask]:
        bounds = _integers(-3, k_len + 3)(shape)
        return st.tuples(bounds, bounds).map(lambda t: intervals(*t))

    count = st.integers(0, 6)
    shapes = st.one_of(
        st.just((q_len,)),
        count.map(lambda r: (q_len, r)),
        st.tuples(st.sampled_from([1, batch]), count).map(lambda t: (t[0], q_len, t[1])),
        st.tuples(st.sampled_from([1, batch]), st.sampled_from([1, heads]), count).map(
            lambda t: (t[0], t[1], q_len, t[2])
        ),
    )
    return shapes.flatmap(of_shape)


def _denses(size: Sizes) -> st.SearchStrategy[Mask]:
    axes = st.tuples(*(st.sampled_from(sorted({1, n})) for n in size))
    shapes = st.tuples(axes, st.integers(0, 4)).map(lambda t: t[0][t[1] :])
    return shapes.flatmap(_booleans).map(dense)


def _blocks(size: Sizes) -> st.SearchStrategy[Mask]:
    batch, heads, q_len, k_len = size

    def of_size(pair: tuple[int, int]) -> st.SearchStrategy[Mask]:
        inner = (-(-q_len // pair[0]), -(-k_len // pair[1]))
        leading = st.sampled_from([(), (1,), (heads,), (1, 1), (batch, 1), (1, heads), (batch, heads)])
        return leading.flatmap(lambda lead: _booleans((*lead, *inner))).map(lambda table: blocks(table, pair))

    return st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(of_size)


KINDS: dict[str, Callable[[Sizes, bool], st.SearchStrategy[Mask]]] = {
    "causal": _causals,
    "window": _windows,
    "prefix": lambda size, far: _prefixes(size),
    "lengths": lambda size, far: _lengths(size),
    "documents": lambda size, far: _documents(size),
    "intervals": lambda size, far: _intervals(size),
    "dense": lambda size, far: _denses(size),
    "blocks": lambda size, far: _blocks(size),
    "predicate": lambda size, far: st.sampled_from(PREDICATES).map(predicate),
}
