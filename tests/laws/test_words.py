"""Public names are documented, mirrored lists agree, and files speak of nothing but the library."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest

import tilewise as tw
from tilewise.kernels import cards
from tilewise.kernels.native.buffers import DTYPE_CODES
from tilewise.masks.lower import TILE
from tilewise.masks.ranges import MOST_RANGES

ROOT = Path(__file__).parents[2]
PUBLIC = [name for name in tw.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(tw, name)
    text = inspect.getdoc(thing)
    assert text and len(text.splitlines()[0]) > 20
    if inspect.isfunction(thing):
        parameters = inspect.signature(thing).parameters
        for parameter in parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{parameter} is not explained"
        if parameters:
            assert "Args:" in text or len(parameters) == 1
            assert "Raises:" in text, "errors are not stated"


@pytest.mark.parametrize("name", ["attention", "explain", "merge", "materialize", "blocks", "dense", "documents",
                                  "intervals", "lengths", "causal", "prefix", "alibi", "relative", "t5"])  # fmt: skip
def test_shapes_are_stated(name):
    assert re.search(r"\((T|B|H|S|Hq|Sq|batch|nq|buckets)\b[^)]*\)", inspect.getdoc(getattr(tw, name)))


def test_all_is_sorted_and_complete():
    assert sorted(tw.__all__) == list(tw.__all__)
    for name in tw.__all__:
        assert hasattr(tw, name)


def _header() -> str:
    path = ROOT / "native/core/problem.h"
    if not path.exists():
        pytest.skip("the sources of the native core are not here")
    return path.read_text()


def _constant(name: str) -> int:
    return int(re.search(rf"\b{name} = (-?\d+)", _header())[1])


def test_constants_are_the_same_in_c_and_python():
    for name, code in DTYPE_CODES.items():
        assert _constant(f"TW_{name.upper()}") == code
    assert _constant("TW_DTYPES") == len(DTYPE_CODES)
    assert _constant("TW_BIT_TILE") == TILE
    assert _constant("TW_MAX_RANGES") == MOST_RANGES
    native = next(card for card in cards() if card.name == "native")
    assert _constant("TW_MAX_BIASES") == native.max_dense_biases
    assert (_constant("TW_TILE_EMPTY"), _constant("TW_TILE_FULL")) == (-1, -2)


# Written in halves, so that this file does not find itself.
FORBIDDEN = ["ses" + "sion", "ag" + "ent", "work" + "place", "/wo" + "rk/", "/tmp" + "/spec", "clau" + "de",
             "anthro" + "pic", "language" + " model wrote", "pypi-" + "more", "opt/" + "pypi"]  # fmt: skip
# A word may stand inside a name that is not ours to choose.
ALLOWED = re.compile(
    r"cpu_AG|user-AG|InferenceSES|pytest_SES\w*|scope=.SES|add_SES_config_entry|SES\.force_spinning_stop".replace(
        "AG", "ag" + "ent"
    ).replace("SES", "ses" + "sion"),
    re.I,
)


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if not name.startswith((".venv/", "build/"))]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("word", FORBIDDEN, ids=lambda word: word[::-1])
def test_no_file_speaks_of_how_it_was_made(word):
    pattern = re.compile(rf"(?<![a-z]){re.escape(word)}s?(?![a-z])", re.I)
    found = []
    for path in _files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in lines if pattern.search(ALLOWED.sub("", line))]
    assert not found, found


BANNED_NOTES = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")


def test_nothing_is_left_to_do():
    found = []
    for path in _files():
        if path.suffix in (".py", ".h", ".cpp", ".toml", ".md"):
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [f"{path.relative_to(ROOT)}:{n}" for n, line in lines if BANNED_NOTES.search(line)]
    assert not found, found
