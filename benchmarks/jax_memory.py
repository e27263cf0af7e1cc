"""What compiled jax programs keep beside inputs and outputs, against the length: every mask, forward and gradient.

    PYTHONPATH=src python benchmarks/jax_memory.py

Programs are compiled and asked (`memory_analysis`), not run, so lengths are free. To the temporary memory of a program
is added what the native kernel promises to allocate itself in the forward pass (`explain(...).workspace`); what its
backward pass allocates is not counted: records of its rows, linear in their number, for as many heads as fit 32 MiB and
at least one. Arrays of all pairs that the caller brings are inputs and do not count. `jax.nn.dot_product_attention`
stands beside as a measure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tilewise as tw
from tilewise.bench.report import processor_name

HEADS, WIDTH, WINDOW = 2, 64, 256
LENGTHS = tuple(2**n for n in range(9, 17))
# name -> options of `tilewise.attention` for a length and the values that a bias learns, and how many of those
CASES: dict[str, tuple[Callable[[int, Any], dict[str, Any]], Callable[[int], tuple[int, ...]]]] = {
    "no mask": (lambda n, x: {}, lambda n: (1,)),
    "causal": (lambda n, x: {"mask": tw.causal()}, lambda n: (1,)),
    "window": (lambda n, x: {"mask": tw.window(WINDOW, 0)}, lambda n: (1,)),
    "prefix": (lambda n, x: {"mask": tw.causal() | tw.prefix(100)}, lambda n: (1,)),
    "lengths": (lambda n, x: {"mask": tw.lengths(k=np.array([n - n // 8]))}, lambda n: (1,)),
    "documents": (lambda n, x: {"mask": tw.documents(np.arange(n) % 7)}, lambda n: (1,)),
    "intervals": (lambda n, x: {"mask": tw.intervals(np.zeros(n, int), np.arange(n))}, lambda n: (1,)),
    "blocks": (lambda n, x: {"mask": tw.blocks(np.eye(n // 64, dtype=bool), 64)}, lambda n: (1,)),
    "predicate": (lambda n, x: {"mask": tw.predicate(lambda b, h, i, j: (i + j) % 3 > 0)}, lambda n: (1,)),
    "ALiBi, learned": (lambda n, x: {"mask": tw.causal(), "bias": tw.alibi(x)}, lambda n: (HEADS,)),
    "table, learned": (lambda n, x: {"bias": tw.relative(x)}, lambda n: (HEADS, 2 * n - 1)),
    "T5 buckets, learned": (lambda n, x: {"bias": tw.t5(x)}, lambda n: (32, HEADS)),
    "row of keys, learned": (lambda n, x: {"bias": x}, lambda n: (1, HEADS, 1, n)),
    "everything": (
        lambda n, x: {
            "mask": tw.causal() & tw.documents(np.arange(n) // 100), "bias": tw.relative(x), "softcap": 30.0,
            "sinks": jnp.ones(HEADS), "dropout": tw.Dropout(0.1, 1),
        },
        lambda n: (HEADS, 2 * n - 1),
    ),
}  # fmt: skip
STEPS = ("forward", "gradient")
WHO = ("tilewise", "tilewise, portable kernel", "jax.nn")


def ours(case: str, n: int, kernel: str | None) -> Callable[..., Any]:
    """The case as a function of q, k, v (1, H, S, D) and what the bias learns."""
    return lambda q, k, v, x: tw.attention(q, k, v, kernel=kernel, **CASES[case][0](n, x))


def theirs(q: Any, k: Any, v: Any, x: Any) -> Any:
    """Causal attention by jax's own function, from the same layout."""
    swapped = (array.swapaxes(1, 2) for array in (q, k, v))
    return jax.nn.dot_product_attention(*swapped, is_causal=True)


def measure(who: str, case: str, step: str, n: int) -> dict[str, float]:
    """MiB beside inputs and outputs."""
    kernel = "portable" if "portable" in who else None
    attend = theirs if who == "jax.nn" else ours(case, n, kernel)
    qkv = [jax.ShapeDtypeStruct((1, HEADS, n, WIDTH), jnp.float32)] * 3
    given = (*qkv, jax.ShapeDtypeStruct(CASES[case][1](n), jnp.float32))
    function = attend if step == "forward" else jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2, 3))
    held = jax.jit(function).lower(*given).compile().memory_analysis().temp_size_in_bytes
    plans: list[Any] = []
    if who == "tilewise":
        jax.eval_shape(lambda q, k, v, x: plans.append(tw.explain(q, k, v, **CASES[case][0](n, x))), *given)
    own = sum(plan.workspace for plan in plans if plan.kernel == "native")
    return {"mib": (held + own) / 2**20, "program": held / 2**20}


def rows_of(lengths: list[int], cases: list[str]) -> Iterator[dict[str, Any]]:
    """Every measurement; jax.nn only where it has the case."""
    for case, step, who, n in product(cases, STEPS, WHO, lengths):
        if who != "jax.nn" or case == "causal":
            yield {"case": case, "step": step, "who": who, "length": n, **measure(who, case, step, n)}
            jax.clear_caches()


def picture(rows: list[dict[str, Any]], cases: list[str], path: Path) -> None:
    """A panel for each case: MiB against the length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = 4
    figure, panels = plt.subplots(
        -(-len(cases) // across), across, figsize=(14, 11), sharex=True, sharey=True, layout="constrained"
    )
    colours = dict(zip(WHO, ("#1f6feb", "#8250df", "#d1242f"), strict=True))
    for panel, case in zip(panels.flat, cases, strict=False):
        for who, step in product(WHO, STEPS):
            line = [row for row in rows if (row["case"], row["who"], row["step"]) == (case, who, step)]
            panel.plot(
                [row["length"] for row in line], [max(row["mib"], 0.01) for row in line], label=f"{who}, {step}",
                color=colours[who], linestyle=":" if step == "forward" else "-", marker="o", markersize=3,
            )  # fmt: skip
        panel.set_title(case, fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    for panel in panels[:, 0]:
        panel.set_ylabel("MiB beside inputs, outputs")
    example = panels.flat[cases.index("causal") if "causal" in cases else 0]
    figure.legend(*example.get_legend_handles_labels(), loc="lower right", fontsize=9)
    figure.suptitle(f"Memory of compiled jax programs: {HEADS} heads of width {WIDTH}, float32, CPU", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="numbers of tokens")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="which of the cases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args()

    from rich.progress import track

    lengths = sorted(given.lengths)
    total = len(lengths) * len(STEPS) * (2 * len(given.cases) + ("causal" in given.cases))
    rows = list(track(rows_of(lengths, given.cases), total=total, description="compiling"))
    name = "jax-memory-" + re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    about = {
        "cpu": processor_name(), "cores": os.cpu_count(), "jax": jax.__version__, "heads": HEADS, "width": WIDTH,
        "dtype": "float32", "unit": "MiB beside inputs and outputs",
    }  # fmt: skip
    (given.out / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    picture(rows, given.cases, given.out / f"{name}.png")
    print(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
