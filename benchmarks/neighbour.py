"""Whether our threads slow a neighbour's: torch's matrix products and our attention, apart and in turns.

    PYTHONPATH=src python benchmarks/neighbour.py

Threads that spin after their work take the cores from whatever runs next. So each round times a run of products alone,
a run of attention alone, and a run in which the two alternate; the ratio is that of the last to the sum of the first
two, and 1 means that neither feels the other. torch's own attention in the place of ours shows what its threads do to
themselves. The ratios are medians over rounds, since only neighbouring runs see the machine alike. Run it on a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import tilewise as tw
from tilewise.bench.report import processor_name

Run = Callable[[], Any]
# Name, side of the square matrices, and heads and length of the attention: each call takes about a tenth of a
# millisecond, one millisecond and ten on a present core.
CASES = [("short", 192, 4, 96), ("middling", 448, 8, 384), ("long", 1024, 8, 1280)]
WIDTH = 64


def seconds(runs: list[Run], calls: int) -> float:
    """For so many calls of each, in turns."""
    start = time.perf_counter()
    for _ in range(calls):
        for run in runs:
            run()
    return time.perf_counter() - start


def compare(product: Run, attention: Run, budget: float, rounds: int) -> dict[str, float]:
    """Milliseconds of a call of each, and of a pair, and the ratio; budget: seconds for all rounds."""
    pair = seconds([product, attention], 3) / 3  # also finds plans and starts threads
    calls = max(3, int(budget / rounds / (2 * pair)))
    ways = [[product], [attention], [product, attention]]
    found = []
    for number in range(rounds):
        times = [0.0, 0.0, 0.0]
        for way in range(3):
            way = (way + number) % 3  # none is always first
            times[way] = seconds(ways[way], calls)
        found.append(times)
    alone, own, both = (1e3 * statistics.median(times[way] for times in found) / calls for way in range(3))
    ratios = [times[2] / (times[0] + times[1]) for times in found]
    return {
        "product_ms": alone,
        "attention_ms": own,
        "pair_ms": both,
        "ratio": statistics.median(ratios),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }


def measure(budget: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each case, ours and torch's own attention."""
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name, side, heads, length in CASES:
            a, b = torch.randn(side, side), torch.randn(side, side)
            q, k, v = (torch.randn(1, heads, length, WIDTH) for _ in range(3))
            attentions: dict[str, Run] = {
                "tilewise": lambda q=q, k=k, v=v: tw.attention(q, k, v, kernel="native"),
                "torch": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v),
            }
            for whose, attention in attentions.items():
                rows.append(
                    {"case": name, "attention": whose, **compare(lambda a=a, b=b: a @ b, attention, budget, rounds)}
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case and each attention")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch and of ours; torch's own number where not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    if given.threads:
        torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    rows = measure(given.seconds, given.rounds)
    threads = torch.get_num_threads()
    table = Table("case", "attention", "products", "attention alone", "in turns", "ratio", title=f"{threads} threads")
    for row in rows:
        times = (f"{row[name]:.3f} ms" for name in ("product_ms", "attention_ms", "pair_ms"))
        table.add_row(row["case"], row["attention"], *times, f"{row['ratio']:.3f}")
    Console().print(table)
    about = {
        "cpu": processor_name(),
        "threads": threads,
        "load_before": load,
        "torch": torch.__version__,
        "rounds": given.rounds,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / ("neighbour-" + re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-") + ".json")
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
