"""Compile every kernel that one call launches, for a GPU that need not be here, and print what came out as JSON.

Run as `python compile_for.py ARCH PROBLEMS`, in a process of its own: a compiler that aborts takes its process along.
The calls are real ones, on CPU tensors, with a driver that claims the architecture, so what is compiled is what would
run there. It launches nothing, but what a launch would pass is held against what the kernel takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
from tilewise.torch import paged_attention
from tilewise.torch.ragged import pages_on_gpu
from tilewise.validate import prepare


class _Launcher:
    """Holds the arguments of a launch, records within records, against the types that the kernel was compiled for."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = tuple(source.signature.values())

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        """rest: stream, function, two kinds of metadata, two hooks, and the kernel's arguments."""
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (x, y, z)
        _check(self.signature, rest[6:])


def _check(types: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            _check(kind, value)
        elif kind.startswith("*"):
            assert isinstance(value, torch.Tensor), (kind, value)
        elif kind.startswith("i"):
            assert -(2 ** (int(kind[1:]) - 1)) <= value < 2 ** (int(kind[1:]) - 1), (kind, value)
        else:
            assert kind == "constexpr" or (kind == "fp32" and isinstance(value, float)), (kind, value)


class _Utilities:
    """Loads nothing."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module and function; registers, spills, most threads."""
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """So much shared memory that the tests have to find what is too much."""
        return {"max_shared_mem": 2**30}


class _Driver:
    """Claims a target; can compile for it and never launches."""

    launcher_cls, utils = _Launcher, _Utilities()

    def __init__(self, arch: str) -> None:
        number = arch.removeprefix("sm_")
        self.target = GPUTarget("cuda", int(number), 32) if number != arch else GPUTarget("hip", arch, 64)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiling() -> Iterator[list[dict[str, Any]]]:
    """A report of each kernel that would be launched stands in the list."""
    reports: list[dict[str, Any]] = []
    run = JITFunction.run

    def reported(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        name = self.__name__ + (" of far rows" if kwargs.get("FAR") else "")
        reports.append(_report(name, run(self, *args, **kwargs)))

    JITFunction.run = reported
    try:
        yield reports
    finally:
        JITFunction.run = run


def compile_call(call: Any, gradients: frozenset[str], way: str) -> list[dict[str, Any]]:
    """Forward and, where gradients are wanted, backward of a call; a report for each kernel compiled."""
    problem = dataclasses.replace(call.problem, gradients=gradients)
    plan = Plan(problem, "triton", "triton", Tiles(0, 0), 0, {}, backward_way=way)
    with compiling() as reports:
        out, lse = forward.forward(plan, call.operands)
        if gradients:
            backward.backward(plan, call.operands, out, lse, torch.empty_like(out), None)
    return reports


def compile_pages(d: int, dtype: str, words: list[str]) -> list[dict[str, Any]]:
    """Two sequences, their keys in pages of the size that the words name, 16 or 64 or 24."""
    size = next(int(word.removeprefix("pages")) for word in words if word.startswith("pages"))
    q = torch.empty((2, 1, 16, d), dtype=getattr(torch, dtype))
    k, v = (torch.empty((2048 // size + 1, size, 2, d), dtype=q.dtype) for _ in range(2))
    table = torch.zeros((2, 2048 // size + 1), dtype=torch.int32)
    options = {"mask": tilewise.window(700, 0, "end") if "window" in words else None}
    if "table" in words:
        options |= {"softcap": 30.0, "sinks": 0.0, "bias": tilewise.alibi(torch.ones(16), "end")}
    # The planner refuses Triton on a machine without a GPU.
    pages_on_gpu.choose = lambda problem, *_: Plan(problem, "triton", None, Tiles(0, 0), 0, {})
    with compiling() as reports:
        paged_attention(q, k, v, block_table=table, lengths=[2000, 40], kernel="triton", **options)
    return reports


def _report(name: str, compiled: Any) -> dict[str, Any]:
    report = {"kernel": name, "shared": compiled.metadata.shared}
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        assert _taken(ptx) == [*_passed(tuple(compiled.src.signature.values())), 8, 8], name  # and two of Triton's own
        registers, stack = _resources(compiled.asm["cubin"])
        report |= {
            "wgmma": ptx.count("wgmma.mma_async"),
            "tcgen05": ptx.count("tcgen05.mma"),
            "mma": ptx.count("mma.sync"),
        }
        return report | {"registers": registers, "stack": stack}
    code = compiled.asm["amdgcn"]
    # Scratch memory of a thread. Where no instruction reaches it, room was only reserved for scalar registers that do
    # not fit, and these went to lanes of vector registers.
    stack = re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)
    assert stack, code[-3000:]
    used = re.search(r"^\s*scratch_(load|store)", code, re.MULTILINE)
    return report | {"mfma": code.count("v_mfma"), "stack": int(stack[1]) if used else 0}


def _taken(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel."""
    entry = ptx[ptx.index(".entry") :]
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[: entry.index(")")])]


def _passed(types: tuple[Any, ...]) -> list[int]:
    """Bytes of each argument that is passed; what is known to the compiler is not."""
    found: list[int] = []
    for kind in types:
        if isinstance(kind, tuple):
            found += _passed(kind)
        elif kind != "constexpr":
            found.append(8 if kind.startswith("*") else int(kind.lstrip("fpi")) // 8)
    return found


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
    if "decode" in words:  # one query, eight heads of queries for each of keys, or as many as a word "group…" names
        group = next((int(word.removeprefix("group")) for word in words if word.startswith("group")), 8)
        q = torch.empty((b, group * h, 1, d), dtype=q.dtype)
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
        if "pages" in what:
            reports = compile_pages(int(d), dtype, what.split("+"))
        else:
            way = "atomics" if "atomics" in what else "split"
            reports = compile_call(*problem(int(d), dtype, what), way)
        for report in reports:
            print(json.dumps({"arch": arch, "problem": text} | report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
