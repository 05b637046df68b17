"""Metadata changes to WebSocket connections: which, at what price, and what becomes of one that is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from endpoint import Endpoint, posted, told
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    ConfigurationError,
    chain_hooks,
    create_metadata_websocket_hook,
)
from support import CommandLog, eventually

GONE = (410, "GoneException", "")


def test_the_stored_connection_costs_no_command(factory: Any, commands: CommandLog, endpoint: Endpoint) -> None:
    endpoint.answers(200)
    hook = create_metadata_websocket_hook(endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        commands.clear()
        assert manager.update_metadata({"status": "nobody listens"}) is None
        assert manager.update_metadata({"connection_id": "c-1", "status": "new"}) is None
        assert manager.update_metadata({"status": "busy"}) is None
        assert manager.delete_metadata(["status"]) is None
        assert manager.update_metadata({"connection_id": "c-2"}) is None
        assert manager.update_metadata({"status": "moved"}) is None
        assert manager.delete_metadata(["connection_id"]) is None
        assert manager.update_metadata({"status": "nobody listens"}) is None
        assert commands.names == ["findAndModify"] * 8
        assert manager.get_metadata() == {"metadata": {"status": "nobody listens"}}
    assert told(endpoint) == [
        ("c-1", "update", {"status": "new"}),
        ("c-1", "update", {"status": "busy"}),
        ("c-1", "delete", {"status": None}),
        ("c-2", "update", {"status": "moved"}),
    ]
    message = posted(endpoint)[0][1]
    assert sorted(message) == ["event", "metadata", "operation", "session_id", "timestamp"]
    assert (message["session_id"], message["event"]) == ("s", "metadata_update")


@pytest.mark.anyio
async def test_async_with_fields_and_through_a_users_own_hook(factory: Any, endpoint: Endpoint) -> None:
    endpoint.answers(200)
    websocket = create_metadata_websocket_hook(endpoint.url, ["status"], "eu-west-1")

    async def own(original_func: Any, action: str, session_id: str, **argument: Any) -> str:
        await websocket(original_func, action, session_id, **argument)
        return "of its own"

    async with await factory.create_session_manager_async("s", metadata_hook=own) as manager:
        assert await manager.update_metadata({"connection_id": "c-1", "other": 1}) == "of its own"
        assert await manager.update_metadata({"status": "busy", "other": 2}) == "of its own"
    assert told(endpoint) == [("c-1", "update", {"status": "busy"})]


@pytest.mark.parametrize("outermost", [True, False])
def test_in_a_chain_with_a_hook_that_returns_nothing(factory: Any, endpoint: Endpoint, outermost: bool) -> None:
    endpoint.answers(200)
    websocket = create_metadata_websocket_hook(endpoint.url)

    def silent(original_func: Any, action: str, session_id: str, **argument: Any) -> None:
        original_func(*argument.values())

    chain = chain_hooks(websocket, silent) if outermost else chain_hooks(silent, websocket)
    with factory.create_session_manager("s", metadata_hook=chain) as manager:
        manager.update_metadata({"connection_id": "c-1", "a": 1})
        manager.delete_metadata(["a"])
    assert told(endpoint) == [("c-1", "update", {"a": 1}), ("c-1", "delete", {"a": None})]


@pytest.mark.own_factory
@pytest.mark.parametrize("remove_gone", [True, False])
def test_a_gone_connection_is_removed_and_no_error(
    factory: Any, endpoint: Endpoint, caplog: pytest.LogCaptureFixture, remove_gone: bool
) -> None:
    endpoint.answers(GONE)
    hook = create_metadata_websocket_hook(endpoint.url, remove_gone=remove_gone)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"connection_id": "c-1", "a": 1})
        eventually(lambda: factory.get_notification_stats()["waiting"] == 0)
        kept = {} if remove_gone else {"connection_id": "c-1"}
        assert manager.get_metadata() == {"metadata": {"a": 1, **kept}}
    assert factory.get_notification_stats()["failed"] == 0
    assert not caplog.records


def test_a_connection_that_was_replaced_meanwhile_stays(factory: Any, endpoint: Endpoint) -> None:
    endpoint.answers(GONE)
    hook = create_metadata_websocket_hook(endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        other = factory.create_session_manager("s")
        endpoint.on_request = lambda: other.update_metadata({"connection_id": "c-2"})
        manager.update_metadata({"connection_id": "c-1", "a": 1})
        eventually(lambda: factory.get_notification_stats()["waiting"] == 0)
        assert manager.get_metadata() == {"metadata": {"a": 1, "connection_id": "c-2"}}


@pytest.mark.own_factory
def test_moto_takes_it(factory: Any, moto: str) -> None:
    hook = create_metadata_websocket_hook(moto)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"connection_id": "c-1", "a": 1})
    assert factory.get_notification_stats()["delivered"] == 1


@pytest.mark.parametrize(
    ("given", "endpoint_url", "region"),
    [
        (
            "wss://abc.execute-api.us-east-2.amazonaws.com/prod/",
            "https://abc.execute-api.us-east-2.amazonaws.com/prod",
            "us-east-2",
        ),
        ("https://ws.example.org/prod", "https://ws.example.org/prod", None),
    ],
)
def test_endpoints(given: str, endpoint_url: str, region: str | None) -> None:
    hook = create_metadata_websocket_hook(given)
    assert (hook._api.key.endpoint_url, hook._api.key.region_name) == (endpoint_url, region)


@pytest.mark.parametrize("endpoint_url", ["", None, "ftp://x", "no url", "https://"])
def test_what_is_no_endpoint_is_refused(endpoint_url: Any) -> None:
    with pytest.raises(ConfigurationError, match="api_gateway_endpoint"):
        create_metadata_websocket_hook(endpoint_url)


def test_a_message_beyond_the_limit_of_the_gateway_is_cut(factory: Any, endpoint: Endpoint) -> None:
    endpoint.answers(200)
    hook = create_metadata_websocket_hook(endpoint.url)
    with factory.create_session_manager("s", metadata_hook=hook) as manager:
        manager.update_metadata({"connection_id": "c-1", "large": "x" * 200_000})
    [(_, message)] = posted(endpoint)
    assert (message["metadata"], message["truncated"]) == (["large"], True)


def test_on_a_client_of_the_callers_own(server: str, database: str, endpoint: Endpoint) -> None:
    """The client's loop is not the library's, where notifications are delivered."""
    endpoint.answers(GONE)
    hook = create_metadata_websocket_hook(endpoint.url)

    async def main() -> dict[str, Any]:
        async with AsyncMongoClient(server) as client:
            await client.admin.command("ping")
            options = {"client": client, "database_name": database}
            async with AsyncMongoDBSessionManager("s", **options, metadata_hook=hook) as manager:
                await manager.update_metadata({"connection_id": "c-1", "a": 1})
            async with AsyncMongoDBSessionManager("s", **options) as later:
                return await later.get_metadata()

    assert asyncio.run(main()) == {"metadata": {"a": 1}}
