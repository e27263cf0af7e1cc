"""Compile every kernel that one call launches, for a GPU that need not be here, and print what came out as JSON.

Run as `python compile_for.py ARCH PROBLEMS`, in a process of its own: a compiler that aborts takes its process along.
The calls are real ones, on CPU tensors, with a driver that claims the architecture and a launch that only compiles, so
what is compiled is what would run there.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import tilewise
from tilewise.contract import Plan, Tiles
from tilewise.kernels.triton import backward, forward
from tilewise.kernels.triton import launch as launching
from tilewise.validate import prepare


class _Driver:
    """Claims a target; can compile for it and never launches."""

    def __init__(self, arch: str) -> None:
        number = arch.removeprefix("sm_")
        self.target = GPUTarget("cuda", int(number), 32) if number != arch else GPUTarget("hip", arch, 64)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_call(call: Any, gradients: frozenset[str]) -> list[dict[str, Any]]:
    """Forward and, where gradients are wanted, backward of a call; a report for each kernel compiled."""
    reports: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        reports.append(_report(self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    try:
        plan = Plan(dataclasses.replace(call.problem, gradients=gradients), "triton", "triton", Tiles(0, 0), 0, {})
        out, lse = forward.forward(plan, call.operands)
        if gradients:
            backward.backward(plan, call.operands, out, lse, torch.empty_like(out), None)
    finally:
        JITFunction.run = run
    return reports


def _report(name: str, compiled: Any) -> dict[str, Any]:
    report = {"kernel": name, "shared": compiled.metadata.shared}
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        registers, stack = _resources(compiled.asm["cubin"])
        report |= {
            "wgmma": ptx.count("wgmma.mma_async"),
            "tcgen05": ptx.count("tcgen05.mma"),
            "mma": ptx.count("mma.sync"),
        }
        return report | {"registers": registers, "stack": stack}
    code = compiled.asm["amdgcn"]
    spills = re.findall(r"\.(?:sgpr|vgpr)_spill_count:\s*(\d+)", code)
    return report | {"mfma": code.count("v_mfma"), "stack": sum(map(int, spills))}


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, where spilled registers go) of a thread, as Triton's own cuobjdump says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def problem(d: int, dtype: str, what: str) -> tuple[Any, frozenset[str]]:
    """A call of some width and dtype; `what` is words joined by "+": backward, causal, dense, bias, table, …"""
    words = what.split("+")
    b, h, s = 1, 2, 1024
    q, k, v = (torch.empty((b, h, s, d), dtype=getattr(torch, dtype)) for _ in range(3))
    if "decode" in words:  # one query, eight heads of queries for each of keys
        q = torch.empty((b, 8 * h, 1, d), dtype=q.dtype)
    mask = tilewise.causal("end") if "causal" in words else None
    if "dense" in words:
        mask = tilewise.dense(torch.ones(s, s, dtype=torch.bool))
    if "labels" in words:
        mask = tilewise.documents(torch.arange(s) % 3)
    bias = torch.zeros(h, s, s, dtype=q.dtype) if "bias" in words else None
    bias = tilewise.alibi(torch.ones(h)) if "table" in words else bias
    call = prepare(
        q, k, v, mask=mask, bias=bias, scale=None, softcap=30.0 if "softcap" in words else None,
        sinks=0.0 if "sinks" in words else None, dropout=tilewise.Dropout(0.1, 1) if "dropout" in words else None,
        layout="bhsd", return_lse=False,
    )  # fmt: skip
    wanted = {"q", "k", "v", *({"bias"} & set(words)), *({"table"} & set(words))} if "backward" in words else set()
    return call, frozenset(wanted)


def main(arch: str, problems: str) -> None:
    """Compile each of the problems "d,dtype,what;…"."""
    driver.set_active(_Driver(arch))
    launching.architecture = lambda device: arch
    for text in problems.split(";"):
        d, dtype, what = text.split(",")
        for report in compile_call(*problem(int(d), dtype, what)):
            print(json.dumps({"arch": arch, "problem": text} | report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
