"""A rank that dies or falls silent in the middle of a call: the others say so in time, and hang nowhere."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

from support.parallel_calls import with_a_lost_rank  # noqa: E402
from support.ranks import Ranks  # noqa: E402

TIMEOUT = 5  # seconds, of the group


@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        ("dies", "ring"),
        ("dies", "ulysses"),
        ("sleeps", "ring"),
        pytest.param("dies", "all_gather", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_is_an_error_on_the_others(tmp_path, how, strategy):
    ranks = Ranks(4, tmp_path)
    began = time.monotonic()
    try:
        answers = ranks.answers(with_a_lost_rank, how, strategy, TIMEOUT)
    finally:
        for process in ranks.processes:
            process.kill()
        ranks.close()
    for rank, (good, answer) in enumerate(answers):
        if rank == 2:
            assert how == "sleeps" or answer == "gone"
            continue
        assert good, answer
        text, seconds = answer
        assert text.startswith(f"context_parallel_attention: rank {rank} of 4 exchanged "), text
        assert "did not answer within the group's timeout" in text
        assert seconds < 4 * TIMEOUT
    assert time.monotonic() - began < 60
