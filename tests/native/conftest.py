"""The compiled kernels' pages, one after another."""

from __future__ import annotations

import pytest

try:
    from tilewise import _native
except ImportError:  # then the modules here are skipped
    PAGES = []
else:
    PAGES = _native.build_info()["supported_pages"]


@pytest.fixture(params=PAGES)
def page(request, monkeypatch) -> str:
    """Runs a test on each page of kernels that this processor supports; returns its name."""
    monkeypatch.setenv("TILEWISE_ISA", request.param)
    assert _native.isa() == request.param
    return request.param
