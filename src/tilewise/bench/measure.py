"""Verified first, then timed in turn: every round asks each peer once, so that what disturbs one disturbs all.

Each round asks them in another order, drawn at random (always the same): who comes next finds the caches filled with
other things, and threads asleep, or waiting in a loop on its cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..masks.lower import LoweredMask, lower
from ..masks.site import Site
from ..philox import keep_mask
from .cases import DROPOUT, Case, arrays
from .peers import PEERS, Refused, question
from .runs import Answers

_ROWS = 10  # query rows that are held against float64, beside the first and the last
# Of these, relative; inputs are rounded too. Who rounds float16 to bfloat16 on the way, as OpenVINO does where the
# processor multiplies that faster, is wrong by 4e-3 and more, others by less than 1e-3.
_MOST_ERROR = {"float32": 2e-5, "float16": 2.5e-3, "bfloat16": 4e-2}


@dataclass(frozen=True)
class Result:
    """One case in one dtype.

    Attributes:
        seconds: for each peer that ran, the median of its times.
        ratios: for each peer but ours, the median over rounds of its time over ours.
        refusals: for each other peer, why not.
        rate: ours, in GFLOP/s, or GB/s of K and V for decode.
        peak: the machine's own for that, measured in the same rounds; share: the median over rounds of ours in it.
    """

    case: Case
    dtype: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    refusals: dict[str, str]
    rate: float
    peak: float
    share: float
    rounds: int = field(default=0)


def measure(
    case: Case, dtype: str, names: list[str], peak: Callable[[], float], seconds: float, tell: Callable[[str], None]
) -> Result:
    """Verify and time a case.

    Args:
        names: of the peers, ours first; peak: measures the machine's limit for this case, GFLOP/s or GB/s.
        seconds: to spend on timing it; tell: is told what is being done.
    """
    data, refusals, runs = arrays(case), {}, {}
    for name in names:
        tell(f"{case.name} {dtype}: checking {name}")
        try:
            asked = question(name, case)
            if asked is None:
                continue
            run, answers = PEERS[name][1](asked, data, dtype)
            error = worst_error(asked, data, answers(run()))
        except Refused as refusal:
            refusals[name] = str(refusal)
            continue
        except Exception as failure:
            refusals[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:200]
            continue
        if not error <= _MOST_ERROR[dtype]:
            refusals[name] = f"wrong by {error:.1e}"
            continue
        runs[name] = run
    tell(f"{case.name} {dtype}: timing")
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: list[float] = []
    rng, begin, rounds = np.random.default_rng(7), time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - begin < seconds and rounds < 200):
        peaks.append(peak())
        for name in rng.permutation(list(runs)):
            times[name].append(_time(runs[name]))
        rounds += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = names[0]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times[ours], strict=True))
        for name in times
        if name != ours and ours in times
    }
    rates = [case.work(4 if dtype == "float32" else 2) / passed / 1e9 for passed in times.get(ours, [])]
    rate, share = float("nan"), float("nan")
    if rates:
        rate = statistics.median(rates)
        share = statistics.median(own / limit for own, limit in zip(rates, peaks, strict=True))
    return Result(case, dtype, medians, ratios, refusals, rate, statistics.median(peaks), share, rounds)


def worst_error(case: Case, data: dict[str, np.ndarray], answers: Answers) -> float:
    """Largest difference of a few rows from float64; NaN if there is one.

    The output's are relative to the largest value of the row, those of the gradient of q to the largest of all these
    rows: a gradient is a difference, of which little may be left. The first and last rows are among them. The inputs
    are rounded to the dtype by the peers, so half types are judged by their own grain.

    Args:
        answers: the output, and for training the gradient of q where all gradients of the output are 1, each
            (B, Hq, Sq, D).
    """
    last = case.batch - 1, case.q_heads - 1, case.q_len - 1
    lowered = lower(case.mask_of(), Site(case.batch, case.q_heads, case.q_len, case.k_len))
    rng = np.random.default_rng(1)
    rows = [(0, 0, 0), last, *(tuple(rng.integers(np.add(last, 1)).tolist()) for _ in range(_ROWS))]
    exact = {row: found for row in rows if (found := _exact_row(case, lowered, data, *row)) is not None}
    if not exact:  # rows that see nothing, on which the peers' conventions differ
        return 0.0
    gradient = max(np.abs(found[1]).max() for found in exact.values()) or 1.0  # queries that see one key have none
    errors = []
    for row, found in exact.items():
        for got, own, grain in zip(answers, found, (np.abs(found[0]).max(), gradient), strict=False):
            errors.append(np.abs(got[row] - own).max() / grain)
    return float(np.max(errors))  # unlike Python's max, it does not lose a NaN


def _exact_row(
    case: Case, lowered: LoweredMask, data: dict[str, np.ndarray], b: int, h: int, i: int
) -> tuple[np.ndarray, ...] | None:
    """(D,) output and gradient of one query in float64; None where it sees no key."""
    k, v = (data[name][b, h * case.kv_heads // case.q_heads].astype(np.float64) for name in ("k", "v"))
    scores = k @ data["q"][b, h, i] / case.dim**0.5
    seen = lowered.visible(slice(i, i + 1), slice(0, case.k_len), slice(b, b + 1), slice(h, h + 1))
    if case.options:
        scores += data["bias"][0, 0, i]
    if seen is not None:
        if not seen.any():
            return None
        scores = np.where(seen.reshape(-1), scores, -np.inf)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    kept: np.ndarray | float = 1.0
    if case.options:
        place = np.asarray(b), np.asarray(h), np.asarray(i), np.arange(case.k_len)
        dropout = replace(DROPOUT, seed=(DROPOUT.seed, 0))
        kept = keep_mask(dropout, *place, case.q_heads, case.q_len, case.k_len, np) * dropout.inverse_keep
    pulled = kept * v.sum(1)  # the gradient of each weight
    gradient = weights * (pulled - weights @ pulled) @ k / case.dim**0.5
    return (weights * kept) @ v, gradient


def peaks(found: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The best that each of `limits` shows in some measurements."""
    return {name: max(limit() for _ in range(3)) for name, limit in found.items()}


def limits() -> dict[str, Callable[[], float]]:
    """The machine's own limits: GFLOP/s of multiply-adds in registers by dtype, GB/s of reads from memory ("read").

    Each is measured when it is called, in some hundredths of a second, as they change while neighbours come and go: the
    best of some tries, since the threads of the peer before may still wait in a loop.
    """
    import torch

    from .. import _native
    from ..kernels.native.buffers import DTYPE_CODES

    numbers = torch.ones(1 << 26)  # 256 MB, much larger than the caches
    found: dict[str, Callable[[], float]] = {
        name: partial(_native.peak_gflops, 0, 0.01, DTYPE_CODES[name]) for name in _MOST_ERROR
    }
    found["read"] = lambda: _native.read_gbps(numbers.data_ptr(), numbers.numel())
    return {name: partial(_best, probe) for name, probe in found.items()}


def _best(probe: Callable[[], float]) -> float:
    return max(probe() for _ in range(5))


def _time(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
