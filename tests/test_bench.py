"""The harness: what it counts, that it notices wrong results, and that a run gives a table, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")

from typer.testing import CliRunner

from tilewise.bench import measure
from tilewise.bench.cases import CASES, MASKS, Case, arrays
from tilewise.bench.peers import PEERS, PLAIN, Refused, installed, question
from tilewise.bench.vllm import PAGE, pages
from tilewise.cli.app import app
from tilewise.masks.materialize import materialize

PEAKS = {"float32": 100.0, "bfloat16": 200.0, "read": 10.0}


@pytest.mark.parametrize("mask", MASKS)
def test_pairs_are_the_visible_ones(mask):
    keys = 600 if mask == "packed" else 700  # as many as queries, in each sequence
    case = Case("", 2, 4, 2, 600, keys, 8, mask)
    made = case.mask_of()
    seen = np.ones((2, 4, 600, keys)) if made is None else materialize(made, 600, keys, batch=2, heads=4)
    assert case.pairs() == pytest.approx(seen.sum(), rel=1e-12)


def test_work():
    case = Case("", 2, 4, 2, 3, 5, 8)
    assert case.work(4) == 4 * 8 * 2 * 4 * 3 * 5
    assert replace(case, kind="training").work(4) == 14 * 8 * 2 * 4 * 3 * 5
    assert replace(case, kind="decode").work(2) == 2 * (2 * 2 * 5 * 8) * 2  # K and V, each read once


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what a peer's import says of its own code
@pytest.mark.parametrize("peer", [name for name in installed() if name != "flex"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_right_in_every_peer(case, peer):
    small = case.smaller(64)
    data = arrays(small)
    asked = question(peer, small)
    if asked is None:
        assert peer == PLAIN and not case.options
        return
    try:
        run, answers = PEERS[peer][1](asked, data, "float32")
    except Refused:
        assert peer not in ("tilewise", PLAIN) and (peer != "torch" or case.options)
        return
    found = answers(run())
    assert len(found) == (2 if case.kind == "training" else 1)  # with a gradient
    assert measure.worst_error(asked, data, found) < 1e-5


@pytest.mark.parametrize("spoilt", [0, 1])
@pytest.mark.parametrize("how", [lambda x: x * 1.01, lambda x: np.where(np.arange(x.shape[-1]) == 3, np.nan, x)])
def test_wrong_outputs_and_gradients_are_noticed(spoilt, how):
    case = Case("", 1, 2, 2, 40, 40, 8, "causal", "training")
    run, answers = PEERS["tilewise"][1](case, arrays(case), "float32")
    found = list(answers(run()))
    assert measure.worst_error(case, arrays(case), tuple(found)) < 1e-5
    found[spoilt] = how(found[spoilt])
    assert not measure.worst_error(case, arrays(case), tuple(found)) < 5e-3


def test_packed_sequences():
    case = Case("", 1, 1, 1, 512, 512, 8, "packed")
    lengths = np.diff(case.starts())
    np.testing.assert_array_equal(lengths, 2 * np.arange(1, 32, 2))
    assert case.pairs() == (lengths * (lengths + 1) // 2).sum()


def test_pages_are_each_sequences_own():
    lengths = np.array([0, 1, PAGE, PAGE + 1, 5 * PAGE - 1])
    slots, table = pages(lengths)
    assert len(set(slots.tolist())) == len(slots) == lengths.sum()
    sequence = np.repeat(np.arange(5), lengths)
    token = np.concatenate([np.arange(n) for n in lengths])
    np.testing.assert_array_equal(slots, table[sequence, token // PAGE] * PAGE + token % PAGE)
    assert not set(table[2]) & set(table[3]) and set(table.ravel().tolist()) == set(range(9))


def test_options_are_held_against_the_same_case_without_them():
    case = Case("", 1, 2, 2, 40, 40, 8, "causal, dense", "training", True)
    result = measure.measure(case, "float32", ["tilewise", PLAIN, "torch"], lambda: 100.0, 0.0, lambda text: None)
    assert set(result.seconds) == {"tilewise", PLAIN} and set(result.refusals) == {"torch"}
    assert result.peak == 100 and result.share == pytest.approx(result.rate / 100)
    assert question(PLAIN, replace(case, options=False)) is None
    # What the options change is noticed: without them the result is another.
    run, answers = PEERS[PLAIN][1](case.plain(), arrays(case), "float32")
    assert measure.worst_error(case, arrays(case), answers(run())) > 0.01


def test_a_wrong_peer_is_not_timed(monkeypatch):
    case = Case("", 1, 2, 2, 40, 40, 8, "causal")
    right = PEERS["tilewise"]
    monkeypatch.setitem(
        PEERS, "wrong", (("torch",), lambda case, data, dtype: right[1](replace(case, mask="full"), data, dtype))
    )
    result = measure.measure(case, "float32", ["tilewise", "wrong"], lambda: 100.0, 0.0, lambda text: None)
    assert set(result.seconds) == {"tilewise"} and result.refusals["wrong"].startswith("wrong by")


def test_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "peaks", lambda found: PEAKS)
    words = "bench --quick --seconds 0 --peer torch --case cross --case 512 --dtype float32 --out"
    done = CliRunner().invoke(app, [*words.split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "cross-attention" in done.output and "x torch" in done.output
    (found,) = tmp_path.glob("*.json")
    held = json.loads(found.read_text())
    assert held["peaks"] == PEAKS and {"tilewise", "torch"} == set(held["results"][0]["seconds"])
    assert found.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("words", ["--case nothing", "--dtype int8", "--peer nobody"])
def test_mistakes_are_named(words):
    done = CliRunner().invoke(app, ["bench", *words.split()])
    assert done.exit_code != 0 and words.split()[0] in done.output
