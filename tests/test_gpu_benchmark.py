"""The script for GPUs runs to its end without one, and what it writes is a table that the planner reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tilewise.plan.measured import read

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"


@pytest.mark.slow
def test_it_runs_and_writes_a_table(tmp_path: Path) -> None:
    out, table = tmp_path / "gpu.json", tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--table", str(table)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout + done.stderr
    found = {(row.kind, row.step): set(row.tflops) for row in read(table).rows}
    assert {"aten/cpu", "triton", "portable"} <= found["causal", "forward"]
    assert {"aten/cpu", "triton/split", "triton/atomics", "portable"} <= found["causal", "backward"]
    labels = found["labels", "forward"]
    assert "triton" in labels and not any(name.startswith("aten") for name in labels)
    assert {row["who"] for row in json.loads(out.read_text())["rows"] if "ms" in row} >= {"aten/cpu", "triton"}
