"""Part two: causal attention over more tokens than a score matrix could be stored for."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np

import tilewise
from tilewise.plan.explain import quantity

from .memory import peak_above_now
from .page import Page

HEADS, WIDTH, SLAB = 8, 64, 8192
WITHOUT_NATIVE = 8192  # tokens that the portable kernel does in the time of a demo
SAMPLED = 48  # rows that are checked


def run(page: Page, tokens: int) -> None:
    """One causal attention in float32, timed, measured, and checked on sampled rows."""
    page.title("2. a long text", "causal attention, float32, NumPy arrays")
    native = _native()
    if native is None:
        tokens = min(tokens, WITHOUT_NATIVE)
        page.row("native kernels", f"not installed: only {tokens:,} tokens, on the portable kernel", "bold yellow")
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, HEADS, tokens, WIDTH), dtype=np.float32) for _ in range(3))
    out = np.zeros_like(q) + 0.0  # written to once, so that its pages are there before memory is measured
    held = quantity(sum(array.nbytes for array in (q, k, v, out)), "B")
    page.row("problem", f"{tokens:,} tokens, {HEADS} heads of width {WIDTH}, {held} of inputs and output")
    page.row("the plain formula", f"would store {quantity(4 * HEADS * tokens**2, 'B')} of scores")

    pairs, seconds, peaks = HEADS * tokens * (tokens + 1) // 2, 0.0, []
    with peak_above_now() as grown, page.progress("attention", pairs) as advance:
        for head, first in itertools.product(range(HEADS), range(0, tokens, SLAB)):
            # A slab of queries and the keys up to its last: its diagonal ends where the keys end.
            last = min(first + SLAB, tokens)
            one, rows, keys = slice(head, head + 1), slice(first, last), slice(0, last)
            start = time.perf_counter()
            out[:, one, rows] = tilewise.attention(
                q[:, one, rows], k[:, one, keys], v[:, one, keys], mask=tilewise.causal("end")
            )
            seconds += time.perf_counter() - start
            if native is not None and first == 0:
                peaks.append(1e9 * native.peak_gflops())
            advance((last - first) * (first + last + 1) / 2)
        memory = grown()
    speed = 4 * WIDTH * pairs / seconds
    page.row("time", f"{seconds:.1f} s")
    page.row("peak memory", "not known here" if memory is None else f"{quantity(memory, 'B')} beyond inputs and output")
    page.row("speed", quantity(speed, "FLOP/s"))
    if native is not None:
        # The best of one probe per head, between the timed calls: load from elsewhere can only lower a probe.
        share, peak = speed / max(peaks), quantity(max(peaks), "FLOP/s")
        page.row("", f"{share:.0%} of this machine's measured multiply-add peak, {peak} ({native.isa()})")
    _check(page, q, k, v, out)
    page.row("explain", "the whole problem", "bold")
    page.plan(tilewise.explain(q, k, v, mask=tilewise.causal()))


def _native() -> Any:
    """The compiled module, which can also measure the machine, or None in a pure Python install."""
    try:
        from tilewise import _native
    except ImportError:
        return None
    return _native


def _check(page: Page, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
    """Sampled rows against the formula in float64, by the library's rule of accuracy for float32.

    The error may be at most twice that of the plain formula in float32, plus 2e-6 times the largest output (or 1).
    """
    tokens = q.shape[2]
    random = np.random.default_rng(1)
    rows = [0, 1, tokens - 1, *random.integers(0, tokens, SAMPLED - 3).tolist()]
    ours = plain = largest = 0.0
    for row in rows:
        head = int(random.integers(HEADS))
        query, keys, values = q[0, head, row], k[0, head, : row + 1], v[0, head, : row + 1]
        exact = _row(query.astype(np.float64), keys.astype(np.float64), values.astype(np.float64))
        ours = max(ours, float(np.abs(out[0, head, row] - exact).max()))
        plain = max(plain, float(np.abs(_row(query, keys, values) - exact).max()))
        largest = max(largest, float(np.abs(exact).max()))
    allowed = 2 * plain + 2e-6 * max(1.0, largest)
    page.check(f"{SAMPLED} rows in float64", f"error {ours:.1e}, at most {allowed:.1e} allowed", ours <= allowed)


def _row(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The formula for one query (D,), keys (n, D) and values (n, D), in their dtype."""
    scores = keys @ query / math.sqrt(WIDTH)
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()
