"""Several hooks on one manager."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from arrivals import Queue
from endpoint import Endpoint
from mongodb_session_manager import (
    ConfigurationError,
    MongoDBSessionManagerFactory,
    chain_hooks,
    create_metadata_sqs_hook,
    create_metadata_websocket_hook,
)


def plain(name: str, seen: list[str]) -> Any:
    def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        seen.append(f"{name} {action} {session_id}")
        if "metadata" not in argument:
            return original_func(**argument)
        return original_func({**argument["metadata"], name: len(seen)})

    return hook


def awaited(name: str, seen: list[str]) -> Any:
    async def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        seen.append(f"{name} {action} {session_id}")
        if "metadata" not in argument:
            return await original_func(**argument)
        return await original_func(metadata={**argument["metadata"], name: len(seen)})

    return hook


@pytest.mark.parametrize("kinds", [(plain, plain), (awaited, awaited), (plain, awaited), (awaited, plain)])
def test_each_sees_what_the_one_before_made_of_it(factory: MongoDBSessionManagerFactory, kinds: Any) -> None:
    seen: list[str] = []
    chain = chain_hooks(kinds[0]("first", seen), None, kinds[1]("second", seen))
    with factory.create_session_manager("s", metadata_hook=chain) as manager:
        manager.update_metadata({"n": 0})
        assert manager.get_metadata() == {"metadata": {"n": 0, "first": 1, "second": 2}}
        manager.delete_metadata(["n"])
    assert [entry.partition(" ")[0] for entry in seen] == ["first", "second"] * 3
    assert [entry.split()[1] for entry in seen[::2]] == ["update", "get", "delete"]


@pytest.mark.parametrize("kinds", [(plain, plain), (awaited, awaited), (plain, awaited), (awaited, plain)])
@pytest.mark.anyio
async def test_on_an_async_manager(factory: MongoDBSessionManagerFactory, kinds: Any) -> None:
    seen: list[str] = []
    chain = chain_hooks(kinds[0]("first", seen), kinds[1]("second", seen))
    async with await factory.create_session_manager_async("s", metadata_hook=chain) as manager:
        await manager.update_metadata({"n": 0})
        assert await manager.get_metadata() == {"metadata": {"n": 0, "first": 1, "second": 2}}


def test_plain_hooks_stay_on_the_thread_of_the_caller(factory: MongoDBSessionManagerFactory) -> None:
    threads: list[threading.Thread] = []

    def hook(original_func: Any, action: str, session_id: str, **argument: Any) -> Any:
        threads.append(threading.current_thread())
        return original_func(**argument)

    with factory.create_session_manager("s", metadata_hook=chain_hooks(hook, hook)) as manager:
        manager.update_metadata({"n": 0})
    assert threads == [threading.current_thread()] * 2


def test_an_empty_chain_is_no_hook(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s", metadata_hook=chain_hooks()) as manager:
        manager.update_metadata({"n": 0})
        assert manager.get_metadata() == {"metadata": {"n": 0}}


def test_an_error_reaches_the_caller(factory: MongoDBSessionManagerFactory) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not you")

    chain = chain_hooks(awaited("first", []), refuse)
    with factory.create_session_manager("s", metadata_hook=chain) as manager:
        with pytest.raises(PermissionError, match="not you"):
            manager.update_metadata({"n": 0})
        manager_without = factory.create_session_manager("s")
        assert manager_without.get_metadata() == {"metadata": {}}


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        chain_hooks("hook")  # type: ignore[arg-type]


def test_two_aws_hooks(
    factory: MongoDBSessionManagerFactory, commands: Any, moto: str, endpoint: Endpoint, queue: Queue
) -> None:
    endpoint.answers(200)
    chain = chain_hooks(
        create_metadata_sqs_hook(queue.url, ["status"], endpoint_url=moto),
        create_metadata_websocket_hook(endpoint.url),
    )
    with factory.create_session_manager("s", metadata_hook=chain) as manager:
        commands.clear()
        manager.update_metadata({"connection_id": "c-1", "status": "busy"})
        assert commands.names == ["findAndModify"]
    assert [message.metadata for message in queue.arrived()] == [{"status": "busy"}]
    assert len(endpoint.requests) == 1
