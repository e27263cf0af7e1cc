"""Error of attention over 1 to 8 ranks against float64: does it grow with the ranks?

    PYTHONPATH=src python benchmarks/distributed_accuracy.py --length 1024 --most 8

For each number of ranks and strategy the root mean square error of out and of the gradients to q and k, causal, in
float32 and bfloat16, over gloo on this machine. Writes benchmarks/results/distributed-accuracy.json and a picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STRATEGIES = ("ring", "all_gather", "ulysses")
DTYPES = ("float32", "bfloat16")
HEADS, WIDTH = 8, 32
NAMES = ("out", "d_q", "d_k")


def inputs(length: int, dtype: str) -> list[Any]:
    """q, k, v and d_out, the same everywhere."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    return [torch.tensor(rng.standard_normal((1, HEADS, length, WIDTH))).to(getattr(torch, dtype)) for _ in range(4)]


def rank_of(rank: int, most: int, length: int, store: str, answers: Any) -> None:
    """One process: its rows of every case's results."""
    import torch
    import torch.distributed as dist

    import tilewise as tw
    from tilewise.torch.distributed import context_parallel_attention, shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=most)
    for count in range(1, most + 1):
        group = dist.new_group(list(range(count)))
        if rank >= count:
            continue
        for strategy in STRATEGIES:
            if strategy == "ulysses" and HEADS % count:
                continue
            for dtype in DTYPES:
                q, k, v, d_out = (shard(x, 2, group=group, sharding="zigzag") for x in inputs(length, dtype))
                q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
                out = context_parallel_attention(
                    q, k, v, mask=tw.causal(), group=group, strategy=strategy, sharding="zigzag"
                )
                found = (out, *torch.autograd.grad(out, (q, k), d_out))
                answers.put((count, strategy, dtype, rank, [x.detach().double().numpy() for x in found]))
    dist.barrier()


def errors(answers: dict[tuple[Any, ...], list[Any]], length: int) -> list[dict[str, Any]]:
    """For each case the root mean square error of each result."""
    import numpy as np
    import torch

    import tilewise as tw
    from tilewise.distributed import Layout

    exact = {}
    for dtype in DTYPES:
        q, k, v, d_out = (x.double() for x in inputs(length, dtype))
        q, k = q.requires_grad_(), k.requires_grad_()
        out = tw.attention(q, k, v, mask=tw.causal())
        exact[dtype] = [x.detach().numpy() for x in (out, *torch.autograd.grad(out, (q, k), d_out))]
    rows = []
    for (count, strategy, dtype), parts in sorted(answers.items()):
        order = np.argsort(Layout("zigzag", length, count).order())
        row = {"ranks": count, "strategy": strategy, "dtype": dtype}
        for n, name in enumerate(NAMES):
            whole = np.concatenate([parts[rank][n] for rank in range(count)], 2)[:, :, order]
            row[name] = float(np.sqrt(np.mean((whole - exact[dtype][n]) ** 2)))
        rows.append(row)
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against the ranks, a panel for each dtype and result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(DTYPES), len(NAMES), figsize=(11, 6), sharex=True, layout="constrained")
    for panels, dtype in zip(axes, DTYPES, strict=True):
        for panel, name in zip(panels, NAMES, strict=True):
            for strategy, style in zip(STRATEGIES, ("o-", "s--", "^:"), strict=True):
                line = [
                    (row["ranks"], row[name]) for row in rows if (row["strategy"], row["dtype"]) == (strategy, dtype)
                ]
                panel.plot(*zip(*line, strict=True), style, label=strategy, alpha=0.8)
            panel.set_ylim(0, 1.6 * max(row[name] for row in rows if row["dtype"] == dtype))
            panel.set_title(f"{name}, {dtype}", fontsize=10)
            panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("ranks")
    for panels in axes:
        panels[0].set_ylabel("rms error against float64")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every case, print a table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--most", type=int, default=8, help="ranks")
    asked = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "tilewise.torch.distributed"])
    queue, answers = context.Queue(), {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (asked.most, asked.length, f"{folder}/store", queue)
        processes = [context.Process(target=rank_of, args=(rank, *arguments)) for rank in range(asked.most)]
        for process in processes:
            process.start()
        for count in range(1, asked.most + 1):
            able = len(STRATEGIES) - bool(HEADS % count)
            for _ in range(able * len(DTYPES) * count):
                n, strategy, dtype, rank, found = queue.get(timeout=600)
                answers.setdefault((n, strategy, dtype), {})[rank] = found
        for process in processes:
            process.join()
    rows = errors(answers, asked.length)
    for row in rows:
        print(
            f"{row['ranks']} {row['strategy']:<10} {row['dtype']:<8} " + " ".join(f"{row[name]:.3e}" for name in NAMES)
        )
    RESULTS.mkdir(exist_ok=True)
    said = {
        "length": asked.length,
        "heads": HEADS,
        "width": WIDTH,
        "mask": "causal",
        "sharding": "zigzag",
        "rows": rows,
    }
    (RESULTS / "distributed-accuracy.json").write_text(json.dumps(said, indent=1) + "\n")
    picture(rows, RESULTS / "distributed-accuracy.png")


if __name__ == "__main__":
    main()
