"""Time every kernel that runs on a GPU: `PYTHONPATH=src python benchmarks/gpu.py --out results.json --table h200.json`.

Ours, torch's operators through the kernel `aten`, and torch itself. Every kernel and every way of it is first held
against float64 with its outputs poisoned, kind by kind; one that fails is reported and not timed. `--table` writes what
was found right, and how fast it was, for the planner (`tilewise/plan/measured.py`). Under ten minutes: no configuration
is started after `--seconds`. Without a GPU it runs to its end at toy sizes in Triton's interpreter, to show that it
works; those times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import tilewise  # noqa: E402
from tilewise.contract import KernelCard, Plan  # noqa: E402
from tilewise.kernels import backward_of, cards, forward_of  # noqa: E402
from tilewise.plan.measured import read  # noqa: E402
from tilewise.problem import kind_of  # noqa: E402
from tilewise.validate import prepare  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
# torch's operator for CPUs is refused in half precision, for its lse.
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
LENGTHS, WIDTHS = ((1024, 4096, 16384), (64, 128, 256)) if HAS_GPU else ((64,), (16,))
# The portable kernel is checked, and timed where that does not take most of the run.
PORTABLE_LENGTH = 1024
TOKENS = 16384 if HAS_GPU else 64
KINDS = ("full", "causal", "window", "documents", "scattered", "alibi", "bias", "softcap", "sinks", "decode")
SDPA = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
TORCH = (*SDPA, "flex")
# Largest error of a kernel that is timed, relative to the largest value.
MOST_ERROR = 2e-2


@dataclass(frozen=True)
class Shape:
    """One configuration: what kind of attention, in which sizes; queries `sq`, keys `sk`."""

    kind: str
    d: int
    batch: int
    heads: int
    kv_heads: int
    sq: int
    sk: int

    @property
    def name(self) -> str:
        return f"{self.kind:9} d{self.d:<3} b{self.batch:<3} h{self.heads}/{self.kv_heads} {self.sq}x{self.sk}"


def shapes() -> Iterator[Shape]:
    """Short and narrow ones first, so that a short run has something of each kind; all have as many tokens."""
    for length in LENGTHS:
        for d in WIDTHS:
            for kind in KINDS:
                heads, batch = max(1, 2048 // d if HAS_GPU else 2), max(1, TOKENS // length)
                if kind == "decode":
                    yield Shape(kind, d, batch, 32 if HAS_GPU else 4, 8 if HAS_GPU else 1, 1, length)
                elif not (kind == "bias" and length > 4096):  # beyond, the bias itself fills the memory
                    yield Shape(kind, d, batch, heads, heads, length, length)


def options(shape: Shape) -> dict[str, Any]:
    """The arguments of `tilewise.attention` for a configuration."""
    given = dict.fromkeys(("mask", "bias", "scale", "softcap", "sinks", "dropout")) | {
        "layout": "bhsd",
        "return_lse": False,
    }
    n = shape.sk
    document = torch.arange(n) * 8 // n
    run = 64 if HAS_GPU else 8  # neighbours in one document
    scattered = torch.randint(0, 64, (n // run,), generator=torch.Generator().manual_seed(0)).repeat_interleave(run)
    match shape.kind:
        case "causal" | "sinks":
            given["mask"] = tilewise.causal()
            given["sinks"] = 0.0 if shape.kind == "sinks" else None
        case "window":
            given["mask"] = tilewise.window(min(1023, n // 4), 0)
        case "documents":
            given["mask"] = tilewise.documents(document.numpy()) & tilewise.causal()
        case "scattered":
            given["mask"] = tilewise.documents(scattered.numpy())
        case "alibi":
            given["mask"] = tilewise.causal()
            given["bias"] = tilewise.alibi(2.0 ** -torch.linspace(1, 8, shape.heads, device=DEVICE))
        case "bias":
            given["bias"] = torch.randn(shape.batch, shape.heads, shape.sq, n, dtype=DTYPE, device=DEVICE)
        case "softcap":
            given["mask"], given["softcap"] = tilewise.causal(), 30.0
    return given


@dataclass(frozen=True, eq=False)
class Problem:
    """A configuration with its inputs on the device."""

    shape: Shape
    call: Any
    d_out: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype = DTYPE) -> Problem:
        torch.manual_seed(0)
        q = torch.randn(shape.batch, shape.heads, shape.sq, shape.d, dtype=dtype, device=DEVICE)
        k, v = (
            torch.randn(shape.batch, shape.kv_heads, shape.sk, shape.d, dtype=dtype, device=DEVICE) for _ in range(2)
        )
        call = prepare(q, k, v, **options(shape))
        wanted = (
            {"q", "k", "v"}
            | ({"bias"} if shape.kind == "bias" else set())
            | ({"table"} if shape.kind == "alibi" else set())
        )
        # Kernels whose sums have no fixed order are timed too: the planner asks for them only where they are allowed.
        problem = replace(call.problem, gradients=frozenset(wanted), deterministic=False)
        return cls(shape, replace(call, problem=problem), torch.randn_like(q))

    def runners(self) -> Iterator[Runner]:
        """Every kernel that takes the problem, in each of its ways."""
        for card in cards():
            if card.name != "reference" and not card.refuse(self.call.problem):
                problem = self.call.problem
                forward, backward = card.ways(problem) or ("",), card.backward_ways(problem)
                if forward == ("",) and backward:  # its ways are those of the backward pass alone
                    yield from (Runner(self, card, "", way) for way in backward)
                else:
                    yield from (Runner(self, card, way, way) for way in forward)

    def pairs(self) -> int:
        """Visible (query, key) pairs over batch and heads."""
        shape, mask = self.shape, self.call.operands.mask
        if mask.q_labels is not None:
            q, k = (_tensor(labels).flatten() for labels in (mask.q_labels, mask.k_labels))
            seen = int((torch.bincount(q, minlength=64) * torch.bincount(k, minlength=64)).sum())
        elif mask.ranges is not None:
            seen = int((mask.ranges.stops - mask.ranges.starts).sum())
        else:
            seen = shape.sq * shape.sk
        return seen * shape.batch * shape.heads


@dataclass(frozen=True, eq=False)
class Runner:
    """One kernel, in one of its ways of each pass, on a problem."""

    problem: Problem
    card: KernelCard
    way: str
    backward_way: str

    @property
    def name(self) -> str:
        return self.of_step("backward")

    def of_step(self, step: str) -> str:
        """What a pass is called: the kernel, and its way where it has several."""
        way = self.backward_way if step == "backward" else self.way
        return f"{self.card.name}/{way}" if way else self.card.name

    @property
    def has_backward(self) -> bool:
        problem = self.problem.call.problem
        return not self.card.refuse_backward(problem) and self.backward_way in (
            self.card.backward_ways(problem) or ("",)
        )

    @property
    def plan(self) -> Plan:
        problem, name = self.problem.call.problem, self.card.name
        careful = "portable" if self.card.finite_only else None
        return Plan(
            problem,
            name,
            name,
            self.card.tiles(problem),
            0,
            {},
            way=self.way,
            backward_way=self.backward_way,
            careful=careful,
        )

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return forward_of(self.card.name).forward(self.plan, self.problem.call.operands)

    def backward(self, out: torch.Tensor, lse: torch.Tensor) -> Any:
        step = backward_of(self.card.name).backward
        return step(self.plan, self.problem.call.operands, out, lse, self.problem.d_out, None)

    def steps(self) -> dict[str, Callable[[], Any]]:
        """The passes to time."""
        out, lse = self.forward()
        passes: dict[str, Callable[[], Any]] = {"forward": self.forward}
        return passes | ({"backward": lambda: self.backward(out, lse)} if self.has_backward else {})


def _tensor(array: Any) -> torch.Tensor:
    return array.to(DEVICE) if isinstance(array, torch.Tensor) else torch.tensor(array, device=DEVICE)


def errors_of(problem: Problem) -> dict[str, float]:
    """By kernel: largest error of out, d_q, d_k, d_v against float64, relative to the largest value.

    Outputs start poisoned. A kernel that raises has an infinite error.
    """
    operands, given = problem.call.operands, problem.call.problem
    q, k, v = (array.double().requires_grad_() for array in (operands.q, operands.k, operands.v))
    group = problem.shape.heads // problem.shape.kv_heads
    s = given.scale * (q @ k.repeat_interleave(group, 1).transpose(-1, -2))
    s = given.softcap * torch.tanh(s / given.softcap) if given.softcap else s
    for bias in operands.dense:
        s = s + bias.double()
    i, j = torch.arange(problem.shape.sq, device=DEVICE)[:, None], torch.arange(problem.shape.sk, device=DEVICE)
    if operands.table is not None:
        s = s + operands.table.double()[:, :, j - i + problem.shape.sq - 1]
    seen = operands.mask.visible(slice(0, problem.shape.sq), slice(0, problem.shape.sk))
    s = s if seen is None else s.masked_fill(~_tensor(seen), float("-inf"))
    if operands.sinks is not None:
        s = torch.cat([s, operands.sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    exact = torch.softmax(s, -1)[..., : problem.shape.sk] @ v.repeat_interleave(group, 1)
    exact.backward(problem.d_out.double())
    exact = exact.detach()
    errors = {}
    for runner in problem.runners():
        try:
            with _poisoned():
                out, lse = runner.forward()
                found = runner.backward(out, lse) if runner.has_backward else None
        except Exception as error:
            print(f"FAIL {runner.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            errors[runner.name] = float("inf")
            continue
        couples = [(out, exact)]
        couples += [(found.q, q.grad), (found.k, k.grad), (found.v, v.grad)] if found else []
        sizes = [float((got.double() - want).abs().max() / want.abs().max().clamp(min=1)) for got, want in couples]
        errors[runner.name] = max(size if size == size else float("inf") for size in sizes)
    return errors


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some kernel has no fixed order
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def milliseconds(run: Callable[[], Any], seconds: float = 0.15) -> float:
    """Median time of a call, after warming up."""
    run()
    if not HAS_GPU:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = max(5, min(100, int(seconds / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def matmul_peak() -> float:
    """TFLOP/s that a large bfloat16 product reaches here: the ceiling that shares are taken of."""
    n = 8192 if HAS_GPU else 64
    a, b = (torch.randn(n, n, dtype=DTYPE, device=DEVICE) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, 0.5) / 1e9


def sdpa(problem: Problem, backend: str) -> dict[str, Callable[[], Any]]:
    """Forward and backward of one of torch's fused kernels, for what they can express."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, operands = problem.shape, problem.call.operands
    if shape.kind not in ("full", "causal", "bias", "decode") or (shape.kind == "bias" and backend != "efficient"):
        return {}
    q, k, v = (array.detach().clone().requires_grad_() for array in (operands.q, operands.k, operands.v))
    bias = operands.dense[0].detach().clone().requires_grad_() if operands.dense else None
    chosen, grouped = getattr(SDPBackend, SDPA[backend]), shape.heads != shape.kv_heads

    def run() -> torch.Tensor:
        with sdpa_kernel(chosen):
            causal = shape.kind == "causal"
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped
            )

    out = run()
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    return {"forward": run, "backward": lambda: torch.autograd.grad(out, inputs, problem.d_out, retain_graph=True)}


