"""Real text that is on any machine: the documents of this repository, and Python's own account of its library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 600  # characters of a passage: about 150 tokens
SHORTEST = 60


class Passage(NamedTuple):
    """A piece of text and where it stands."""

    source: str
    text: str


def passages(count: int) -> list[Passage]:
    """So many passages, about half from each source where both have enough, and always in the same order."""
    own, library = list(_repository()), list(_library())
    taken = own[: max(count // 2, count - len(library))]
    return taken + library[: count - len(taken)]


def _repository() -> Iterator[Passage]:
    """The paragraphs of the Markdown files at the root."""
    for path in sorted(ROOT.glob("*.md")):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST and not text.startswith(("```", "|")):
                yield Passage(path.name, text[:LONGEST])


def _library() -> Iterator[Passage]:
    """The docstrings of the modules of the standard library, read and not run. Well-known modules come first."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*folder.glob("[a-z]*.py"), *folder.glob("[a-z]*/__init__.py")]
    found = [passage for path in sorted(files) if (passage := _docstring(path)) is not None]
    yield from sorted(found, key=lambda passage: passage.source not in KNOWN)


KNOWN = {
    "argparse", "base64", "bisect", "calendar", "csv", "datetime", "difflib", "email", "fractions", "functools",
    "gzip", "heapq", "html", "json", "logging", "mailbox", "pathlib", "pickle", "random", "sched", "secrets",
    "shutil", "smtplib", "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "zipfile",
}  # fmt: skip


def _docstring(path: Path) -> Passage | None:
    name = path.parent.name if path.name == "__init__.py" else path.stem
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):
        return None  # not every installation ships every file as readable source
    text = " ".join((text or "").split())
    return Passage(name, text[:LONGEST]) if len(text) >= SHORTEST else None
