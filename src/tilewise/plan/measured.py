"""What was measured on a device: rates of kernels by class of problem, one JSON file for each device.

A GPU run of `benchmarks/gpu.py` writes such a file; those shipped are in `plan/tables`, and `TILEWISE_TABLE` names one
more, which comes first. A file holds

    {"device": "NVIDIA H200", "architecture": "sm_90", "torch": "2.11.0", "rows": [
      {"kind": "causal", "dtype": "bfloat16", "width": 128, "length": 4096, "step": "forward",
       "tflops": {"triton": 455.0, "aten/cudnn": 610.0}}]}

with a rate for every kernel, or way of a kernel, that was found right and then timed. Only what the table has was
checked on that device.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..problem import AttentionProblem, kind_of

Step = Literal["forward", "backward"]

_FOLDER = Path(__file__).with_name("tables")


@dataclass(frozen=True, slots=True)
class Row:
    """Rates of one class of problems.

    Attributes:
        kind: what `kind_of` says; dtype: of q, k, v; width: the larger of D and Dv; length: keys; step: which pass.
        tflops: by kernel, or "kernel/way".
    """

    kind: str
    dtype: str
    width: int
    length: int
    step: Step
    tflops: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on one device."""

    device: str
    architecture: str
    rows: tuple[Row, ...]

    def rate(self, problem: AttentionProblem, kernel: str, ways: tuple[str, ...], step: Step) -> float | None:
        """Operations per second of a kernel, by its fastest way, on problems like this; None where not measured."""
        found = self._tflops(problem, step)
        rates = [found[name] for name in _names(kernel, ways) if name in found]
        return 1e12 * max(rates) if rates else None

    def fastest(self, problem: AttentionProblem, kernel: str, ways: tuple[str, ...], step: Step) -> str | None:
        """The way of a kernel that was measured fastest on problems like this; None where none was."""
        found = self._tflops(problem, step)
        known = [way for way in ways if f"{kernel}/{way}" in found]
        return max(known, key=lambda way: found[f"{kernel}/{way}"]) if known else None

    def _tflops(self, problem: AttentionProblem, step: Step) -> Mapping[str, float]:
        """The row of the same kind, dtype and step, the next larger width and the nearest length, if there is one."""
        kind, width = kind_of(problem), max(problem.head_dim, problem.value_dim)
        alike = [
            row
            for row in self.rows
            if (row.kind, row.dtype, row.step) == (kind, problem.dtype, step) and row.width >= width
        ]
        if not alike or not problem.k_len:
            return {}
        return min(alike, key=lambda row: (row.width, abs(math.log(row.length / problem.k_len)))).tflops


# Words of GPUs' names and what their compilers call them, for problems on machines that are not here.
_ARCHITECTURES = {
    "sm_80": ("a100", "a800", "a30"),
    "sm_89": ("l4", "l40", "l40s", "4090", "4080"),
    "sm_90": ("h100", "h200", "h800", "gh200", "h20"),
    "sm_100": ("b200", "gb200"),
    "gfx942": ("mi300x", "mi325x"),
}


def architecture_of(device: str) -> str:
    """The architecture of a GPU by its name ("H200" is "sm_90"), "" where the name is not known."""
    words = set(_words(device))
    return next((arch for arch, names in _ARCHITECTURES.items() if words & set(names)), "")


def table_for(device: str) -> Table | None:
    """The table of a device, by its full name or by words of it ("H200"); None where there is none."""
    return _find(device, os.environ.get("TILEWISE_TABLE", "")) if device else None


@lru_cache(maxsize=64)
def _find(device: str, extra: str) -> Table | None:
    wanted = set(_words(device))
    tables = [read(path) for path in _files(extra)]
    exact = [table for table in tables if set(_words(table.device)) == wanted]
    alike = exact or [table for table in tables if wanted <= set(_words(table.device))]
    return alike[0] if alike else None


def _files(extra: str) -> Iterator[Path]:
    if extra:
        yield Path(extra)
    yield from sorted(_FOLDER.glob("*.json"))


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: beginning with "TILEWISE_TABLE:", where the file holds no table.
    """
    try:
        held = json.loads(path.read_text())
        rows = tuple(_row(row) for row in held["rows"])
        return Table(str(held["device"]), str(held["architecture"]), rows)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"TILEWISE_TABLE: {path} holds no table of a device, as benchmarks/gpu.py writes them: {error!r}"
        ) from None


def _row(held: Mapping[str, Any]) -> Row:
    step = held["step"]
    if step not in ("forward", "backward"):
        raise ValueError(f"step: got {step!r}, expected 'forward' or 'backward'")
    rates = {str(name): float(rate) for name, rate in held["tflops"].items()}
    return Row(str(held["kind"]), str(held["dtype"]), int(held["width"]), int(held["length"]), step, rates)


def _words(device: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", device.lower())


def _names(kernel: str, ways: tuple[str, ...]) -> list[str]:
    return [f"{kernel}/{way}" for way in ways] if ways else [kernel]
