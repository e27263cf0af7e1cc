"""Schedules: each visible pair is computed once, nothing without a pair is, and what is sent is what is promised."""

from __future__ import annotations

import numpy as np
import pytest

import tilewise as tw
from tilewise.distributed import WHOLE, Layout, Schedule, all_gather, grid, head_shares, needs, ring, ulysses
from tilewise.masks.lower import LoweredMask, lower
from tilewise.masks.materialize import materialize
from tilewise.masks.site import Site

_RNG = np.random.default_rng(3)
_S = 61
_SORTED = np.sort(_RNG.integers(0, 6, _S))
_MIXED = _RNG.integers(0, 30, _S)
MASKS = {
    "none": None,
    "causal": tw.causal(),
    "window": tw.causal() & tw.window(7, 0),
    "window to both sides": tw.window(5, 9),
    "window ahead": tw.window(0, 6),
    "documents": tw.documents(_SORTED),
    "causal documents": tw.causal() & tw.documents(_SORTED),
    "scattered documents": tw.documents(_MIXED) & tw.causal(),
    "sinks and window": tw.causal() & (tw.prefix(3) | tw.window(6, 0)),
    "by batch row": tw.lengths(k=[40, 61]) & tw.causal(offset=np.array([0, -9])),
    "bits": tw.dense(_RNG.random((1, 1, _S, _S)) < 0.1) & tw.window(20, 0),
    "nothing": tw.causal(offset=-_S),
}
ONLY_RANGES = [name for name in MASKS if name not in ("bits", "scattered documents")]
LAYOUTS = {
    "contiguous": Layout("contiguous", _S, 4),
    "zigzag": Layout("zigzag", _S, 4),
    "stripe": Layout("stripe", _S, 4),
    "unequal": Layout("contiguous", _S, 4, (10, 0, 44, 7)),
    "unequal zigzag": Layout("zigzag", _S, 4, (3, 10, 0, 8, 8, 12, 19, 1)),
    "one rank": Layout("zigzag", _S, 1),
}


def lowered(name: str, q_len: int = _S, k_len: int = _S) -> LoweredMask:
    batch = 2 if name == "by batch row" else 1
    return lower(MASKS[name], Site(batch, 1, q_len, k_len))


def visible(mask: LoweredMask) -> np.ndarray:
    """(B', Sq, Sk) booleans."""
    site = mask.site
    seen = mask.visible(slice(0, site.q_len), slice(0, site.k_len))
    return np.ones((1, site.q_len, site.k_len), bool) if seen is None else seen[:, 0]


def computed(schedule: Schedule) -> np.ndarray:
    """(Sq, Sk): how often each pair lies in a block; blocks are held against what they say of shards."""
    times = np.zeros((schedule.q.length, schedule.k.length), int)
    for place, steps in enumerate(schedule.steps):
        rows = schedule.rows.positions(place)
        for step in steps:
            keys = np.arange(schedule.k.length) if step.source == WHOLE else schedule.keys.positions(step.source)
            for block in step.blocks:
                i = rows[block.q_begin : block.q_begin + block.rows.count]
                stop = block.k_begin + block.keys.count * (block.keys.step if step.source == WHOLE else 1)
                j = keys[block.k_begin : stop : block.keys.step if step.source == WHOLE else 1]
                np.testing.assert_array_equal(i, block.rows.start + block.rows.step * np.arange(block.rows.count))
                np.testing.assert_array_equal(j, block.keys.start + block.keys.step * np.arange(block.keys.count))
                times[np.ix_(i, j)] += 1
    return times


def schedules(layout: Layout, mask: LoweredMask) -> list[Schedule]:
    made = [make(layout, layout, mask) for make in (ring, all_gather)]
    made.append(ulysses(layout, layout, mask, 8, 4))
    if layout.kind != "stripe" and layout.ranks > 1:
        made.append(grid(layout, layout, mask, 8, 4, 2))
    return made


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", list(MASKS))
def test_every_visible_pair_is_computed_once(name: str, layout: str) -> None:
    mask = lowered(name)
    for schedule in schedules(LAYOUTS[layout], mask):
        times = computed(schedule)
        assert times.max(initial=0) <= 1, f"{schedule.strategy}: a pair is computed twice"
        assert np.all(times[visible(mask).any(0)] == 1), f"{schedule.strategy}: a pair is missing"
        assert len({len(steps) for steps in schedule.steps}) == 1


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", list(MASKS))
def test_pairs_are_counted_and_empty_blocks_left_out(name: str, layout: str) -> None:
    mask = lowered(name)
    seen = visible(mask)
    for schedule in schedules(LAYOUTS[layout], mask):
        for steps in schedule.steps:
            for block in (block for step in steps for block in step.blocks):
                i, j = (run.start + run.step * np.arange(run.count) for run in (block.rows, block.keys))
                count = int(seen[:, i][:, :, j].sum())
                if name in ONLY_RANGES:
                    assert block.pairs == count > 0
                else:
                    assert block.pairs >= max(1, count)
        if name in ONLY_RANGES:
            total = sum(schedule.pairs(rank) for rank in range(0, schedule.q.ranks, schedule.inner))
            assert total == seen.sum() * schedule.fold // len(seen)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", list(MASKS))
