"""What a call costs beside its arithmetic: ours and torch's own attention on tiny inputs, side by side.

    PYTHONPATH=src python benchmarks/overhead.py

Both run the same problem in turns of a few dozen calls, ours and theirs alternating, so that a machine that slows down
slows both; the ratio is the median over the ratios of neighbouring turns. Below 1 ours is the faster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as theirs

import tilewise as tw
from tilewise.bench.report import processor_name

BATCH, HEADS, LENGTH, WIDTH = 1, 4, 16, 32
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def tensors(kv_heads: int = HEADS, grad: bool = False) -> list[torch.Tensor]:
    """q (B, H, S, D), k and v (B, Hkv, S, D), float32."""
    torch.manual_seed(0)
    shapes = [(BATCH, heads, LENGTH, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def cases(compiled: bool) -> Iterator[tuple[str, bool, Pair]]:
    """Name, whether gradients are recorded, and the two calls."""
    q, k, v = tensors()
    few = tensors(kv_heads=1)
    x, y, z = tensors(grad=True)
    seen = torch.rand(1, 1, LENGTH, LENGTH) < 0.7
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    causal = tw.causal()

    def both_ways(attend: Callable[..., Any], **given: Any) -> Callable[[], Any]:
        return lambda: attend(x, y, z, **given).sum().backward()

    yield "no_grad", False, (lambda: tw.attention(q, k, v), lambda: theirs(q, k, v))
    yield "no_grad, causal", False, (
        lambda: tw.attention(q, k, v, mask=causal), lambda: theirs(q, k, v, is_causal=True)
    )  # fmt: skip
    yield "no_grad, boolean mask", False, (
        lambda: tw.attention(q, k, v, mask=seen), lambda: theirs(q, k, v, attn_mask=seen)
    )  # fmt: skip
    yield "no_grad, four query heads to one of keys", False, (
        lambda: tw.attention(*few), lambda: theirs(*few, enable_gqa=True)
    )  # fmt: skip
    yield "forward, gradients recorded", True, (lambda: tw.attention(x, y, z), lambda: theirs(x, y, z))
    yield "forward and backward", True, (both_ways(tw.attention), both_ways(theirs))
    yield (
        "forward and backward, causal",
        True,
        (both_ways(tw.attention, mask=causal), both_ways(theirs, is_causal=True)),
    )
    if compiled:
        yield (
            "compiled, no_grad, causal",
            False,
            (
                _compiled(lambda q, k, v: tw.attention(q, k, v, mask=causal), q, k, v),
                _compiled(lambda q, k, v: theirs(q, k, v, is_causal=True), q, k, v),
            ),
        )
        yield (
            "compiled, forward and backward",
            True,
            (
                _compiled(lambda q, k, v: tw.attention(q, k, v).sum(), x, y, z, then=torch.Tensor.backward),
                _compiled(lambda q, k, v: theirs(q, k, v).sum(), x, y, z, then=torch.Tensor.backward),
            ),
        )


def _compiled(function: Callable[..., Any], *given: torch.Tensor, then: Any = lambda out: out) -> Callable[[], Any]:
    quick = torch.compile(function, fullgraph=True)
    return lambda: then(quick(*given))


def compare(pair: Pair, grad: bool, seconds: float) -> dict[str, float]:
    """Microseconds of a call of each, and the median ratio of neighbouring turns."""
    with torch.set_grad_enabled(grad):
        for run in pair:  # plans are found and code is loaded, or compiled
            for _ in range(20):
                run()
        calls = max(5, int(2e-3 / turn(pair[1], 20)))
        turns = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(turns) < 5:
            turns.append((turn(pair[0], calls), turn(pair[1], calls)))
    return {
        "ours_us": 1e6 * statistics.median(mine for mine, _ in turns),
        "theirs_us": 1e6 * statistics.median(other for _, other in turns),
        "ratio": statistics.median(mine / other for mine, other in turns),
        "turns": len(turns),
    }


def turn(run: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, averaged over some."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of ours; tiny inputs want one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args()

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    rows = []
    for name, grad, pair in track(list(cases(not given.eager)), description="measuring"):
        rows.append({"case": name, **compare(pair, grad, given.seconds)})
    table = Table("case", "tilewise", "torch", "ratio", title=f"one call, {BATCH} x {HEADS} x {LENGTH} x {WIDTH}")
    for row in rows:
        table.add_row(row["case"], f"{row['ours_us']:.1f} us", f"{row['theirs_us']:.1f} us", f"{row['ratio']:.2f}")
    Console().print(table)
    about = {
        "cpu": processor_name(), "threads": given.threads, "load_before": load, "torch": torch.__version__,
        "dtype": "float32", "shape": [BATCH, HEADS, LENGTH, WIDTH],
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / ("overhead-" + re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-") + ".json")
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
