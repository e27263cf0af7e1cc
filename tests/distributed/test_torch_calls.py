"""The door over ranks: layouts, packed sequences, learned biases, compiled steps, refusals; what is sent and held."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from accuracy import assert_accurate  # noqa: E402
from support import parallel_calls as calls  # noqa: E402

from tilewise import causal, window  # noqa: E402
from tilewise.distributed.layout import Layout  # noqa: E402
from tilewise.distributed.schedule import all_gather, ring, ulysses  # noqa: E402
from tilewise.masks.lower import lower  # noqa: E402
from tilewise.masks.site import Site  # noqa: E402


@pytest.mark.parametrize(
    ("sharding", "strategy", "layout", "packed", "learned"),
    [
        ("zigzag", "ring", "bshd", False, "alibi"),
        ("contiguous", "ring", "thd", True, None),
        ("stripe", "ring", "bhsd", False, "t5"),
        ("zigzag", "all_gather", "thd", True, "alibi"),
        ("stripe", "all_gather", "bshd", False, "alibi"),
        ("contiguous", "ulysses", "thd", True, "t5"),
        ("zigzag", "auto", "bshd", True, None),
        ("zigzag", "grid", "bhsd", True, "alibi"),
    ],
)
def test_layouts_packed_sequences_and_learned_biases(ranks, sharding, strategy, layout, packed, learned):
    for found in ranks(calls.beside_one_device, sharding, strategy, layout, packed, learned):
        for name, got, exact in found:
            assert_accurate(name, got, exact)


@pytest.mark.parametrize(
    ("sharding", "lengths"), [("contiguous", None), ("contiguous", (0, 9, 3, 7)), ("zigzag", None), ("stripe", None)]
)
def test_shards_join_and_know_their_positions(ranks, sharding, lengths):
    found = ranks(calls.helpers, sharding, lengths)
    assert sorted(place for places in found for place in places) == list(range(19))


def test_rows_of_a_mesh_work_apart(ranks):
    for got, exact in ranks(calls.on_a_mesh):
        assert_accurate("out", got, exact)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_a_compiled_step_is_one_graph(ranks, strategy):
    for found in ranks(calls.compiled, strategy)[:2]:
        for eager, compiled in found:
            assert (eager == compiled).all()


@pytest.mark.parametrize("what", ["dtype", "heads", "mask", "option", "gradient", "refusal", "lengths"])
def test_ranks_that_differ_are_told_so_on_every_rank(ranks, what):
    for rank, text in enumerate(ranks(calls.differing, what)):
        if what == "refusal":
            assert ("ValueError: k: has 3 as head dimension" if rank == 1 else "refused by rank 1: k: has 3") in text
        elif what == "lengths":
            assert text.startswith("ValueError: q: has 3, 1, 3, 3 rows on the ranks, expected ")
        else:
            assert "the ranks make different calls" in text and "\n  rank 3: q " in text


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("forward mode", "NotImplementedError: context_parallel_attention: forward mode"),
        ("transforms", "NotImplementedError: context_parallel_attention: forward mode"),
        ("second order", "NotImplementedError: context_parallel_attention: derivatives of second order"),
        ("heads", "ValueError: heads: got 2 query heads"),
        ("grid", "ValueError: strategy: 'grid' cannot join the rows of sharding='stripe'"),
        ("own rows", "ValueError: strategy: 'ulysses' needs the rows of other ranks"),
        ("bias", "ValueError: bias: the array has shape (5, 16)"),
        ("strategy", "ValueError: strategy: got 'best'"),
        ("sharding", "ValueError: sharding: got 'round'"),
        ("number of lengths", "ValueError: lengths: got 2 of them"),
        ("own length", "ValueError: lengths: says 5 queries for this rank, which has 4"),
        ("mesh", "ValueError: mesh: has 2 dimensions"),
        ("kernel", "KernelRefused: kernel: 'triton' cannot run this problem"),
        ("dropout", "ValueError: dropout: got strides"),
        ("cu_seqlens", "ValueError: cu_seqlens: got 16 queries and 8 keys"),
    ],
)
def test_refusals(ranks, what, message):
    for text in ranks(calls.refused, what):
        assert text.startswith(message), text


@pytest.mark.parametrize(
    ("strategy", "sharding", "length", "width"),
    [("ring", "zigzag", 48, None), ("ring", "contiguous", 50, 9), ("all_gather", "contiguous", 48, None),
     ("ulysses", "zigzag", 48, None)],
)  # fmt: skip
def test_what_is_sent_is_what_the_schedule_promises(ranks, strategy, sharding, length, width):
    q = k = Layout(sharding, length, 4)
    mask = lower(causal() if width is None else causal() & window(width, 0), Site(1, 4, length, length))
    make = {"ring": ring, "all_gather": all_gather, "ulysses": lambda *args: ulysses(*args, 4, 2)}[strategy]
    schedule = make(q, k, mask)
    per_key, per_query, per_out = 2 * 2 * 8 * 4, 4 * 8 * 4, 4 * (8 * 4 + 4)
    for rank, (exchanges, sent, sends_back, _) in enumerate(ranks(calls.sent, strategy, sharding, length, width)):
        assert exchanges == schedule.exchanges(rank)
        assert sent == schedule.bytes(rank, per_key, per_query, per_out)
        if strategy == "ring":  # keys once more, and the gradients of every shard that is not this rank's own
            foreign = sum(1 for step in schedule.steps[rank] if step.blocks and step.source != rank)
            assert sends_back == exchanges + foreign
    if width is not None:
        assert all(schedule.exchanges(rank) <= 1 for rank in range(4)), "the window reaches one shard back"


# Of the ring alone: gloo frees what an all-to-all has sent in a thread of its own, which the profiler does not see.
def test_memory_of_a_rank_falls_with_the_ranks(ranks):
    two, four = (max(found for found in ranks(calls.held, n, "ring", 4096) if found) for n in (2, 4))
    rows = 4096 * 4 * 16 * 4  # bytes of q
    assert four < 0.6 * two
    assert four < 16 * rows / 4 * 1.5, "a fixed number of shards"
