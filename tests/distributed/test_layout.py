"""Layouts: every position lies on exactly one rank, in the order that the layout promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tilewise.distributed import Layout

KINDS = ("contiguous", "zigzag", "stripe")
SIZES = [(0, 3), (1, 4), (5, 8), (7, 1), (24, 4), (29, 4), (64, 8)]
UNEQUAL = [
    Layout("contiguous", 20, 4, (3, 0, 12, 5)),
    Layout("zigzag", 20, 3, (1, 0, 9, 4, 6, 0)),
    Layout("zigzag", 11, 2, (0, 11, 0, 0)),
]
LAYOUTS = [Layout(kind, length, ranks) for kind in KINDS for length, ranks in SIZES] + UNEQUAL


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_position_lies_on_exactly_one_rank(layout: Layout) -> None:
    order = layout.order()
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(layout.length))
    for rank in range(layout.ranks):
        runs, places = layout.runs(rank), layout.positions(rank)
        assert all(run.count for run in runs)
        assert len(places) == layout.local_length(rank) == sum(run.count for run in runs)
        assert np.all(np.diff(places) > 0)


@pytest.mark.parametrize("length", [0, 3, 17, 24])
def test_shards_are_those_of_their_definitions(length: int) -> None:
    every, ranks = np.arange(length), 4
    pieces, halves = np.array_split(every, ranks), np.array_split(every, 2 * ranks)
    for rank in range(ranks):
        expected = {
            "contiguous": pieces[rank],
            "zigzag": np.concatenate([halves[rank], halves[-1 - rank]]),
            "stripe": every[rank::ranks],
        }
        for kind in KINDS:
            np.testing.assert_array_equal(Layout(kind, length, ranks).positions(rank), expected[kind])


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.kind != "stripe"], ids=str)
def test_runs_of_a_rank_do_not_touch(layout: Layout) -> None:
    for rank in range(layout.ranks):
        runs = layout.runs(rank)
        assert all(a.start + a.count < b.start for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_group_holds_the_rows_of_its_ranks(layout: Layout) -> None:
    for inner in (n for n in range(1, layout.ranks + 1) if layout.ranks % n == 0):
        if layout.kind == "stripe" and inner not in (1, layout.ranks):
            with pytest.raises(ValueError, match="^inner: "):
                layout.grouped(inner)
            continue
        groups = layout.grouped(inner)
        assert groups.ranks == layout.ranks // inner
        for group in range(groups.ranks):
            members = range(group * inner, (group + 1) * inner)
            rows = np.concatenate([layout.positions(rank) for rank in members])
            np.testing.assert_array_equal(rows[layout.group_order(inner, group)], groups.positions(group))
    whole = layout.grouped(layout.ranks)
    assert [run.step for run in whole.runs(0)] == [1] * (layout.length > 0), "one group holds one run"


def test_the_order_of_ranks_goes_there_and_back() -> None:
    x = np.random.default_rng(1).standard_normal(29)
    for kind in KINDS:
        order = Layout(kind, 29, 4).order()
        np.testing.assert_array_equal(x[order][np.argsort(order)], x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagonal", 8, 2), "^kind: got 'diagonal'"),
        (("zigzag", -1, 2), "^length: got -1"),
        (("zigzag", 8, 0), "^ranks: got 0"),
        (("stripe", 8, 2, (4, 4)), "^lengths: got some for a stripe"),
        (("contiguous", 8, 2, (4, 3)), "^lengths: got 2 numbers that add up to 7, expected 2 of 0 or more"),
        (("contiguous", 8, 2, (9, -1)), "^lengths: "),
        (("zigzag", 8, 2, (4, 4)), "^lengths: got 2 numbers .* expected 4"),
    ],
)
def test_what_is_no_layout_is_refused_by_name(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(*arguments)


def test_a_rank_that_is_none_is_refused() -> None:
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"^rank: got {rank}, expected one of 0 … 3"):
            Layout("zigzag", 8, 4).runs(rank)
