"""Four processes that stay for all tests of torch's engine: every test runs on the first few of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pytest.importorskip("torch.distributed")
    four = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield four
    four.close()
