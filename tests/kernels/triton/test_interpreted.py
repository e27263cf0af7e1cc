"""The Triton kernels' values, tile by tile in Triton's interpreter, in a process of its own: it is chosen at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import paged_cases  # noqa: E402
from triton_cases import CASES  # noqa: E402

# Two tiles an axis, the second one ragged.
SIZE = 50
QUICK = [case.name for case in CASES if not case.wide]
HALVES = [
    "causal end",
    "three biases and a table",
    "dropout",
    "dropout of most",
    "rubbish in a document",
    "width 1",
    "decode",
]


PAGED_HALVES = ["pages of 7", "many queries", "dense mask and bias", "cache"]


def results(dtype: str, names: tuple[str, ...]) -> dict[str, str | None]:
    """What went wrong in each case, or None."""
    return run("triton_cases.py", dtype, str(SIZE), *names)


@lru_cache
def run(script: str, dtype: str, *arguments: str) -> dict[str, str | None]:
    """What a script of cases found, by case: what went wrong, or None."""
    source = Path(__import__("tilewise").__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / script), "cpu", dtype, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {record["case"]: record["error"] for record in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", QUICK)
def test_float32(name: str) -> None:
    assert results("float32", tuple(QUICK))[name] is None, results("float32", tuple(QUICK))[name]


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half(dtype: str, name: str) -> None:
    assert results(dtype, tuple(HALVES))[name] is None, results(dtype, tuple(HALVES))[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_everything(dtype: str, name: str) -> None:
    names = tuple(case.name for case in CASES)
    assert results(dtype, names)[name] is None, results(dtype, names)[name]


@pytest.mark.parametrize("name", paged_cases.NAMES)
def test_pages(name: str) -> None:
    found = run("paged_cases.py", "float32")[name]
    assert found is None, found


@pytest.mark.parametrize("name", PAGED_HALVES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pages_in_half(dtype: str, name: str) -> None:
    found = run("paged_cases.py", dtype, *PAGED_HALVES)[name]
    assert found is None, found


@pytest.mark.slow
@pytest.mark.parametrize("name", paged_cases.NAMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_pages_in_half(dtype: str, name: str) -> None:
    found = run("paged_cases.py", dtype)[name]
    assert found is None, found
