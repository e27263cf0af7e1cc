"""Pictures of masks: right at every size, and as cheap for a million keys as for ten."""

from __future__ import annotations

import builtins
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.mask_oracle import expected
from support.mask_strategies import masks, sizes

import tilewise as tw
from tilewise.masks.draw import save_png

MILLION = 1_000_000


def tiles(text: str) -> list[str]:
    """The drawn rows of tiles."""
    return [line.split()[-1] for line in text.splitlines()[2:-1]]


def test_a_small_mask_is_drawn_pair_by_pair():
    assert tw.draw(tw.causal(), 4, 4).splitlines() == [
        "causal(), 4 queries (down) x 4 keys (across)",
        "  0",
        "0 █···",
        "1 ██··",
        "2 ███·",
        "3 ████",
        "· empty 37.5%   ▒ mixed 0.0%   █ full 62.5%   of tiles of one pair each",
    ]


@given(st.data())
def test_every_tile_tells_the_truth(data):
    size = data.draw(sizes(9).filter(lambda s: 0 not in s))
    mask = data.draw(masks(size))
    b, h, width = (data.draw(st.integers(0, n)) for n in (size[0] - 1, size[1] - 1, 6))
    # The mask alone tells how many batch rows there are, and a row that all share may have any number.
    truth = expected(mask, size)[b, h]
    lines = tiles(tw.draw(mask, size[2], size[3], batch=b, head=h, width=width + 1))
    rows, columns = -(-size[2] // max(1, (width + 1) // 2)), -(-size[3] // (width + 1))
    for y, x in np.ndindex(-(-size[2] // rows), -(-size[3] // columns)):
        tile = truth[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
        assert lines[y][x] == ("█" if tile.all() else "▒" if tile.any() else "·")


LONG = {
    "ranges": tw.causal() & tw.window(100_000) | tw.prefix(1000),
    "labels": tw.documents(np.arange(MILLION) % 5),
    "predicate": tw.predicate(lambda b, h, i, j: (i - j) % 100_000 < 40_000) & tw.causal(),
    "blocks": tw.blocks(np.tri(100, dtype=bool)[::-1], 10_000),
}


@pytest.mark.parametrize("name", LONG)
def test_a_million_keys_are_drawn_in_little_memory(name):
    tracemalloc.start()
    text = tw.draw(LONG[name], MILLION, MILLION)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 250 * MILLION
    assert len(tiles(text)) == 32 and all(len(row) == 64 for row in tiles(text))
    assert ("judged by" in text) == (name in ("labels", "predicate")), "a picture of some pairs must say so"


def test_nothing_to_draw():
    assert "0 queries" in tw.draw(tw.causal(), 0, 0) and tiles(tw.draw(tw.causal("end"), 0, 5)) == []


WRONG = [
    (ValueError, "q_len", (tw.causal(), -1, 1), {}),
    (TypeError, "k_len", (tw.causal(), 1, 1.5), {}),
    (ValueError, "width", (tw.causal(), 1, 1), {"width": 0}),
    (ValueError, "batch", (tw.lengths(k=[1, 2]), 3, 3), {"batch": 2}),
    (ValueError, "head", (tw.dense(np.ones((2, 3, 3), bool)), 3, 3), {"head": 2}),
    (TypeError, "head", (tw.causal(), 3, 3), {"head": None}),
    (TypeError, "mask", ("causal", 3, 3), {}),
    (ValueError, "mask", (tw.causal(), 3, 4), {}),
]


@pytest.mark.parametrize(("kind", "argument", "args", "options"), WRONG)
def test_a_wrong_argument_is_named_first(kind, argument, args, options):
    with pytest.raises(kind, match=rf"^{argument}: "):
        tw.draw(*args, **options)


def test_a_png_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "mask.png"
    save_png(tw.causal() & tw.window(700), 4096, 4096, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"tilewise\[cli\]"):
        save_png(tw.causal(), 4, 4, tmp_path / "mask.png")