def flex(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Forward and backward of FlexAttention, where it says the same thing and its compiler is here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, operands = problem.shape, problem.call.operands
    n = shape.sk
    rules = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j <= min(1023, n // 4)),
        "documents": lambda b, h, i, j: (i >= j) & (i * 8 // n == j * 8 // n),
    }
    if shape.kind not in rules or not HAS_GPU:
        return {}
    block_mask = create_block_mask(rules[shape.kind], None, None, shape.sq, shape.sk, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (array.detach().clone().requires_grad_() for array in (operands.q, operands.k, operands.v))
    out = compiled(q, k, v, block_mask=block_mask)
    return {
        "forward": lambda: compiled(q, k, v, block_mask=block_mask),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), problem.d_out, retain_graph=True),
    }


def rows_of(shape: Shape, peak: float, with_flex: bool, right: set[str]) -> Iterator[dict[str, Any]]:
    """Times in one configuration of the kernels that were found right, and of torch."""
    problem = Problem.make(shape)
    own = {
        runner.name: runner
        for runner in problem.runners()
        if runner.name in right and (runner.card.name != "portable" or shape.sk <= PORTABLE_LENGTH)
    }
    runners: dict[str, Callable[[Problem], dict[str, Any]]] = {
        name: lambda problem, runner=runner: runner.steps() for name, runner in own.items()
    }
    if HAS_GPU:
        runners |= {name: lambda problem, name=name: sdpa(problem, name) for name in SDPA}
        runners |= {"flex": flex} if with_flex else {}
    flops = 4 * problem.pairs() * shape.d
    for name, prepare_runs in runners.items():
        try:
            runs = prepare_runs(problem)
        except Exception as error:  # a backend that refuses is a row that says so
            yield {"shape": vars(shape), "who": name, "refused": str(error).splitlines()[0][:200]}
            continue
        for step, run in runs.items():
            if shape.kind == "decode" and step == "backward":
                continue
            who = own[name].of_step(step) if name in own else name
            ms = milliseconds(run)
            rate = flops * (2.5 if step == "backward" else 1.0) / ms / 1e9
            yield {
                "shape": vars(shape),
                "kind": kind_of(problem.call.problem),
                "who": who,
                "step": step,
                "ms": ms,
                "tflops": rate,
                "share_of_peak": rate / peak,
            }


def compile_ahead() -> None:
    """Fill Triton's cache from several processes: compiling one kernel after another would take most of the time."""
    jobs = [(kind, d) for d in WIDTHS for kind in KINDS]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 2)) as pool:
        command = [sys.executable, __file__, "--only-check"]
        list(pool.map(lambda job: subprocess.run([*command, job[0], str(job[1])], capture_output=True), jobs))


