"""The compiled kernels' pages, one after another."""

from __future__ import annotations

import pytest

try:
    from tilewise import _native
except ImportError:  # then the modules here are skipped
    PAGES, REFUSED = [], {}
else:
    PAGES, REFUSED = (_native.build_info()[name] for name in ("supported_pages", "refused_pages"))


@pytest.fixture(params=PAGES)
def page(request, monkeypatch) -> str:
    """Runs a test on each page of kernels that this processor supports; returns its name."""
    monkeypatch.setenv("TILEWISE_ISA", request.param)
    assert _native.isa() == request.param
    return request.param


@pytest.fixture
def tile_page(monkeypatch) -> None:
    """Runs a test on the page for tile registers; skips it where this processor, compiler or system has none."""
    if "amx_bf16" not in PAGES:
        pytest.skip(REFUSED.get("amx_bf16", "no AMX-BF16 in this processor or compiler"))
    monkeypatch.setenv("TILEWISE_ISA", "amx_bf16")
