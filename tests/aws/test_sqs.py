"""Metadata changes to SQS, read out of the queue."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from bson import Decimal128, ObjectId

from arrivals import Queue
from mongodb_session_manager import ConfigurationError, create_metadata_sqs_hook
from support import CommandLog


def test_updates_and_deletes_arrive_in_order(factory: Any, commands: CommandLog, moto: str, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=moto)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        commands.clear()
        assert manager.update_metadata({"status": "busy", "a.b": 1}) is None
        assert manager.delete_metadata(["status", "unknown"]) is None
        assert manager.get_metadata() == {"metadata": {"a": {"b": 1}}}
        assert commands.names == ["update", "update", "find"]
    first, second = queue.arrived()
    body = first.json
    assert datetime.fromisoformat(body.pop("timestamp")).tzinfo == UTC
    assert body == {
        "session_id": "s",
        "event": "metadata_update",
        "operation": "update",
        "metadata": {"status": "busy", "a.b": 1},
    }
    assert first.attributes == {"session_id": "s", "event": "metadata_update"}
    assert (second.json["operation"], second.metadata) == ("delete", {"status": None, "unknown": None})


@pytest.mark.anyio
async def test_only_the_named_fields_leave(factory: Any, moto: str, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(queue.url, ["status", "user.name"], endpoint_url=moto)
    async with await factory.create_session_manager_async("s", metadata_hook=hook) as manager:
        await manager.update_metadata({"status": "busy", "password": "x", "user": {"name": "Ada", "iban": "y"}})
        await manager.update_metadata({"password": "z"})
        await manager.delete_metadata(["password", "user"])
        assert await manager.get_metadata() == {"metadata": {"status": "busy"}}
    assert [message.metadata for message in queue.arrived()] == [
        {"status": "busy", "user.name": "Ada"},
        {"user.name": None},
    ]


def test_every_value_has_its_form(factory: Any, moto: str, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=moto)
    values = {
        "date": datetime(2026, 1, 2, 3, 4, 5),
        "id": ObjectId("65a1b2c3d4e5f60718293a4b"),
        "decimal": Decimal128("1.10"),
        "bytes": b"\x00\xff",
    }
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata(values)
    [message] = queue.arrived()
    assert message.metadata == {
        "date": "2026-01-02T03:04:05+00:00",
        "id": "65a1b2c3d4e5f60718293a4b",
        "decimal": "1.10",
        "bytes": "AP8=",
    }


def test_a_uuid_too(moto: str, queue: Queue, factory: Any) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=moto)

    async def original(metadata: dict[str, Any]) -> str:
        return "what the operation returns"

    with factory.create_session_manager("s", metadata_hook=hook):
        portal = factory._connection.portal
        assert portal.call(lambda: hook(original, "update", "s", metadata={"u": UUID(int=1)})) == (
            "what the operation returns"
        )
    [message] = _eventually_arrived(queue)
    assert message.metadata == {"u": "00000000-0000-0000-0000-000000000001"}


def _eventually_arrived(queue: Queue) -> list[Any]:
    arrived: list[Any] = []
    while not arrived:
        arrived = queue.arrived()
    return arrived


@pytest.mark.own_factory
def test_metadata_that_is_too_large_is_cut_to_its_keys(factory: Any, moto: str, queue: Queue) -> None:
    hook = create_metadata_sqs_hook(queue.url, endpoint_url=moto)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"large": "x" * 300_000, "small": 1})
        assert len(manager.get_metadata()["metadata"]["large"]) == 300_000
    [message] = queue.arrived()
    assert message.json["truncated"] is True
    assert message.metadata == ["large", "small"]
    assert factory.get_notification_stats()["failed"] == 0


def test_a_fifo_queue_keeps_the_order_of_a_session(factory: Any, moto: str, fifo_queue: Queue) -> None:
    hook = create_metadata_sqs_hook(fifo_queue.url, endpoint_url=moto)
    with (
        factory.create_session_manager("a", metadata_hook=hook) as first,
        factory.create_session_manager("b", metadata_hook=hook) as second,
    ):
        for number in range(4):
            first.update_metadata({"n": number})
            second.update_metadata({"n": number})
    arrived = fifo_queue.arrived()
    for session in "ab":
        of_session = [message for message in arrived if message.system["MessageGroupId"] == session]
        assert [message.metadata["n"] for message in of_session] == list(range(4))
    assert len({message.system["MessageDeduplicationId"] for message in arrived}) == 8


def test_the_region_is_that_of_the_queue() -> None:
    hook = create_metadata_sqs_hook("https://sqs.ap-south-1.amazonaws.com/123456789012/q")
    assert hook._sqs.key.region_name == "ap-south-1"


def test_a_hook_that_may_send_no_field_warns_when_it_is_made(caplog: pytest.LogCaptureFixture) -> None:
    create_metadata_sqs_hook("https://x/q", [])
    assert [record.getMessage() for record in caplog.records] == [
        "metadata_fields=<[]> | an empty list sends no notification; None sends all fields"
    ]


@pytest.mark.parametrize("arguments", [("",), (None,), ("https://x/q", "status"), ("https://x/q", [1])])
def test_arguments_are_checked(arguments: Any) -> None:
    with pytest.raises(ConfigurationError):
        create_metadata_sqs_hook(*arguments)