def test_a_ring_brings_each_shard_to_its_readers_and_no_further(name: str, layout: str) -> None:
    """Played through: each place holds what it says, sends reach the receiver that expects them, none is in vain."""
    mask = lowered(name)
    schedule = ring(LAYOUTS[layout], LAYOUTS[layout], mask)
    held: list[int | None] = list(range(schedule.q.ranks))
    read_last: dict[int, int] = {}
    moved_last: dict[int, int] = {}
    for t in range(len(schedule.steps[0])):
        arriving: list[int | None] = [None] * len(held)
        for rank, steps in enumerate(schedule.steps):
            step = steps[t]
            if step.blocks:
                assert held[rank] == step.source
                read_last[step.source] = t
            if step.send_to is not None:
                assert held[rank] == step.source and arriving[step.send_to] is None
                assert schedule.steps[step.send_to][t].receive_from == rank
                arriving[step.send_to] = step.source
                moved_last[step.source] = t + 1
        for rank, steps in enumerate(schedule.steps):
            assert (steps[t].receive_from is None) == (arriving[rank] is None)
        held = arriving
        assert t == 0 or any(steps[t].blocks for steps in schedule.steps), "a step that nobody needs"
    assert held == [None] * len(held), "something is sent after the last step"
    for shard, t in moved_last.items():
        assert read_last.get(shard) == t, "a shard travels beyond its last reader"


def test_bytes_and_exchanges_are_those_of_the_steps() -> None:
    layout = LAYOUTS["unequal"]
    schedule = ring(layout, layout, lowered("causal"))
    for rank in range(4):
        sent = [layout.local_length(step.source) for step in schedule.steps[rank] if step.send_to is not None]
        assert schedule.exchanges(rank) == len(sent)
        assert schedule.bytes(rank, 3) == 3 * sum(sent)
    gathered = all_gather(layout, layout)
    assert [gathered.bytes(rank, 2) for rank in range(4)] == [2 * (_S - n) for n in (0, 44, 7, 10)]
    assert [gathered.exchanges(rank) for rank in range(4)] == [1] * 4


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_bytes_of_spread_heads_are_what_an_all_to_all_moves(kv_heads: int) -> None:
    """Counted by going through sender, receiver, row and head."""
    layout = LAYOUTS["unequal"]
    schedule = ulysses(layout, layout, None, 8, kv_heads)
    for rank in range(4):
        own = layout.local_length(rank)
        sent = 0
        for other, share in enumerate(head_shares(8, kv_heads, 4)):
            if other != rank:
                sent += own * (share.kv_count * 5 + share.count * 3)
                sent += layout.local_length(other) * schedule.heads[rank].count * 7
        assert schedule.bytes(rank, 5 * kv_heads, 3 * 8, 7 * 8) == sent
        assert schedule.exchanges(rank) == 2
        assert schedule.pairs(rank) == _S * _S


def test_a_windows_bytes_do_not_grow_with_the_ranks() -> None:
    for kind, mask in (("contiguous", tw.causal() & tw.window(10, 0)), ("zigzag", tw.window(9, 9))):
        rounds = []
        for ranks in (4, 8, 32, 128):
            layout = Layout(kind, 32 * ranks, ranks)
            schedule = ring(layout, layout, lower(mask, Site(1, 1, layout.length, layout.length)))
            rounds.append(max(schedule.bytes(rank, 1) for rank in range(ranks)))
        assert rounds[1:] == rounds[1:2] * 3 and rounds[0] <= rounds[1] <= 2 * 32


