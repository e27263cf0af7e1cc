"""What the demo prints: a terminal gets colour and moving bars, anything else gets plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from tilewise import Plan

WIDTH = 24  # of the column of names


class Page:
    """Prints names with values and verdicts, and remembers whether every verdict was good."""

    def __init__(self) -> None:
        self.all_hold = True
        self._console = Console(highlight=False)

    def title(self, name: str, rest: str = "") -> None:
        """A heading."""
        self._console.print()
        self._console.print(Text.assemble((name, "bold"), "  " if rest else "", (rest, "dim")), soft_wrap=True)

    def row(self, name: str, value: str, style: str = "") -> None:
        """One fact."""
        self._write(name, value, style)

    def check(self, name: str, value: str, holds: bool) -> None:
        """One comparison; a failed one makes the demo fail."""
        self.all_hold &= holds
        self._write(name, f"{value}  {'holds' if holds else 'FAILS'}", "green" if holds else "bold red")

    def plan(self, plan: Plan) -> None:
        """What `explain` says."""
        for line in str(plan).splitlines():
            self._console.print(Text("    " + line, style="dim"), soft_wrap=True)

    def close(self) -> None:
        """The last line."""
        self._console.print()
        self._console.print(
            Text("every comparison holds", "bold green") if self.all_hold else Text("a comparison FAILS", "bold red")
        )

    @contextmanager
    def progress(self, name: str, total: float) -> Iterator[Callable[[float], None]]:
        """Gives a function to be told how much more of `total` is done."""
        if self._console.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn())
            with Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True
            ) as bar:
                task = bar.add_task(name.ljust(WIDTH), total=total)
                yield lambda done: bar.advance(task, done)
            return
        yield self._plain_progress(name, total)

    def _plain_progress(self, name: str, total: float) -> Callable[[float], None]:
        """A line at each quarter: enough to see that it moves, in a log that somebody will read."""
        start, done = time.perf_counter(), 0.0

        def advance(more: float) -> None:
            nonlocal done
            before, done = done, done + more
            if int(4 * before / total) < (quarter := int(4 * done / total + 1e-9)):
                self._write(name, f"{25 * quarter:3d} %  {time.perf_counter() - start:.1f} s", "")

        return advance

    def _write(self, name: str, value: str, style: str) -> None:
        self._console.print(Text.assemble("  ", name.ljust(WIDTH), (value, style)), soft_wrap=True)
