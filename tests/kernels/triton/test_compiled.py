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

sys.path.append(str(Path(__file__).parent))

from spills import SPILLS

# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
INSTRUCTION = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}

# The kernels whose tile sizes are in the table, and which use the matrix instruction of the architecture.
TILED = ("forward_kernel", "d_kv_kernel", "d_q_kernel", "d_dense_kernel", "d_table_kernel")

# All others run rarely or shortly and may spill a little: the compiler trades these bytes for more programs at once.
OTHERS_STACK = 128
# What works for far rows alone (`shares_kernel.py`) may spill whatever it does: other calls leave it at once.
OF_FAR_ROWS = ("shares_kernel", "d_kv_kernel of far rows")
# The kernels whose code depends on the way of the backward pass, by what it computes or by its tile sizes.
OF_A_WAY = ("d_kv_kernel", "careful_d_kv_kernel", "unsound_d_q_kernel")

QUICK = ["64,bfloat16,causal", "128,bfloat16,backward+causal", "256,bfloat16,backward+causal"]
DECODE = ["128,bfloat16,decode+causal", "64,float16,decode", "256,bfloat16,decode+causal"]
# As many rows as one tile takes.
FULLEST = [
    *(f"{width},bfloat16,decode+group64" for width in (64, 128, 256, 512)),
    "64,float32,decode+group64",
    "128,float32,decode+group32",
    "256,float32,decode+group16",
    "512,float32,decode+group16",
]
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
    "several": ("+dropout", "+dropout+causal", "+softcap+dense+sinks+dropout+table", "+dropout+causal+atomics"),
}
# Of each column what wants most registers.
HARDEST = {
    "plain": ("+causal", "+causal+atomics"),
    "pairs": ("+table+causal",),
    "several": ("+softcap+dense+sinks+dropout+table",),
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
    """Shared memory suffices, the matrix instruction is there, and nothing spills but what is recorded."""
    found = reports(arch, problems)
    assert {report["problem"] for report in found} == set(problems)
    wrong = [report for report in found if not fits(report)]
    assert not wrong, "\n".join(map(json.dumps, wrong))


def fits(report: dict[str, Any]) -> bool:
    """Whether one kernel is as it should be."""
    width, dtype, words = report["problem"].split(",")
    arch, kernel = report["arch"], report["kernel"]
    if report["shared"] > SHARED[arch]:
        return False
    if kernel in OF_FAR_ROWS:
        return True
    words = words.removeprefix("backward")
    if kernel not in OF_A_WAY:
        words = words.removesuffix("+atomics")
    recorded = SPILLS.get((arch, int(width), dtype, kernel, words), 0)
    if kernel not in TILED:
        return bool(report["stack"] <= max(OTHERS_STACK, recorded))
    # float32 products run on the ordinary units. At width 512 tiles have fewer rows than the instruction for four warps
    # takes: the smaller one serves.
    names = {INSTRUCTION[arch]} | ({"mma"} if width == "512" else set())
    if dtype != "float32" and not any(report.get(name) for name in names):
        return False
    return bool(report["stack"] <= recorded)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_quickly(arch: str) -> None:
    check(arch, tuple(QUICK))


def check_decode(arch: str, problems: tuple[str, ...]) -> None:
    """Nothing spills but what is recorded; few rows take the smaller matrix instruction, on sm_90 too."""
    found = reports(arch, problems)
    kernels = [(report["problem"], report["kernel"]) for report in found]
    assert set(kernels) >= {(problem, kernel) for problem in problems for kernel in ("decode_kernel", "merge_kernel")}
    for report in found:
        width, dtype, words = report["problem"].split(",")
        tiled = report["kernel"] == "decode_kernel"
        stack = SPILLS.get((arch, int(width), dtype, report["kernel"], words), 0) if tiled else OTHERS_STACK
        assert report["shared"] <= SHARED[arch] and report["stack"] <= stack, report
        if tiled and dtype != "float32":
            assert sum(report.get(name, 0) for name in ("mma", "wgmma", "tcgen05", "mfma")) > 0, report


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_decode(arch: str) -> None:
    check_decode(arch, (*DECODE, *FULLEST, *PAGES))


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_entry_of_the_table(arch: str, width: int, column: str) -> None:
    check(arch, tuple(f"{width},bfloat16,backward{words}" for words in COLUMNS[column]))


@pytest.mark.slow
@pytest.mark.parametrize("column", HARDEST)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_width_512(arch: str, column: str) -> None:
    check(arch, tuple(f"512,bfloat16,backward{words}" for words in HARDEST[column]))


@pytest.mark.slow
@pytest.mark.parametrize("column", HARDEST)
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("arch", ["sm_89", "sm_100", "gfx942"])
def test_other_architectures(arch: str, width: int, column: str) -> None:
    check(arch, tuple(f"{width},bfloat16,backward{words}" for words in HARDEST[column]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_float32(arch: str, width: int) -> None:
    refused = (arch, width) == ("sm_89", 512)  # see `test_card.py`
    check(arch, (f"{width},float32,causal" if refused else f"{width},float32,backward+causal",))
