"""Everything here runs with 64-bit numbers, unless a test says otherwise."""

import pytest


@pytest.fixture(autouse=True)
def sixty_four_bits():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        yield
