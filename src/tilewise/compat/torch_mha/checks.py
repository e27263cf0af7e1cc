"""Errors that are what tilewise promises, a ValueError, and what the original raises as well."""

from __future__ import annotations


class AtenError(ValueError, RuntimeError):
    """A wrong argument where aten's own check raises a RuntimeError."""


class ShapeError(ValueError, AssertionError):
    """A wrong argument where `torch.nn` asserts."""


def expect(holds: bool, message: str) -> None:
    """Raise `AtenError(message)` unless it holds."""
    if not holds:
        raise AtenError(message)
