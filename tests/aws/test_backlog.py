"""More updates than may wait, while AWS answers nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
from functools import partial
from pathlib import Path

import pytest

from arrivals import Queue
from endpoint import Endpoint
from mongodb_session_manager import MongoDBSessionManagerFactory, create_metadata_sqs_hook
from mongodb_session_manager._notifications import dispatcher, notify
from support import CommandLog

MOST = 100
"""How many may wait here, instead of 10,000."""


def resident_bytes() -> int:
    """Return what the process holds of the machine's memory, 0 where that is not told."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * 4096 if told.exists() else 0


@pytest.mark.own_factory
@pytest.mark.anyio
async def test_a_backlog_is_bounded_seen_and_felt_by_nobody(
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    endpoint: Endpoint,
    queue: Queue,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    updates = dispatcher.MAX_WAITING if request.config.getoption("--full-adversity") else MOST
    monkeypatch.setattr(notify, "Dispatcher", partial(dispatcher.Dispatcher, max_waiting=updates))
    endpoint.hangs()
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=endpoint.url)
    managers = [await factory.create_session_manager_async(f"s {number}", metadata_hook=hook) for number in range(20)]
    for manager in managers:
        await manager.update_metadata({"n": -1})
    commands.clear()
    gc.collect()
    before = resident_bytes()

    async def update(number: int) -> None:
        await managers[number % 20].update_metadata({"n": number, "text": "x" * 200})

    for start in range(0, updates, 20):  # one of each session at a time, so that the last one is known
        await asyncio.gather(*[update(number) for number in range(start, start + 20)])
    gc.collect()
    grown = resident_bytes() - before
    stats = factory.get_notification_stats()
    assert commands.names == ["update"] * updates  # nobody waited for more than the command
    assert stats["submitted"] == updates + 20
    assert stats["waiting"] == updates
    assert stats["failed"] == 20  # there was no room for these, which is said of each
    assert stats["delivered"] == 0
    assert stats["oldest_wait"] > 0
    assert grown < 5_000_000 + 15_000 * updates
    ours = [record for record in caplog.records if record.name.startswith("mongodb_session_manager._notifications")]
    warnings = [record.getMessage() for record in ours if record.levelno == logging.WARNING]
    assert [text.partition(",")[0] for text in warnings] == [f"waiting=<{updates // 10 * n}>" for n in (1, 2, 4, 8)]
    assert sum("event=<'sqs.metadata_update'>" in record.getMessage() for record in ours) == 20
    for number, manager in enumerate(managers):
        assert (await manager.get_metadata())["metadata"]["n"] == updates - 20 + number
    for manager in managers:
        await manager.close(notification_timeout=0)
    await factory.close_async(notification_timeout=0)
