"""What the Triton kernels compile to, for GPUs that need not be here: instructions, shared memory, spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
INSTRUCTION = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}

# Bytes of stack a thread may use on sm_90, where registers go that do not fit. The two accumulators of the backward
# pass and what is read for each pair leave some, which was preferred to smaller tiles; the plain forward leaves few.
STACK = {"forward_kernel": 256, "d_kv_kernel": 320, "d_q_kernel": 256, "d_dense_kernel": 128, "d_table_kernel": 256}
PLAIN_FORWARD_STACK = 64

QUICK = ["64,bfloat16,causal", "128,bfloat16,backward+causal"]
DECODE = ["128,bfloat16,decode+causal", "64,float16,decode", "256,bfloat16,decode+causal"]
# Pages that hold several tiles of keys, parts of one, and what is no power of two.
PAGES = [
    "128,bfloat16,pages64+window",
    "128,float16,pages16+window",
    "64,bfloat16,pages24+table",
    "256,bfloat16,pages16",
]
EVERY = [
    *(
        f"{d},{dtype},backward{mask}"
        for d in (64, 128, 256)
        for dtype in ("bfloat16", "float16")
        for mask in ("", "+causal")
    ),
    "128,bfloat16,backward+labels",
    "128,bfloat16,backward+dense",
    "128,bfloat16,backward+bias",
    "128,bfloat16,backward+softcap+sinks",
    "128,bfloat16,backward+dropout",
    "64,float16,backward+softcap+dense+sinks+dropout+table",
    "256,bfloat16,backward+bias",
]


@lru_cache
def reports(arch: str, problems: tuple[str, ...]) -> list[dict[str, Any]]:
    """What `compile_for.py` prints, in a process of its own."""
    source = Path(__import__("tilewise").__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(source)
    }
    script = Path(__file__).with_name("compile_for.py")
    done = subprocess.run(
        [sys.executable, str(script), arch, ";".join(problems)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(arch: str, problems: tuple[str, ...]) -> None:
    found = reports(arch, problems)
    assert {report["problem"] for report in found} == set(problems)
    for report in found:
        assert report["shared"] <= SHARED[arch], report
        if report["kernel"] in STACK:
            assert report[INSTRUCTION[arch]] > 0, report
        if report["kernel"] in STACK and arch == "sm_90":
            assert report["stack"] <= STACK[report["kernel"]], report
            if report["kernel"] == "forward_kernel" and "bias" not in report["problem"]:
                assert report["stack"] <= PLAIN_FORWARD_STACK, report


def test_hopper() -> None:
    check("sm_90", tuple(QUICK))


def check_decode(arch: str, problems: tuple[str, ...]) -> None:
    """Nothing spills; rows are as few as the smaller matrix instruction takes, so on sm_90 that one is used."""
    found = reports(arch, problems)
    assert {report["kernel"] for report in found} >= {"decode_kernel", "merge_kernel"}
    for report in found:
        assert report["shared"] <= SHARED[arch] and report["stack"] == 0, report
        if report["kernel"] == "decode_kernel":
            assert sum(report.get(name, 0) for name in ("mma", "wgmma", "tcgen05", "mfma")) > 0, report


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_decode(arch: str) -> None:
    check_decode(arch, (*DECODE, *PAGES))


@pytest.mark.slow
@pytest.mark.parametrize("problem", EVERY)
def test_hopper_everything(problem: str) -> None:
    check("sm_90", (problem,))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "gfx942"])
@pytest.mark.parametrize("problem", QUICK)
def test_other_architectures(arch: str, problem: str) -> None:
    check(arch, (problem,))
