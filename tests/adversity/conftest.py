from __future__ import annotations

from collections.abc import Iterator

import pytest
from sites import Site, a_site


@pytest.fixture(scope="module")
def replica_set_site(server: str) -> Iterator[Site]:
    with a_site(server) as site:
        yield site


@pytest.fixture(scope="module")
def standalone_site(standalone: str) -> Iterator[Site]:
    with a_site(standalone) as site:
        yield site
