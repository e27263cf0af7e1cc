"""Measure tile sizes of the Triton kernels: `PYTHONPATH=src python benchmarks/gpu_tiles.py --out tiles.json`.

For each pass, kind, dtype and width it tries the table's own tile sizes and others, leaves out those whose kernels
spill registers or ask for more shared memory than a block has, times the rest, and writes the fastest.
`TILEWISE_TILES=tiles.json` makes later processes read them. Nothing else in the library ever tunes.

Without a GPU it runs to its end in Triton's interpreter at toy sizes, to show that it works; those times mean nothing.
It was not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # asked for before Triton is imported, which reads it once

import triton  # noqa: E402

from tilewise import causal, window  # noqa: E402
from tilewise.contract import Plan, Tiles  # noqa: E402
from tilewise.kernels.triton import backward, forward, launch  # noqa: E402
from tilewise.kernels.triton.tiles import ATOMICS, SPLIT, blocks_for, padded_width  # noqa: E402
from tilewise.kernels.triton.tuned import Blocks, Key, write  # noqa: E402
from tilewise.problem import kind_of  # noqa: E402
from tilewise.validate import prepare  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
LENGTH, BATCH, HEADS = (4096, 2, 16) if HAS_GPU else (48, 1, 1)
KINDS = ("full", "causal", "window", "decode")

_SIZES = (16, 32, 64, 128) if HAS_GPU else (16, 32)
_WARPS, _STAGES = ((4, 8), (1, 2, 3)) if HAS_GPU else ((4,), (1,))


@dataclass(frozen=True, eq=False)
class Task:
    """One pass of one class of problems: what to run, and the key that its tile sizes are filed under."""

    key: Key
    plan: Plan
    run: Callable[[], Any]

    def candidates(self, arch: str) -> list[Blocks]:
        """Tile sizes to try, the table's own first."""
        own = blocks_for(self.key.purpose, arch, self.plan.problem)
        # The queries of a decoding call are those of its group, whatever the table says.
        queries = (own.queries,) if self.key.purpose == "decode" else _SIZES
        others = [Blocks(q, k, w, s) for q in queries for k in _SIZES for w in _WARPS for s in _STAGES]
        return list(dict.fromkeys([own, *others]))


def tasks(dtypes: list[str], widths: list[int], kinds: list[str]) -> Iterator[Task]:
    """Every pass of every class asked for."""
    for dtype in dtypes:
        for width in widths:
            for kind in kinds:
                yield from _passes(dtype, width, kind)


def _passes(dtype: str, width: int, kind: str) -> Iterator[Task]:
    sq, heads = (1, 4 * HEADS) if kind == "decode" else (LENGTH, HEADS)
    q, k, v = (
        torch.randn(BATCH, h, s, width, dtype=getattr(torch, dtype), device=DEVICE)
        for h, s in ((heads, sq), (HEADS, LENGTH), (HEADS, LENGTH))
    )
    mask = {"causal": causal(), "window": window(LENGTH // 4, 0)}.get(kind)
    call = prepare(
        q, k, v, mask=mask, bias=None, scale=None, softcap=None, sinks=None, dropout=None, layout="bhsd",
        return_lse=False,
    )  # fmt: skip
    problem = replace(call.problem, gradients=frozenset({"q", "k", "v"}), deterministic=False)

    def plan(gradients: str, way: str = SPLIT) -> Plan:
        wanted = replace(problem, gradients=frozenset(gradients))
        return Plan(wanted, "triton", "triton", Tiles(0, 0), 0, {}, backward_way=way)

    def key(purpose: str) -> Key:
        return Key(purpose, kind_of(problem), dtype, max(64, padded_width(problem)))

    ahead = plan("qkv")
    yield Task(key("decode" if kind == "decode" else "forward"), ahead, lambda: forward.forward(ahead, call.operands))
    if kind == "decode":
        return
    out, lse = forward.forward(ahead, call.operands)
    d_out = torch.randn_like(out)
    for purpose, each in (("d_q", plan("q")), ("d_kv", plan("kv")), ("d_qkv", plan("qkv", ATOMICS))):
        yield Task(
            key(purpose),
            each,
            lambda each=each: backward.backward(each, call.operands, out, lse, d_out, None),
        )


def fastest(task: Task, arch: str) -> tuple[Blocks, float] | None:
    """The fastest tile sizes that fit the device, and the milliseconds of the whole pass; None where none fits."""
    found: list[tuple[float, Blocks]] = []
    for blocks in task.candidates(arch):
        try:
            with launch.using(task.key.purpose, blocks) as compiled:
                task.run()
                if any(getattr(kernel, "n_spills", 0) for kernel in compiled):
                    continue
                found.append((_milliseconds(task.run), blocks))
        except (triton.OutOfResources, triton.CompilationError):
            continue  # more shared memory than there is, or tiles that the compiler does not take
    if not found:
        return None
    ms, blocks = min(found)
    return blocks, ms


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call."""
    if not HAS_GPU:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def main(given: list[str] | None = None) -> None:
    """Tune what the arguments name, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the table goes")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"] if HAS_GPU else ["float32"])
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 128, 256] if HAS_GPU else [16])
    parser.add_argument("--seconds", type=float, default=1800, help="no pass is started after this time")
    arguments = parser.parse_args(given)
    arch, start, found = launch.architecture(torch.device(DEVICE)), time.time(), []
    for task in tasks(arguments.dtypes, arguments.widths, arguments.kinds):
        if time.time() - start > arguments.seconds:
            break
        best = fastest(task, arch)
        print(*task.key, "nothing fits" if best is None else f"{tuple(best[0])} {best[1]:.3f} ms", flush=True)
        if best is not None:
            found.append((task.key, *best))
    device = torch.cuda.get_device_name() if HAS_GPU else "CPU, interpreted"
    write(arguments.out, arch, found, device=device, torch=torch.__version__, triton=triton.__version__)
    print(f"{len(found)} entries in {time.time() - start:.0f} s -> {arguments.out}")


if __name__ == "__main__":
    main()
