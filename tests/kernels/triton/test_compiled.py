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

# The kernels whose tile sizes are in the table, and which use the matrix instruction of the architecture.
TILED = ("forward_kernel", "d_kv_kernel", "d_q_kernel", "d_dense_kernel", "d_table_kernel")

# No entry of the table for widths 64 and 128 in bfloat16 may spill a register on sm_80 or sm_90, but for what stands
# here with the bytes of stack that it takes: by architecture, width, kernel and words of the problem.
SPILLS = {
    ("sm_80", 64, "d_kv_kernel", "+dropout+causal"): 8,
    ("sm_80", 64, "d_kv_kernel", "+dropout+causal+atomics"): 16,
    ("sm_90", 128, "d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 8,
    ("sm_90", 128, "d_kv_kernel", "+dropout+causal+atomics"): 40,
}
# From width 256 on the accumulators fill the registers, and what they push out is only bounded.
WIDE_STACK = 640

QUICK = ["64,bfloat16,causal", "128,bfloat16,backward+causal"]
DECODE = ["128,bfloat16,decode+causal", "64,float16,decode", "256,bfloat16,decode+causal"]
# Pages that hold several tiles of keys, parts of one, and what is no power of two.
PAGES = [
    "128,bfloat16,pages64+window",
    "128,float16,pages16+window",
    "64,bfloat16,pages24+table",
    "256,bfloat16,pages16",
]
# By the three columns of the table: what is compiled of each entry, in both ways of the backward pass.
COLUMNS = {
    "plain": ("", "+causal", "+softcap+sinks+causal", "+labels", "+atomics", "+causal+atomics"),
    "pairs": ("+bias", "+table+causal", "+dense", "+bias+atomics"),
    "dropout": ("+dropout", "+dropout+causal", "+softcap+dense+sinks+dropout+table", "+dropout+causal+atomics"),
}


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
        if report["kernel"] in TILED:
            assert report[INSTRUCTION[arch]] > 0, report
            if arch in ("sm_80", "sm_90"):
                assert report["stack"] <= most_stack(report), report


def most_stack(report: dict[str, Any]) -> int:
    """Bytes of stack that a kernel of sm_80 or sm_90 may use."""
    width, _, words = report["problem"].split(",")
    if int(width) >= 256:
        return WIDE_STACK
    return SPILLS.get((report["arch"], int(width), report["kernel"], words.removeprefix("backward")), 0)


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
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_entry_of_the_table(arch: str, width: int, column: str) -> None:
    check(arch, tuple(f"{width},bfloat16,backward{words}" for words in COLUMNS[column]))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "+causal", "+bias"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_width_256(arch: str, words: str) -> None:
    check(arch, (f"256,bfloat16,backward{words}",))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "gfx942"])
@pytest.mark.parametrize("problem", QUICK)
def test_other_architectures(arch: str, problem: str) -> None:
    check(arch, (problem,))
