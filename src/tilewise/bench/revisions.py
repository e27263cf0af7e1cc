"""This working tree against another git revision of it, round by round.

The other revision is built into a temporary folder, and each is served by a process of its own (`worker.py`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .cases import MASKS, Case, arrays


def compare(
    revision: str, cases: list[Case], dtypes: list[str], seconds: float, tell: Callable[[str], None]
) -> list[tuple[str, str, float, float]]:
    """(case, dtype, our seconds, the revision's time over ours), medians; cases with options are left out.

    Raises:
        ValueError: this is no git checkout, there is no such revision, or it cannot be built.
    """
    source = Path(__file__).parents[2]
    root = source.parent
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree, site = Path(folder) / "tree", Path(folder) / "site"
        tell(f"building {revision}")
        _command("git", "-C", str(root), "worktree", "add", "--detach", str(tree), revision)
        try:
            _command(
                sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                "--target", str(site), str(tree),
            )  # fmt: skip
            with _Worker(_installed(source, Path(folder))) as ours, _Worker(site) as theirs:
                for case in (case for case in cases if not case.options):
                    for dtype in dtypes:
                        tell(f"{case.name} {dtype}")
                        rows.append((case.name, dtype, *_timed(ours, theirs, case, dtype, seconds, Path(folder))))
        finally:
            _command("git", "-C", str(root), "worktree", "remove", "--force", str(tree))
    return rows


def _installed(source: Path, folder: Path) -> Path:
    """A folder in which this tree's package stands with its compiled module, which may be installed elsewhere."""
    from .. import _native

    place = folder / "ours"
    place.mkdir()
    package = place / "tilewise"
    package.mkdir()
    for part in (source / "tilewise").iterdir():
        (package / part.name).symlink_to(part)
    compiled = Path(str(_native.__file__))
    if not (package / compiled.name).exists():
        (package / compiled.name).symlink_to(compiled)
    return place


def _timed(ours: _Worker, theirs: _Worker, case: Case, dtype: str, seconds: float, folder: Path) -> tuple[float, float]:
    written, operand = MASKS[case.mask]
    path = folder / "case.npz"
    held: dict[str, Any] = {**arrays(case), **({"operand": operand(case)} if operand else {})}
    np.savez(path, **held)
    request = {"load": str(path), "mask": written, "dtype": dtype, "training": case.kind == "training"}
    for worker in (ours, theirs):
        worker.ask(request)
    times: list[float] = []
    ratios: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        mine, other = ours.ask({}), theirs.ask({})
        times.append(mine)
        ratios.append(other / mine)
    return statistics.median(times), statistics.median(ratios)


class _Worker:
    """A process that times cases with the package in a folder."""

    def __init__(self, folder: Path) -> None:
        program = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, request: dict[str, object]) -> float:
        """Seconds of one run."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError("--against: the process of one of the revisions ended; its message stands above")
        return float(json.loads(answer))


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--against: {' '.join(words[:4])} … failed: {done.stderr.strip().splitlines()[-1:]}")
