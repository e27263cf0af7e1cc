"""The cost model against real calls: gloo processes on this host, rates measured first, calls predicted from them.

    PYTHONPATH=src python benchmarks/distributed_calibration.py --ranks 2 4

In each round every rank times, one after the other and together with all others: products (one full block of its own
shard), an exchange (a shard passed round the ring), a call of hardly any tokens (what a call costs beside its work),
and the calls that are to be predicted. Of the ranks the slowest counts, since it is waited for; of the rounds the best,
what the host does when it does nothing else. The clock means little on a busy host; the seconds that a rank's thread
works, which hold no waiting, are compared beside it. Processes have one thread each: give more cores than ranks, or
products and exchanges take them from one another, which the model does not know.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tilewise as tw
from tilewise.bench.report import processor_name
from tilewise.distributed import Layout, Machine
from tilewise.distributed.cost import costs
from tilewise.masks.lower import lower
from tilewise.masks.site import Site
from tilewise.problem import AttentionProblem

HEADS, WIDTH, TINY = 4, 64, 32
CASES = [
    ("full", "contiguous", "ring"), ("full", "contiguous", "all_gather"), ("full", "contiguous", "ulysses"),
    ("causal", "contiguous", "ring"), ("causal", "zigzag", "ring"), ("causal", "zigzag", "all_gather"),
    ("window", "contiguous", "ring"),
]  # fmt: skip


def mask_of(name: str, tokens: int) -> tw.Mask | None:
    """A case's mask."""
    return {"full": None, "causal": tw.causal(), "window": tw.causal() & tw.window(tokens // 16, 0)}[name]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call that all ranks begin together, by the clock and of this thread's work."""
    import torch.distributed as dist

    dist.barrier()
    began, worked = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - began, time.thread_time() - worked


def worker(rank: int, ranks: int, tokens: int, rounds: int, folder: str) -> None:
    """One rank: its times, written to a file."""
    import torch
    import torch.distributed as dist

    from tilewise.torch.distributed import context_parallel_attention

    torch.set_num_threads(1)
    tw.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)

    def drawn(rows: int) -> list[Any]:
        return [torch.randn(1, HEADS, rows, WIDTH, generator=generator) for _ in range(3)]

    q, k, v = drawn(tokens // ranks)
    small = drawn(TINY)
    shard, coming = torch.cat([k, v], -1), torch.empty_like(torch.cat([k, v], -1))

    def exchange(out: Any, into: Any) -> None:
        moves = [dist.P2POp(dist.isend, out, (rank + 1) % ranks), dist.P2POp(dist.irecv, into, (rank - 1) % ranks)]
        for move in dist.batch_isend_irecv(moves):
            move.wait()

    def attend(x: list[Any], mask: Any, sharding: str, strategy: str) -> Callable[[], Any]:
        lengths = [x[0].shape[2]] * ranks
        return lambda: context_parallel_attention(
            *x, mask=mask, strategy=strategy, sharding=sharding, lengths=lengths, kernel="native"
        )

    calls: dict[str, Callable[[], Any]] = {
        "products": lambda: tw.attention(q, k, v, kernel="native"),
        "exchange": lambda: exchange(shard, coming),
        "message": lambda: exchange(shard[..., :1, :1].contiguous(), coming[..., :1, :1].contiguous()),
        "tiny": attend(small, None, "contiguous", "ring"),
    }
    for name, sharding, strategy in CASES:
        calls[f"{name}, {sharding}, {strategy}"] = attend([q, k, v], mask_of(name, tokens), sharding, strategy)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            seconds = timed(call)
            if n:  # the first round loads code
                times[name].append(seconds)
    Path(folder, f"{rank}.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, tokens: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each thing, by the clock and worked: of the ranks the most, of the rounds the least."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (ranks, tokens, rounds, folder), nprocs=ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    clock, worked = (
        {
            name: min(max(pair[which] for pair in round_) for round_ in zip(*(t[name] for t in found), strict=True))
            for name in found[0]
        }
        for which in (0, 1)
    )
    return clock, worked


def compared(ranks: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Rates, and for each case the seconds predicted and measured."""
    seconds, worked = measured(ranks, tokens, rounds)
    own = tokens // ranks
    problem = AttentionProblem("torch", "cpu", "float32", 1, HEADS, HEADS, tokens, tokens, WIDTH, WIDTH)
    machine = Machine(
        flops=4.0 * HEADS * WIDTH * own * own / seconds["products"],
        bandwidth=own * HEADS * 2 * WIDTH * 4 / max(seconds["exchange"] - seconds["message"], 1e-9),
        latency=seconds["message"],
        # A call of few tokens is messages and what else each step takes.
        overhead=max(0.0, seconds["tiny"] - (ranks - 1) * seconds["message"]) / ranks,
    )
    rows = []
    for name, sharding, strategy in CASES:
        layout = Layout(sharding, tokens, ranks)  # type: ignore[arg-type]
        lowered = lower(mask_of(name, tokens), Site(1, 1, tokens, tokens))
        cost = next(c for c in costs(problem, lowered, layout, layout, machine) if c.strategy == strategy)
        case = f"{name}, {sharding}, {strategy}"
        # Work alone: products at the speed of work, and what a call of hardly any tokens works.
        work = cost.computing * worked["products"] / seconds["products"] + worked["tiny"]
        rows.append({
            "case": case, "predicted": cost.forward, "measured": seconds[case], "ratio": seconds[case] / cost.forward,
            "work_predicted": work, "work_measured": worked[case], "work_ratio": worked[case] / work,
        })  # fmt: skip
    rates = {"flops": machine.flops, "bandwidth": machine.bandwidth, "latency": machine.latency,
             "overhead": machine.overhead}  # fmt: skip
    return {"ranks": ranks, "tokens": tokens, "rates": rates, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args()

    found = [compared(ranks, given.tokens, given.rounds) for ranks in given.ranks]
    for result in found:
        rates = ", ".join(f"{name} {value:.3g}" for name, value in result["rates"].items())
        print(f"{result['ranks']} ranks on {os.cpu_count()} cores, {result['tokens']} tokens: {rates}")
        for row in result["rows"]:
            print(f"  {row['case']:32} predicted {row['predicted']:.4f} s  measured {row['measured']:.4f} s"
                  f"  ratio {row['ratio']:.2f};  work {row['work_predicted']:.4f} s, {row['work_measured']:.4f} s,"
                  f"  ratio {row['work_ratio']:.2f}")  # fmt: skip
    about = {"cpu": processor_name(), "cores": os.cpu_count(), "heads": HEADS, "width": WIDTH,
             "load": os.getloadavg()[0], "dtype": "float32", "pass": "forward"}  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "distributed-calibration.json"
    path.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
