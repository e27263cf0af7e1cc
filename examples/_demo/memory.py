"""The peak of this process's memory during a piece of work."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_above_now() -> Iterator[Callable[[], int | None]]:
    """Gives a function that answers: how many bytes did the process grow by, at its highest, since the start?

    Linux keeps the high-water mark and lets a process reset its own. Elsewhere the mark covers the whole life of the
    process and cannot be reset, so it answers only where it has risen, and None where the work stayed below it.
    """
    if STATUS.exists():
        _give_back_free_memory()
        try:
            RESET.write_text("5")  # by proc(5): reset the peak resident set size to the present one
            start = _field("VmRSS")
            yield lambda: _field("VmHWM") - start
            return
        except OSError:
            pass  # some sandboxes mount /proc read-only
    start = _life_peak()
    yield lambda: _life_peak() - start or None


def _give_back_free_memory() -> None:
    """What earlier work left free within the process would be used again, and hide that the process grew."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def _life_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
