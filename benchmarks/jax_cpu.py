"""Attention in jax on the CPU: ours beside `jax.nn.dot_product_attention` (xla), in one process, in turns.

    PYTHONPATH=src python benchmarks/jax_cpu.py

Each measurement alternates the two, so that a machine that slows down slows both; the ratio is the median over the
ratios of neighbouring turns, above 1 where ours is the faster. jax's own attention makes matrices of all scores: where
those would pass `--most` GiB it is left out, and the file says so. The last table is what a call costs beside its
arithmetic: a jitted attention of tiny arrays beside a jitted sum of as many.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tilewise as tw
from tilewise.bench.report import processor_name

HEADS, WIDTH = 8, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DTYPES = ("float32", "bfloat16")
STEPS = ("forward", "gradient")
SECONDS = 3.0  # for a measurement, about


def arrays(length: int, dtype: str) -> list[Any]:
    """q, k, v (1, S, H, D), the layout of jax's own."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, length, HEADS, WIDTH)), dtype) for _ in range(3)]


def ours(causal: bool) -> Callable[..., Any]:
    mask = tw.causal() if causal else None
    return lambda q, k, v: tw.attention(q, k, v, mask=mask, layout="bshd")


def theirs(causal: bool) -> Callable[..., Any]:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def compiled(attend: Callable[..., Any], step: str, given: list[Any]) -> Callable[[], Any]:
    """A call that waits for its results; already run once."""
    function = attend if step == "forward" else jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))
    program = jax.jit(function)
    jax.block_until_ready(program(*given))
    return lambda: jax.block_until_ready(program(*given))


def in_turns(first: Callable[[], Any], second: Callable[[], Any] | None, times: int = 1) -> dict[str, float]:
    """Best seconds of each, and the median of second / first over neighbouring turns."""
    calls, spent = [first, *([second] if second else [])], []
    begin = time.perf_counter()
    while len(spent) < 3 or (time.perf_counter() - begin < SECONDS and len(spent) < 200):
        spent.append([clock(call, times) for call in calls])
    best = [min(turn) for turn in zip(*spent, strict=True)]
    if not second:
        return {"ours": best[0]}
    return {"ours": best[0], "theirs": best[1], "ratio": statistics.median(b / a for a, b in spent)}


def clock(call: Callable[[], Any], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def speeds(lengths: list[int], most: float) -> Iterator[dict[str, Any]]:
    """Seconds and ratios."""
    for dtype, causal, step, n in product(DTYPES, (False, True), STEPS, lengths):
        given = arrays(n, dtype)
        row: dict[str, Any] = {"dtype": dtype, "causal": causal, "step": step, "length": n}
        # Scores and probabilities in float32, and in the backward pass the gradients of both.
        fits = HEADS * n * n * 4 * (2 if step == "forward" else 4) <= most * 2**30
        other = compiled(theirs(causal), step, given) if fits else None
        row |= in_turns(compiled(ours(causal), step, given), other)
        yield row if fits else {**row, "left_out": f"jax.nn would need more than {most:g} GiB"}


def overheads() -> Iterator[dict[str, Any]]:
    """Microseconds of a jitted call on tiny arrays, beside a jitted sum of the same number of arrays."""
    given = [jnp.ones((1, 4, 2, 8), jnp.float32) for _ in range(3)]
    bias = jnp.ones((2, 4, 4), jnp.float32)
    cases = {
        "attention of q, k, v": (ours(False), lambda q, k, v: q + k + v, given),
        "causal attention of q, k, v": (ours(True), lambda q, k, v: q + k + v, given),
        "attention of q, k, v, bias": (
            lambda q, k, v, b: tw.attention(q, k, v, bias=b, layout="bshd"),
            lambda q, k, v, b: q + k + v + b.sum(),
            [*given, bias],
        ),
        "gradients of q, k, v": (
            jax.grad(lambda *x: ours(False)(*x).sum(), (0, 1, 2)), lambda q, k, v: (q + k, k + v, v + q), given,
        ),
    }  # fmt: skip
    for name, (attend, simple, operands) in cases.items():
        calls = [compiled(function, "forward", operands) for function in (attend, simple)]
        found = in_turns(*calls, times=500)
        yield {
            "call": name, "ours_us": 1e6 * found["ours"], "sum_us": 1e6 * found["theirs"],
            "times": 1 / found["ratio"],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="numbers of tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--most", type=float, default=6.0, help="GiB beyond which jax.nn is not tried")
    given, load = parser.parse_args(), os.getloadavg()[0]
    calls, rows = list(overheads()), []
    for row in calls:
        print(f"{row['call']:28} {row['ours_us']:7.1f} us, a sum {row['sum_us']:6.1f} us: {row['times']:.2f} times")
    for row in speeds(sorted(given.lengths), given.most):
        rows.append(row)
        beside = f"jax.nn {row['theirs']:8.4f} s: {row['ratio']:.2f}" if "ratio" in row else row["left_out"]
        mask = "causal" if row["causal"] else "full"
        print(f"{row['dtype']:9} {mask:6} {row['step']:8} {row['length']:6} ours {row['ours']:8.4f} s, {beside}")
    name = "jax-cpu-" + re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    about = {
        "cpu": processor_name(), "cores": os.cpu_count(), "jax": jax.__version__, "heads": HEADS, "width": WIDTH,
        "load_before": load,
    }  # fmt: skip
    (given.out / f"{name}.json").write_text(json.dumps({**about, "overhead": calls, "rows": rows}, indent=1) + "\n")
    print(given.out / f"{name}.json")


if __name__ == "__main__":
    main()