def test_a_window_ahead_takes_one_step_and_not_a_whole_round() -> None:
    layout = Layout("contiguous", 160, 16)
    steps = ring(layout, layout, lower(tw.window(0, 8), Site(1, 1, 160, 160))).steps
    assert len(steps[0]) == 2
    assert steps[5][0].send_to == 4 and steps[5][0].receive_from == 6


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_zigzag_and_stripe_balance_a_causal_mask(ranks: int) -> None:
    n = 64 * ranks
    mask = lower(tw.causal(), Site(1, 1, n, n))
    found = {kind: ring(*[Layout(kind, n, ranks)] * 2, mask) for kind in ("contiguous", "zigzag", "stripe")}
    assert found["contiguous"].imbalance() > 1.45
    assert found["zigzag"].imbalance() == 1.0
    assert found["stripe"].imbalance() < 1.02
    for kind in ("zigzag", "stripe"):
        # At every step but the first the ranks have the same work, within a row of the diagonal.
        for t in range(1, ranks):
            pairs = [sum(block.pairs for block in steps[t].blocks) for steps in found[kind].steps]
            assert max(pairs) <= 1.05 * min(pairs)


def test_balance_survives_lengths_that_do_not_divide() -> None:
    n = 1013
    mask = lower(tw.causal(), Site(1, 1, n, n))
    for kind in ("zigzag", "stripe"):
        assert ring(*[Layout(kind, n, 8)] * 2, mask).imbalance() < 1.03


def test_documents_need_only_the_shards_that_they_reach_into() -> None:
    layout = Layout("contiguous", 64, 8)
    apart = lower(tw.documents(np.arange(64) // 8), Site(1, 1, 64, 64))
    schedule = ring(layout, layout, apart)
    assert len(schedule.steps[0]) == 1 and all(schedule.bytes(rank, 1) == 0 for rank in range(8))
    across = lower(tw.documents(np.arange(64) // 16), Site(1, 1, 64, 64))
    np.testing.assert_array_equal(needs(across, layout, layout) > 0, np.kron(np.eye(4), np.ones((2, 2))) > 0)


def test_cross_attention_has_two_lengths() -> None:
    q, k = Layout("contiguous", 12, 4), Layout("contiguous", 50, 4)
    mask = lower(tw.causal("end"), Site(1, 1, 12, 50))
    for schedule in (ring(q, k, mask), all_gather(q, k, mask), ulysses(q, k, mask, 4, 1), grid(q, k, mask, 4, 2, 2)):
        assert np.all(computed(schedule)[visible(mask)[0]] == 1)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "stripe"])
@pytest.mark.parametrize(("q_len", "k_len"), [(3, 3), (0, 9), (9, 0), (0, 0), (2, 40)])
def test_more_ranks_than_positions(kind: str, q_len: int, k_len: int) -> None:
    q, k = Layout(kind, q_len, 8), Layout(kind, k_len, 8)
    for schedule in (ring(q, k), all_gather(q, k), ulysses(q, k, None, 8, 2)):
        assert np.all(computed(schedule) == 1)
        assert schedule.imbalance() >= 1.0


def test_values_that_are_not_known_are_taken_as_seen() -> None:
    site = Site(1, 1, 32, 32, family="numpy", concrete=False)
    layout = Layout("contiguous", 32, 4)
    assert (needs(lower(tw.causal(), Site(1, 1, 32, 32)), layout, layout) > 0).sum() == 10
    unknown = LoweredMask(site, ranges=lower(tw.causal(), Site(1, 1, 32, 32)).ranges)
    assert (needs(unknown, layout, layout) == 64).all()


def test_shares_of_heads_keep_groups_together() -> None:
    for heads, kv_heads, ranks in ((8, 8, 4), (8, 2, 4), (32, 8, 16), (6, 1, 3), (12, 4, 2)):
        shares = head_shares(heads, kv_heads, ranks)
        group = heads // kv_heads
        for share in shares:
            q_heads = range(share.first, share.first + share.count)
            assert [h // group for h in q_heads] == [
                share.kv_first + n // (share.count // share.kv_count) for n in range(share.count)
            ]
        assert [share.first for share in shares] == list(range(0, heads, heads // ranks))


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(6, 6, 4), (12, 4, 6), (6, 3, 2)])
def test_heads_that_do_not_spread_are_refused_by_name(heads: int, kv_heads: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"^heads: got .* {ranks} ranks"):
        head_shares(heads, kv_heads, ranks)


def test_wrong_layouts_and_masks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^k: lies over 3 ranks, expected 4"):
        ring(Layout("contiguous", 8, 4), Layout("contiguous", 8, 3))
    with pytest.raises(ValueError, match="^mask: made for 61 queries"):
        ring(Layout("contiguous", 8, 4), Layout("contiguous", 8, 4), lowered("causal"))
    with pytest.raises(ValueError, match="^inner: got 3, expected a divisor of 4"):
        grid(*[LAYOUTS["zigzag"]] * 2, None, 6, 6, 3)


def test_the_mask_of_the_tests_is_the_one_that_is_drawn() -> None:
    np.testing.assert_array_equal(visible(lowered("window"))[0], materialize(MASKS["window"], _S, _S)[0, 0])
