"""The errors that are tilewise's own.

Wrong arguments raise plain `ValueError` and `TypeError` that begin with the argument's name.
"""

from __future__ import annotations

from collections.abc import Sequence


class TilewiseError(Exception):
    """Base of the errors below."""


class KernelRefused(TilewiseError, RuntimeError):
    """A kernel asked for by name cannot run the problem, or no kernel can.

    Attributes:
        kernel: name of the kernel that was asked for, or "auto".
        reasons: every reason, one sentence each.
    """

    def __init__(self, kernel: str, reasons: Sequence[str]) -> None:
        self.kernel = kernel
        self.reasons = tuple(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"kernel: {kernel!r} cannot run this problem:{lines}")

    def __reduce__(self) -> tuple[type[KernelRefused], tuple[str, tuple[str, ...]]]:
        # Exceptions pickle through `args`, which hold the message; a worker process must be able to send this home.
        return (KernelRefused, (self.kernel, self.reasons))


class PeerLost(TilewiseError, RuntimeError):
    """A process that shares a call is gone, or did not answer in time. Its group is of no more use."""


class QuadraticMemory(TilewiseError, RuntimeError):
    """The only kernel that can run the problem needs memory proportional to Sq * Sk, and `allow_quadratic` is False."""
