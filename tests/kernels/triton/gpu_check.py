"""Hold the Triton kernels to their promises on a real GPU: `PYTHONPATH=src python tests/kernels/triton/gpu_check.py`.

Plain Python, under three minutes, one line for each check; leaves with 1 if any fails. Cases are compiled and run in
several processes at once, since compiling takes most of the time. Without a GPU it says so and leaves with 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

import paged_cases
from triton_cases import CASES, DEFAULTS

SIZES = {"bfloat16": 300, "float16": 300, "float32": 200}


Job = tuple[str, tuple[str, ...], list[str]]  # a script, its first arguments, the names of cases


def case_results() -> Iterator[tuple[str, str | None]]:
    """(what, error or None) for every case in every dtype, in one piece and in pages."""
    names = [case.name for case in CASES]
    workers = max(2, (os.cpu_count() or 4) - 2)
    # Interleaved, so that neighbours, which are alike and take alike long, go to different processes.
    jobs: list[Job] = [
        ("triton_cases.py", (dtype, str(size)), names[n::8]) for n in range(8) for dtype, size in SIZES.items()
    ]
    jobs += [("paged_cases.py", (dtype,), list(paged_cases.NAMES[n::4])) for n in range(4) for dtype in SIZES]
    with ThreadPoolExecutor(workers) as pool:
        for results in pool.map(_run_cases, jobs):
            yield from results


def _run_cases(job: Job) -> list[tuple[str, str | None]]:
    name, first, names = job
    script = Path(__file__).with_name(name)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "cuda", *first, *names],
        capture_output=True,
        text=True,
        env=environment,
    )
    found = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        found[record["case"]] = record["error"]
    crash = f"the process ended with {done.returncode}: {done.stderr[-1500:]}"
    return [(f"{first[0]:9} {name}", found.get(name, crash)) for name in names]


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the Triton kernel."""
    from tilewise.contract import Plan, Tiles
    from tilewise.kernels.triton.forward import forward
    from tilewise.validate import prepare

    call = prepare(q, k, v, **(DEFAULTS | options))
    return forward(Plan(call.problem, "triton", None, Tiles(0, 0), 0, {}), call.operands)


def many_heads() -> None:
    """B * H beyond 65,535."""
    q, k, v = (torch.randn(70_000, 1, 8, 16, device="cuda") for _ in range(3))
    out, _ = run(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (out - plain).abs().max() < 2e-5, (out - plain).abs().max()


def far_rows() -> None:
    """Elements more than 2^31 apart, through strides."""
    wide = torch.empty(40_000, 60_000, dtype=torch.bfloat16, device="cuda")
    rows = wide[:, :64]
    rows.copy_(torch.randn(40_000, 64, device="cuda"))
    k = rows[None, None]
    q = torch.randn(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    far, near = run(q, k, k), run(q, k.contiguous(), k.contiguous())
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


def long_causal() -> None:
    """16k causal, on rows spread over the whole length, against float64."""
    import tilewise

    n, picked = 16_384, torch.arange(0, 16_384, 97, device="cuda")
    q, k, v = (torch.randn(1, 2, n, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out, lse = run(q, k, v, mask=tilewise.causal())
    scores = q.double()[:, :, picked] @ k.double().transpose(-1, -2) / 128**0.5
    scores = scores.masked_fill(torch.arange(n, device="cuda") > picked[:, None], float("-inf"))
    exact = torch.softmax(scores, -1) @ v.double()
    assert (out[:, :, picked] - exact).abs().max() < 8e-3 * max(1, exact.abs().max())
    assert (lse[:, :, picked] - torch.logsumexp(scores, -1)).abs().max() < 4e-5


def predicate_in_slabs() -> None:
    """A predicate too large to be evaluated at once, against the same mask as ranges."""
    import tilewise

    n = 8192
    q, k, v = (torch.randn(1, 1, n, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    slow, fast = run(q, k, v, mask=tilewise.predicate(lambda b, h, i, j: j <= i)), run(q, k, v, mask=tilewise.causal())
    assert (slow[0] - fast[0]).abs().max() < 2e-3 and (slow[1] - fast[1]).abs().max() < 1e-4


def seed_in_a_graph() -> None:
    """A captured graph draws what the seed holds when it runs, by the kernel that decodes and by the other."""
    import tilewise

    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    for queries in (1, 200):
        q, k, v = (torch.randn(1, 4, n, 64, dtype=torch.float16, device="cuda") for n in (queries, 2000, 2000))
        run(q, k, v, dropout=tilewise.Dropout(0.5, seed))  # compiled before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = run(q, k, v, dropout=tilewise.Dropout(0.5, seed))
        for number in (3, 2**40 + 1):
            seed.fill_(number)
            graph.replay()
            assert torch.equal(out, run(q, k, v, dropout=tilewise.Dropout(0.5, number))[0]), (queries, number)


def linear_memory() -> None:
    """Peak memory of a windowed, a labelled and a predicate call at 64k: no trace of Sq * Sk."""
    import tilewise

    n = 65_536
    q, k, v = (torch.randn(1, 1, n, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    ids = torch.randint(0, 8, (n,), device="cuda")
    masks = {
        "window": tilewise.window(1000, 0),
        "labels": tilewise.documents(ids),
        "predicate": tilewise.predicate(lambda b, h, i, j: i - j < 500),
    }
    for name, mask in masks.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(q, k, v, mask=mask)
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
        # 32 Mi pairs at once, and the integers that a predicate computes with take 8 bytes a pair.
        assert used < (1 << 30), f"{name}: {used / 2**20:.0f} MiB"


CHECKS: tuple[Callable[[], None], ...] = (
    many_heads,
    far_rows,
    long_causal,
    predicate_in_slabs,
    seed_in_a_graph,
    linear_memory,
)


def check_results() -> Iterator[tuple[str, str | None]]:
    """(what, error or None) of the checks that want a large memory."""
    for check in CHECKS:
        try:
            check()
            yield check.__name__, None
        except Exception as error:
            yield check.__name__, f"{type(error).__name__}: {error}"


def main() -> int:
    """Print PASS or FAIL for each check, errors in full, and a summary."""
    if not torch.cuda.is_available():
        print("no GPU here")
        return 2
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    start, failed, count = time.time(), [], 0
    for results in (check_results(), case_results()):
        for what, error in results:
            count += 1
            print("PASS" if error is None else "FAIL", what, "" if error is None else "\n" + error, flush=True)
            failed += [what] if error is not None else []
    print(f"{count - len(failed)} of {count} passed in {time.time() - start:.0f} s; failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
