"""Many callers at once: without a server, with slow commands, and with a small pool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient

from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    MongoDBSessionManagerFactory,
)
from proxy import Proxy
from support import CommandLog, eventually, fail_point

pytestmark = pytest.mark.anyio


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


async def outcome(awaitable: Any) -> Any:
    try:
        return await awaitable
    except Exception as error:
        return error


# Without a server.


@pytest.mark.parametrize("borrows", [False, True])
async def test_without_a_server_each_of_many_callers_is_told_in_its_own_time(
    proxy: Proxy, database: str, borrows: bool
) -> None:
    """In the driver's threads they would wait by the dozen: the last one for 30 s on two cores."""
    proxy.refuse()
    options = {"serverSelectionTimeoutMS": 500}
    client: Any = AsyncIOMotorClient(proxy.uri, **options) if borrows else None
    factory = (
        MongoDBSessionManagerFactory(client=client, database_name=database)
        if borrows
        else MongoDBSessionManagerFactory(proxy.uri, database, **options)
    )
    async with factory:
        callers = [outcome(factory.create_session_manager_async(f"s{number}")) for number in range(200)]
        outcomes = await asyncio.wait_for(asyncio.gather(*callers), 12)
        with pytest.raises(DatabaseUnavailableError, match=r"no usable MongoDB server: .*127\.0\.0\.1"):
            await factory.ping_async()
    assert {type(each) for each in outcomes} == {DatabaseUnavailableError}
    if borrows:
        client.close()


def test_without_a_server_threads_are_told_in_their_own_time_too(proxy: Proxy, database: str) -> None:
    proxy.refuse()
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            factory.create_session_manager(f"s{number}")
        except DatabaseUnavailableError as error:
            errors.append(error)

    with MongoDBSessionManagerFactory(proxy.uri, database, serverSelectionTimeoutMS=1000) as factory:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(errors) == 100, 8)
        for thread in threads:
            thread.join()


async def test_a_server_that_goes_away_under_many_callers(proxy: Proxy, database: str) -> None:
    async with MongoDBSessionManagerFactory(proxy.uri, database, serverSelectionTimeoutMS=500) as factory:
        managers = [await factory.create_session_manager_async(f"s{number}") for number in range(3)]
        proxy.refuse()
        proxy.cut()
        callers = [outcome(managers[number % 3].get_metadata()) for number in range(200)]
        outcomes = await asyncio.wait_for(asyncio.gather(*callers), 12)
    assert {type(each) for each in outcomes} == {DatabaseUnavailableError}


async def test_a_server_that_comes_back_is_found_at_once(proxy: Proxy, database: str) -> None:
    """Left alone, the driver would look again every 10 s."""
    async with MongoDBSessionManagerFactory(proxy.uri, database) as factory:
        proxy.refuse()
        callers = [asyncio.create_task(factory.create_session_manager_async(f"s{number}")) for number in range(20)]
        await asyncio.sleep(0.5)
        proxy.accept()
        await asyncio.wait_for(asyncio.gather(*callers), 6)


async def test_a_caller_that_waits_for_a_server_can_be_cancelled(proxy: Proxy, database: str) -> None:
    proxy.refuse()
    async with AsyncMongoDBSessionRepository(proxy.uri, database) as repository:
        waiting = [asyncio.create_task(repository.read_session("s")) for _ in range(20)]
        await asyncio.sleep(0.3)
        for task in waiting[1:]:
            task.cancel()
        await asyncio.wait(waiting[1:], timeout=5)
        assert [task.cancelled() for task in waiting] == [False] + [True] * 19
        proxy.accept()
        assert await asyncio.wait_for(waiting[0], 6) is None


async def test_waiting_for_a_server_sends_nothing_more(proxy: Proxy, database: str, commands: CommandLog) -> None:
    async with MongoDBSessionManagerFactory(proxy.uri, database, event_listeners=[commands]) as factory:
        manager = await factory.create_session_manager_async("s")
        await asyncio.to_thread(commands.wait_for, "createIndexes")  # at this address
        proxy.refuse()
        proxy.cut()
        commands.clear()
        reading = asyncio.create_task(manager.get_metadata())
        await asyncio.sleep(0.5)
        proxy.accept()
        await asyncio.wait_for(reading, 10)
    assert set(commands.names) - {"createIndexes"} == {"find"}


