"""`tilewise bench`: ours and every installed peer on this machine, verified, then timed in turn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench.cases import CASES, Case
from .output import reported, rows

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def bench(
    only: Annotated[list[str] | None, typer.Option("--case", help="Part of a case's name; may be repeated.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16; may be repeated. All but float16 if none.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Only this one beside ours, such as torch; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to spend on each case.")] = 5.0,
    quick: Annotated[bool, typer.Option("--quick", help="Lengths divided by eight: a look, no measurement.")] = False,
    lengths: Annotated[bool, typer.Option("--lengths/--no-lengths", help="Also causal at many lengths.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write JSON and a picture into this folder.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare with this git revision of tilewise instead.")] = None,
) -> None:
    """Measure attention on this machine, beside its own peaks and every peer that is installed."""
    with reported():
        cases = list(CASES)
        if lengths:
            cases += [Case(f"length {n}", 1, 8, 8, n, n, 64, "causal") for n in _LENGTHS]
        cases = [case for case in cases if not only or any(part in case.name for part in only)]
        if not cases:
            raise ValueError(f"--case: no case has {' or '.join(only or [])} in its name")
        dtypes = dtype or ["float32", "bfloat16"]
        if unknown := [name for name in dtypes if name not in ("float32", "float16", "bfloat16")]:
            raise ValueError(f"--dtype: got {unknown[0]!r}, expected float32, float16 or bfloat16")
        if quick:
            cases = [case.smaller(8) for case in cases]
        if against is not None:
            _compare(against, cases, dtypes, seconds)
            return
        _bench(cases, dtypes, peer, seconds, out)


def _bench(cases: list[Case], dtypes: list[str], peer: list[str] | None, seconds: float, out: Path | None) -> None:
    import torch

    from ..bench import measure, report
    from ..bench.peers import installed

    names = installed()
    if unknown := [name for name in peer or [] if name not in names]:
        raise ValueError(f"--peer: got {unknown[0]!r}, expected one that is installed: {', '.join(names)}")
    names = [name for name in names if name == "tilewise" or not peer or name in peer]
    results = []
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("the machine's own peaks", total=len(cases) * len(dtypes))
        limits = measure.limits()
        peaks = measure.peaks(limits)
        for case in cases:
            for dtype in dtypes:
                limit = limits["read" if case.kind == "decode" else dtype]
                result = measure.measure(
                    case, dtype, names, limit, seconds, lambda text: progress.update(task, description=text)
                )
                results.append(result)
                progress.advance(task)
    typer.echo(report.table(results, peaks))
    if out is not None:
        stem = re.sub(r"\W+", "-", f"cpu-{report.cpu_name()}".lower()).strip("-")
        for path in report.save(out, stem, results, peaks, torch.get_num_threads()):
            typer.echo(f"wrote {path}")


def _compare(revision: str, cases: list[Case], dtypes: list[str], seconds: float) -> None:
    from ..bench.revisions import compare

    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("")
        found = compare(revision, cases, dtypes, seconds, lambda text: progress.update(task, description=text))
    rows(
        (f"{name} {dtype}", f"{1e3 * ours:.2f} ms, {revision} takes {ratio:.2f} of it")
        for name, dtype, ours, ratio in found
    )
