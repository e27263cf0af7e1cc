"""Verified first, then timed in turn: every round asks each peer once, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..masks.lower import lower
from ..masks.site import Site
from ..philox import keep_mask
from .cases import DROPOUT, Case, arrays
from .peers import PEERS, Refused, question

_ROWS = 6  # query rows that are held against float64


@dataclass(frozen=True)
class Result:
    """One case in one dtype.

    Attributes:
        seconds: for each peer that ran, the median of its times.
        ratios: for each peer but ours, the median over rounds of its time over ours.
        refusals: for each other peer, why not.
        rate: ours, in GFLOP/s, or GB/s of K and V for decode; share: of the machine's peak for that.
    """

    case: Case
    dtype: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    refusals: dict[str, str]
    rate: float
    share: float
    rounds: int = field(default=0)


def measure(
    case: Case, dtype: str, names: list[str], peak: float, seconds: float, tell: Callable[[str], None]
) -> Result:
    """Verify and time a case.

    Args:
        names: of the peers, ours first; peak: the machine's limit for this case, GFLOP/s or GB/s.
        seconds: to spend on timing it; tell: is told what is being done.
    """
    data, refusals, runs = arrays(case), {}, {}
    for name in names:
        tell(f"{case.name} {dtype}: checking {name}")
        try:
            asked = question(name, case)
            if asked is None:
                continue
            run, values = PEERS[name][1](asked, data, dtype)
            error = worst_error(asked, data, values(run()))
        except Refused as refusal:
            refusals[name] = str(refusal)
            continue
        except Exception as failure:
            refusals[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:200]
            continue
        limit = 2e-5 if dtype == "float32" else 4e-2
        if not error <= limit:
            refusals[name] = f"wrong by {error:.1e}"
            continue
        runs[name] = run
    tell(f"{case.name} {dtype}: timing")
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - begin < seconds and rounds < 200):
        for name, run in runs.items():
            times[name].append(_time(run))
        rounds += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = names[0]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times[ours], strict=True))
        for name in times
        if name != ours and ours in times
    }
    rate = case.work(4 if dtype == "float32" else 2) / medians[ours] / 1e9 if ours in medians else float("nan")
    return Result(case, dtype, medians, ratios, refusals, rate, rate / peak, rounds)


def worst_error(case: Case, data: dict[str, np.ndarray], out: np.ndarray) -> float:
    """Largest difference of a few rows from float64, relative to the largest value of these rows.

    The inputs are rounded to the dtype by the peers, so half types are judged by their own grain.
    """
    mask = case.mask_of()
    lowered = lower(mask, Site(case.batch, case.q_heads, case.q_len, case.k_len))
    rng, worst = np.random.default_rng(1), 0.0
    for _ in range(_ROWS):
        b, h, i = (int(rng.integers(size)) for size in (case.batch, case.q_heads, case.q_len))
        kv = h * case.kv_heads // case.q_heads
        scores = data["k"][b, kv].astype(np.float64) @ data["q"][b, h, i] / case.dim**0.5
        seen = lowered.visible(slice(i, i + 1), slice(0, case.k_len), slice(b, b + 1), slice(h, h + 1))
        if case.options:
            scores += data["bias"][0, 0, i]
        if seen is not None:
            scores = np.where(seen.reshape(-1), scores, -np.inf)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        if case.options:
            place = np.asarray(b), np.asarray(h), np.asarray(i), np.arange(case.k_len)
            dropout = replace(DROPOUT, seed=(DROPOUT.seed, 0))
            kept = keep_mask(dropout, *place, case.q_heads, case.q_len, case.k_len, np)
            weights *= kept * dropout.inverse_keep
        exact = weights @ data["v"][b, kv]
        worst = max(worst, float(np.abs(out[b, h, i] - exact).max() / np.abs(exact).max()))
    return worst


def peaks() -> dict[str, float]:
    """The machine's own limits: GFLOP/s of multiply-adds in registers by dtype, GB/s of reads from memory."""
    from .. import _native
    from ..kernels.native.buffers import DTYPE_CODES

    found = {name: _native.peak_gflops(0, 0.3, DTYPE_CODES[name]) for name in ("float32", "bfloat16")}
    return {**found, "read": read_bandwidth()}


def read_bandwidth() -> float:
    """GB/s at which all threads together read an array much larger than the caches, the best of some tries."""
    import torch

    array = torch.ones(1 << 28, dtype=torch.float32)  # 1 GiB
    best = min(_time(array.sum) for _ in range(5))
    return array.numel() * 4 / best / 1e9


def _time(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
