"""The example runs as its first lines say, with fewer steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed")
EXAMPLE = Path(__file__).parents[2] / "examples" / "context_parallel_torch.py"


def test_the_loss_curve_is_that_of_one_device():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = subprocess.run(
        [*command, "--steps", "3", "--length", "128"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the curves agree" in done.stdout
