"""How the commands speak: aligned rows for people at a terminal, the same text in plain lines for everything else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import TilewiseError

Row = tuple[str, str]


def heading(text: str) -> None:
    """A line that begins a section."""
    _console().print(Text(text, style="bold"), soft_wrap=True)


def rows(pairs: Iterable[Row], indent: int = 0) -> None:
    """Names and texts in two columns; a terminal gets its long texts wrapped inside their column."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    console = _console()
    if not console.is_terminal:
        for name, text in pairs:
            print((" " * indent + f"{name:<{width}}  {text}").rstrip())
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=width + indent, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(Text(" " * indent + name, style="cyan"), Text(text))
    console.print(grid)


def lines(text: str) -> None:
    """Text as it is."""
    print(text)


@contextmanager
def reported() -> Iterator[None]:
    """What the user asked for and cannot be had becomes one message and exit status 2, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, TilewiseError) as error:
        print(f"tilewise: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _console() -> Console:
    # Made when asked, since whoever runs a command may have put another stream in place of the standard output.
    return Console(highlight=False)
