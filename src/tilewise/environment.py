"""Variables of the environment that change how calls run, and what is said of values that are not understood.

Whoever sets a variable should learn that it does not count as it was meant, so that is said once, when the package is
imported. TILEWISE_ISA is refused at the call instead, and files that a variable names where they are read.
"""

from __future__ import annotations

import os
import re
import warnings


def deterministic() -> bool:
    """Whether equal inputs must give equal bits: always, but for TILEWISE_DETERMINISTIC=0.

    0 admits kernels of others whose order of summation depends on the number of threads or on chance.
    """
    return os.environ.get("TILEWISE_DETERMINISTIC", "") != "0"


def faults() -> dict[str, str]:
    """What is wrong with the variables that are set: for each that is not understood, what was got and expected."""
    found = {}
    threads = os.environ.get("TILEWISE_NUM_THREADS", "")
    # The compiled module reads it as C's atoi does, which takes the 2 of "2x" and nothing of "two".
    if threads and not (re.fullmatch(r"\s*\+?[0-9]+\s*", threads) and int(threads) < 2**31):
        found["TILEWISE_NUM_THREADS"] = f"got {threads!r}, expected a number of threads, or 0 for the default"
    exact = os.environ.get("TILEWISE_DETERMINISTIC", "")
    if exact not in ("", "0", "1"):
        found["TILEWISE_DETERMINISTIC"] = f"got {exact!r}, expected 0 or 1; equal inputs give equal bits, as with 1"
    return found


def warn() -> None:
    """A RuntimeWarning for each fault."""
    for variable, fault in faults().items():
        warnings.warn(f"{variable}: {fault}", RuntimeWarning, stacklevel=3)  # the importer of the package
