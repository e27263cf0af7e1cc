"""Everything here runs with 64-bit numbers, unless a test says otherwise."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("jax") else ["test_*.py"]


@pytest.fixture(autouse=True)
def sixty_four_bits():
    import jax

    with jax.enable_x64(True):
        yield