def checked(kind: str, d: int) -> dict[str, float]:
    """The errors of all kernels on a kind and width at the shortest length, on a few heads."""
    shape = next(shape for shape in shapes() if shape.kind == kind and shape.d == d)
    few = min(2, shape.batch), (8 if kind == "decode" and HAS_GPU else min(4, shape.heads))
    return errors_of(
        Problem.make(
            replace(shape, batch=few[0], heads=few[1], kv_heads=min(few[1], 2) if kind == "decode" else few[1])
        )
    )


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each configuration and step: everybody's TFLOP/s, and our best over torch's best."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault((Shape(**row["shape"]).name, row["step"]), {})[row["who"]] = row
    for (name, step), by in groups.items():
        others = [row["tflops"] for who, row in by.items() if who in TORCH]
        own = [row["tflops"] for who, row in by.items() if who not in TORCH]
        ratio = f"  x{max(own) / max(others):.2f}" if others and own else ""
        rates = "  ".join(f"{who} {row['tflops']:7.1f} ({row['ms']:.3f} ms)" for who, row in by.items())
        yield f"{name:38} {step:8}  {rates}{ratio}"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of TFLOP/s by configuration, one panel for each step; nothing without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    timed = [row for row in rows if "ms" in row]
    names = list(dict.fromkeys(Shape(**row["shape"]).name for row in timed))
    everybody = list(dict.fromkeys(row["who"] for row in timed))
    figure, panels = plt.subplots(1, 2, figsize=(14, 2 + 0.3 * len(names)), sharey=True)
    for panel, step in zip(panels, ("forward", "backward"), strict=True):
        for n, who in enumerate(everybody):
            found = {
                Shape(**row["shape"]).name: row["tflops"] for row in timed if row["who"] == who and row["step"] == step
            }
            places = [names.index(name) + n / (len(everybody) + 1) for name in found]
            panel.barh(places, list(found.values()), height=1 / (len(everybody) + 1), label=who)
        panel.set_title(step)
        panel.set_xlabel("TFLOP/s")
    panels[0].set_yticks(range(len(names)), names, family="monospace", fontsize=7)
    panels[0].invert_yaxis()
    panels[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measured_table(rows: list[dict[str, Any]], device: str, architecture: str) -> dict[str, Any]:
    """What the planner reads: for each class of problems the rate of each of our kernels and ways."""
    classes: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if "ms" in row and row["who"] not in TORCH:
            key = row["kind"], row["shape"]["d"], row["shape"]["sk"], row["step"]
            # Several configurations of a class, windows and documents say, count as the slowest.
            rates = classes.setdefault(key, {})
            rates[row["who"]] = min(row["tflops"], rates.get(row["who"], float("inf")))
    return {
        "device": device,
        "architecture": architecture,
        "torch": torch.__version__,
        "rows": [
            {
                "kind": kind,
                "dtype": str(DTYPE).removeprefix("torch."),
                "width": width,
                "length": length,
                "step": step,
                "tflops": rates,
            }
            for (kind, width, length, step), rates in classes.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), help="where the results go; the picture stands beside them"
    )
    parser.add_argument("--table", type=Path, help="where the planner's table of this device goes")
    parser.add_argument("--seconds", type=float, default=480, help="no configuration is started after this time")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too (it compiles for long)")
    parser.add_argument(
        "--only-check", nargs=2, metavar=("KIND", "D"), help="check one kind and width, and print its error"
    )
    arguments = parser.parse_args()
    if arguments.only_check:
        print(checked(arguments.only_check[0], int(arguments.only_check[1])))
        return
    start = time.time()
    if HAS_GPU:
        compile_ahead()
        print(f"compiled in {time.time() - start:.0f} s", flush=True)
    peak = matmul_peak()
    errors: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for shape in shapes():
        key = f"{shape.kind} {shape.d}"
        if shape.kind not in arguments.kinds or time.time() - start > arguments.seconds:
            continue
        try:
            if key not in errors:
                errors[key] = checked(shape.kind, shape.d)
                for name, error in errors[key].items():
                    if error > MOST_ERROR:
                        print(f"FAIL {key} {name}: error {error:.3g}; not timed", flush=True)
            right = {name for name, error in errors[key].items() if error <= MOST_ERROR}
            found = list(rows_of(shape, peak, arguments.flex, right))
        except Exception as error:
            print(f"FAIL {shape.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        rows += found
        for line in table(found):
            print(line, flush=True)
    device = torch.cuda.get_device_name() if HAS_GPU else "CPU, interpreted"
    arguments.out.write_text(
        json.dumps(
            {"device": device, "torch": torch.__version__, "matmul_tflops": peak, "errors": errors, "rows": rows},
            indent=1,
        )
    )
    picture(rows, arguments.out.with_suffix(".png"))
    if arguments.table:
        architecture = Problem.make(next(shapes())).call.problem.architecture
        arguments.table.write_text(json.dumps(measured_table(rows, device, architecture), indent=1))
        print(f"{len(read(arguments.table).rows)} classes of problems -> {arguments.table}")
    print(f"{len(rows)} rows in {time.time() - start:.0f} s, matmul {peak:.0f} TFLOP/s -> {arguments.out}")


if __name__ == "__main__":
    main()
