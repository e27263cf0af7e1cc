"""`tilewise doctor`: what works on this machine, and what would have to be done for the rest."""

from __future__ import annotations

from . import findings
from .findings import Finding
from .output import Row, heading, rows


def doctor() -> None:
    """Show what works on this machine.

    Kernels, native code, frameworks, optional packages and threads; each absence with its reason and its cure.
    """
    rows(_row(finding, mark=False) for finding in findings.machine())
    frameworks = findings.frameworks()  # first: whether a GPU kernel can run shows only once torch is loaded
    sections = {
        "kernels": findings.kernels(),
        "native code": findings.native(),
        "frameworks": frameworks,
        "optional packages": findings.extras(),
    }
    if variables := findings.environment():
        sections = {"environment": variables, **sections}
    absent = 0
    for title, found in sections.items():
        heading(f"\n{title}")
        rows((_row(finding) for finding in found), indent=2)
        absent += sum(not finding.present for finding in found)
    heading(f"\nabsent: {absent}, each with its cure after the arrow" if absent else "\nnothing absent")


def _row(finding: Finding, mark: bool = True) -> Row:
    text = finding.text if finding.present or not mark else f"absent: {finding.text}"
    return finding.name, f"{text} -> {finding.cure}" if finding.cure else text
