"""What holds for every search: how exact results must be."""

from __future__ import annotations

import accuracy
import pytest


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the suite's tolerance: of many thousand problems some lie in the tail of what rounding does."""
    for name in ("FORWARD", "GRADIENT"):
        factor, floors = getattr(accuracy, name)
        monkeypatch.setattr(accuracy, name, (3 * factor, {dtype: 3 * floor for dtype, floor in floors.items()}))
    monkeypatch.setattr(accuracy, "LSE", {dtype: 3 * floor for dtype, floor in accuracy.LSE.items()})
