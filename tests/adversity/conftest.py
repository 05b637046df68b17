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


@pytest.fixture(autouse=True)
def retries_come_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the driver look for a lost server at once, and the library send again sooner."""
    monkeypatch.setattr("pymongo.common.MIN_HEARTBEAT_INTERVAL", 0.02)
    monkeypatch.setattr("pymongo.network_layer._POLL_TIMEOUT", 0.02)
    monkeypatch.setattr("mongodb_session_manager._io.collection._PAUSES", (0.01, 0.02, 0.05))
