"""Attention over ranks, predicted by the simulator for 8 to 16,384 ranks and 1M to 100M tokens: JSON and a picture.

    PYTHONPATH=src python benchmarks/distributed_model.py

Predictions are of one layer's forward and backward pass on a machine given by rates (see `MACHINES`): they compare
strategies with one another and say where links rather than products decide. They are no measurement;
`distributed_calibration.py` holds the model against real calls.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tilewise.distributed import MACHINES, Cost, Machine
from tilewise.distributed import simulate as sim
from tilewise.distributed.cost import Sizes
from tilewise.problem import AttentionProblem

RANKS = (8, 64, 256, 1024, 4096, 16384)
TOKENS = (1_000_000, 10_000_000, 100_000_000)
HEADS, KV_HEADS, WIDTH, WINDOW, DOCUMENT = 64, 8, 128, 4096, 8192
STRATEGIES = {
    "ring, contiguous": "#d29922", "ring, zigzag": "#1f6feb", "all_gather, zigzag": "#8250df",
    "ulysses": "#1a7f37", "best grid, zigzag": "#cf222e", "best grid, contiguous": "#e99695",
}  # fmt: skip


def problem_of(tokens: int) -> AttentionProblem:
    """A layer of a large model in bfloat16, its gradients wanted."""
    sizes = {"q_heads": HEADS, "kv_heads": KV_HEADS, "q_len": tokens, "k_len": tokens}
    return AttentionProblem("torch", "cuda", "bfloat16", 1, **sizes, head_dim=WIDTH, value_dim=WIDTH,
                            gradients=frozenset({"q", "k", "v"}))  # fmt: skip


def patterns(tokens: int) -> list[sim.Pattern]:
    """The masks of the picture's rows."""
    drawn = sim.drawn_documents(tokens, DOCUMENT)
    return [sim.full(), sim.causal(), sim.window(WINDOW), sim.documents(drawn, f"documents of {DOCUMENT} on average")]


def predictions(ranks: tuple[int, ...], machine: Machine) -> list[dict[str, Any]]:
    """A row for each mask, length, number of ranks, layout and strategy."""
    from rich.progress import track

    rows = []
    cases = [(tokens, n) for tokens in TOKENS for n in ranks]
    for tokens, n in track(cases, description="predicting"):
        for pattern in patterns(tokens):
            for kind in ("contiguous", "zigzag"):
                for cost in sim.predict(pattern, problem_of(tokens), kind, n, machine):
                    rows.append({"mask": pattern.name, "tokens": tokens, "ranks": n, **numbers(cost)})
    return rows


def numbers(cost: Cost) -> dict[str, Any]:
    """A prediction to four digits, which is more than it knows."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(cost).items() if name != "refused"}  # fmt: skip


def line_of(row: dict[str, Any]) -> str | None:
    """The line of the picture that a prediction belongs to."""
    names = {
        ("ring", "contiguous"): "ring, contiguous",
        ("ring", "zigzag"): "ring, zigzag",
        ("all_gather", "zigzag"): "all_gather, zigzag",
        ("ulysses", "contiguous"): "ulysses",
        ("grid", "zigzag"): "best grid, zigzag",
        ("grid", "contiguous"): "best grid, contiguous",
    }
    return names.get((row["strategy"], row["kind"]))


def picture(rows: list[dict[str, Any]], machine: Machine, path: Path) -> None:
    """Efficiency against ranks: the time that products alone would take, in perfect balance, over the predicted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    masks = list(dict.fromkeys(row["mask"] for row in rows))
    figure, panels = plt.subplots(len(masks), len(TOKENS), figsize=(12, 12), sharex=True, sharey=True,
                                  layout="constrained")  # fmt: skip
    for across, mask in zip(panels, masks, strict=True):
        for panel, tokens in zip(across, TOKENS, strict=True):
            here = [row for row in rows if row["mask"] == mask and row["tokens"] == tokens]
            for name, colour in STRATEGIES.items():
                best: dict[int, float] = {}
                for row in (row for row in here if line_of(row) == name):
                    best[row["ranks"]] = max(best.get(row["ranks"], 0.0), efficiency(row, machine))
                panel.plot(list(best), list(best.values()), label=name, color=colour, marker="o", markersize=4)
            panel.set_title(f"{mask}, {tokens / 1e6:g}M tokens", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_xticks(RANKS, [f"{n:,}" for n in RANKS], fontsize=8)
            panel.grid(alpha=0.3)
            panel.set_ylim(0, 1.05)
    for panel in panels[-1]:
        panel.set_xlabel("ranks")
    for panel in panels[:, 0]:
        panel.set_ylabel("share of the ideal speed")
    panels[0, 0].legend(fontsize=8, loc="lower left")
    about = f"{HEADS} heads on {KV_HEADS} of keys, width {WIDTH}, bfloat16, forward and backward"
    figure.suptitle(f"Predicted, not measured: {about}\n{machine.name}", fontsize=11)
    figure.savefig(path, dpi=120)


def efficiency(row: dict[str, Any], machine: Machine) -> float:
    """Seconds of the mask's products, spread evenly over the ranks, over the predicted seconds."""
    sizes = Sizes.of(problem_of(row["tokens"]))
    evenly = row["flops"] / row["imbalance"] / machine.flops
    return evenly * (1 + sizes.backward / sizes.flops) / (row["forward"] + row["backward"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=list(MACHINES), default="h100")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args()

    machine = MACHINES[given.machine]
    rows = predictions(tuple(given.ranks), machine)
    given.out.mkdir(parents=True, exist_ok=True)
    name = "distributed-model-" + re.sub(r"[^a-z0-9]+", "-", given.machine)
    about = {"machine": asdict(machine), "heads": HEADS, "kv_heads": KV_HEADS, "width": WIDTH, "dtype": "bfloat16",
             "what": "predicted seconds and bytes of the busiest rank, one layer"}  # fmt: skip
    lines = ",\n".join(map(json.dumps, rows))
    (given.out / f"{name}.json").write_text(f'{json.dumps(about)[:-1]},\n"rows": [\n{lines}\n]}}\n')
    picture(rows, machine, given.out / f"{name}.png")
    print(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