# With slow commands.


@pytest.mark.parametrize("size", [100, 4])
async def test_a_health_check_waits_behind_no_other_command(server: str, database: str, size: int) -> None:
    log = CommandLog()
    options: dict[str, Any] = {} if size == 100 else {"maxPoolSize": size}
    under_way, queued = size - 1, 10
    milliseconds = 5000 if size == 100 else 2000  # so many commands begin one after the other
    async with MongoDBSessionManagerFactory(server, database, event_listeners=[log], **options) as factory:
        manager = await factory.create_session_manager_async("s")
        log.clear()
        with fail_point(server, failCommands=["find"], times=under_way, blockConnection=True, blockTimeMS=milliseconds):
            slow = [asyncio.create_task(manager.get_metadata()) for _ in range(under_way + queued)]
            await asyncio.to_thread(eventually, lambda: len(log.names) == under_way)
            await factory.ping_async()
            stats = await asyncio.to_thread(factory.get_connection_stats)
            assert (stats["status"], stats["wait_queue"]) == ("connected", queued)
            assert len(log.names) == under_way
            assert not any(task.done() for task in slow)
            await asyncio.gather(*slow)


async def test_no_more_commands_are_under_way_than_the_pool_holds(server: str, database: str) -> None:
    log = CommandLog()
    client: Any = AsyncIOMotorClient(server, maxPoolSize=3, event_listeners=[log])
    factories = [MongoDBSessionManagerFactory(client=client, database_name=database) for _ in range(2)]
    managers = [await factory.create_session_manager_async("s") for factory in factories]
    log.clear()
    with fail_point(server, failCommands=["find"], times=3, blockConnection=True, blockTimeMS=1500):
        slow = [asyncio.create_task(managers[number % 2].get_metadata()) for number in range(20)]
        await asyncio.to_thread(eventually, lambda: len(log.names) == 3)
        await asyncio.sleep(0.5)
        assert len(log.names) == 3
        await asyncio.gather(*slow)
    assert len(log.names) == 20
    for factory in factories:
        await factory.close_async()
    client.close()


async def test_who_leaves_the_queue_holds_nobody_up(server: str, database: str) -> None:
    log = CommandLog()
    options: dict[str, Any] = {"maxPoolSize": 1, "event_listeners": [log]}
    async with AsyncMongoDBSessionRepository(server, database, **options) as repository:
        await repository.open_session("s")
        log.clear()
        with fail_point(server, failCommands=["find"], blockConnection=True, blockTimeMS=1000):
            first = asyncio.create_task(repository.read_session("s"))
            await asyncio.to_thread(log.wait_for, "find")
            queue = [asyncio.create_task(repository.read_session("s")) for _ in range(10)]
            await asyncio.sleep(0.1)
            for task in queue[:9]:
                task.cancel()
            assert await first is not None
            assert await asyncio.wait_for(queue[9], 5) is not None
            assert await asyncio.wait_for(repository.read_session("s"), 5) is not None


async def test_who_waits_too_long_in_the_queue_is_told_so_and_holds_nobody_up(server: str, database: str) -> None:
    log = CommandLog()
    options: dict[str, Any] = {"maxPoolSize": 1, "waitQueueTimeoutMS": 300, "event_listeners": [log]}
    async with AsyncMongoDBSessionRepository(server, database, **options) as repository:
        await repository.open_session("s")
        log.clear()
        with fail_point(server, failCommands=["find"], blockConnection=True, blockTimeMS=1500):
            first = asyncio.create_task(repository.read_session("s"))
            await asyncio.to_thread(log.wait_for, "find")
            outcomes = await asyncio.gather(*(outcome(repository.read_session("s")) for _ in range(5)))
            assert {type(each) for each in outcomes} == {DatabaseTimeoutError}
            assert await first is not None
            assert await repository.read_session("s") is not None
