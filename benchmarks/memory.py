"""Peak memory of attention against the length, forward and backward, ours beside torch's own.

    PYTHONPATH=src python benchmarks/memory.py --lengths 1024 4096 32768

Each number is the growth of one fresh process's resident memory (its high-water mark, kept by Linux) over what it held
before the call: results and gradients count, inputs do not. torch's attention takes masks and biases as one matrix,
which the caller makes; making it is part of what is measured. A length is left out once its matrices would not fit into
`--most` GiB; the file says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

HEADS, WIDTH, DROPPED = 2, 64, 0.1
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
CASES = {
    "causal": "causal",
    "alibi": "causal, padding, ALiBi with gradient to its slopes, dropout",
    "table": "causal, padding, relative table with gradient, dropout",
    "row": "causal, a bias row (1, H, 1, S) with gradient, dropout",
}
STEPS = ("forward", "forward and backward")
WHO = ("tilewise", "torch SDPA")


def ours(case: str, n: int, q: Any, k: Any, v: Any, learned: Any) -> Any:
    """The case by tilewise."""
    import tilewise as tw

    if case == "causal":
        return tw.attention(q, k, v, mask=tw.causal())
    mask = tw.causal() if case == "row" else tw.causal() & tw.lengths(k=[n - n // 8])
    bias = {"alibi": tw.alibi, "table": tw.relative, "row": lambda row: row}[case](learned)
    return tw.attention(q, k, v, mask=mask, bias=bias, dropout=tw.Dropout(DROPPED, seed=1))


def torchs(case: str, n: int, q: Any, k: Any, v: Any, learned: Any) -> Any:
    """The case by torch's function, its mask and bias as one matrix of floats."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    if case == "causal":
        return attention(q, k, v, is_causal=True)
    i = torch.arange(n)
    distance = i - i[:, None]
    seen = (distance <= 0) if case == "row" else (distance <= 0) & (i < n - n // 8)
    if case == "alibi":
        bias = -learned[:, None, None] * distance.abs()
    elif case == "table":
        bias = learned[:, distance + (n - 1)]
    else:
        bias = learned.expand(1, HEADS, n, n)
    return attention(q, k, v, attn_mask=bias.masked_fill(~seen, float("-inf")), dropout_p=DROPPED)


def inputs(case: str, n: int) -> tuple[Any, ...]:
    """q, k, v (1, H, S, D) and what the bias learns, all with gradients."""
    import torch

    shapes = {"causal": (1,), "alibi": (HEADS,), "table": (HEADS, 2 * n - 1), "row": (1, HEADS, 1, n)}
    qkv = [torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3)]
    return (*qkv, torch.rand(shapes[case], requires_grad=True))


def measure(who: str, case: str, step: str, n: int) -> dict[str, float]:
    """Growth of this process in MiB."""
    import torch

    attend: Callable[..., Any] = ours if who == "tilewise" else torchs
    for length in (64, n):  # the first loads code and starts threads
        given = inputs(case, length)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
        with torch.set_grad_enabled(step != "forward"):
            out = attend(case, length, *given)
        if step != "forward":
            out.sum().backward()
        grown = resident("VmHWM") - before
    return {"mib": grown}


def resident(name: str) -> float:
    """A line of this process's status, in MiB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def fits(who: str, case: str, n: int, most: float) -> bool:
    """Whether the matrices of torch's way fit: bias, mask, sum, probabilities, dropout, gradients."""
    return who == "tilewise" or case == "causal" or 8 * HEADS * n * n * 4 <= most * 2**30


def rows_of(lengths: list[int], most: float) -> Iterator[dict[str, Any]]:
    """Every measurement, each in a process of its own, forked before any thread was started."""
    context = multiprocessing.get_context("fork")
    for n, case, step, who in product(lengths, CASES, STEPS, WHO):
        row: dict[str, Any] = {"length": n, "case": case, "step": step, "who": who}
        if not fits(who, case, n, most):
            yield {**row, "left_out": f"would need more than {most:g} GiB"}
            continue
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=tell, args=(sending, who, case, step, n))
        child.start()
        sending.close()
        try:
            yield {**row, **receiving.recv()}
        except EOFError:  # the system ended it, for its memory most likely
            yield {**row, "failed": "killed"}
        child.join()


def tell(sending: Any, *asked: Any) -> None:
    """`measure`, into a pipe."""
    try:
        sending.send(measure(*asked))
    except (RuntimeError, MemoryError) as error:
        sending.send({"failed": str(error).splitlines()[0][:200]})


def picture(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """A panel for each case: MiB against the length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for panel, (case, title) in zip(panels.flat, CASES.items(), strict=True):
        for who, step in product(WHO, STEPS):
            line = [row for row in rows if (row["case"], row["who"], row["step"]) == (case, who, step) and "mib" in row]
            panel.plot(
                [row["length"] for row in line], [max(row["mib"], 0.1) for row in line], label=f"{who}, {step}",
                color="#1f6feb" if who == "tilewise" else "#d1242f", linestyle=":" if step == "forward" else "-",
                marker="o" if who == "tilewise" else "s", markersize=4,
            )  # fmt: skip
        panel.set(title=title, xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("tokens")
    for panel in panels[:, 0]:
        panel.set_ylabel("MiB beyond the inputs")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(f"Peak memory of attention, {HEADS} heads of width {WIDTH}, float32, {about}", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="numbers of tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--most", type=float, default=8.0, help="GiB beyond which torch's matrices are not tried")
    given = parser.parse_args()

    import torch
    from rich.progress import track

    import tilewise.torch.call  # noqa: F401  # loaded once, for all processes
    from tilewise.bench.report import processor_name

    total = len(given.lengths) * len(CASES) * len(STEPS) * len(WHO)
    rows = list(track(rows_of(sorted(given.lengths), given.most), total=total, description="measuring"))
    name = "memory-" + re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    about = {
        "cpu": processor_name(), "cores": os.cpu_count(), "torch": torch.__version__, "heads": HEADS,
        "width": WIDTH, "most_gib": given.most, "dtype": "float32", "dropout": DROPPED, "cases": CASES,
        "unit": "MiB beyond the inputs",
    }  # fmt: skip
    (given.out / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    picture(rows, f"{processor_name()}; lines end where they would pass {given.most:g} GiB", given.out / f"{name}.png")
    print(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
