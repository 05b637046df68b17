"""One turn at a time: waiting managers are served in order, and a manager that has gone blocks no other."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from strands.agent import _continuation
from strands.hooks import AfterInvocationEvent, HookProvider, HookRegistry

import interpreter
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    DatabaseError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    SessionBusyError,
    SessionClosedError,
    SessionConflictError,
    SessionNotFoundError,
)
from mongodb_session_manager._store.lease import Lease
from mongodb_session_manager._store.lease_queue import of_connections
from mongodb_session_manager._store.opening import Opening
from orchestrators import node, pipeline, team
from support import Paused, agent, alternating, eventually, message_ids, texts

pytestmark = pytest.mark.anyio

Stored = pymongo.collection.Collection[dict[str, Any]]


@pytest.fixture(scope="module")
def factories() -> Iterator[list[MongoDBSessionManagerFactory]]:
    """The factories of `waiting`; only the last one can be open."""
    factories: list[MongoDBSessionManagerFactory] = []
    yield factories
    for factory in factories:
        factory.close()


@pytest.fixture
def waiting(
    server: str, database: str, factories: list[MongoDBSessionManagerFactory]
) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory whose managers wait; shared by the tests that do not close it, each with new counters."""
    if not factories or factories[-1]._connection.closed:
        factories.append(MongoDBSessionManagerFactory(server, database, on_busy="wait"))
    factory, connection = factories[-1], factories[-1]._connection
    yield factory
    if (leases := of_connections.pop(connection, None)) is not None and not connection.closed:
        connection.portal.call(leases.close)
    eventually(lambda: not connection._tasks and not connection._operations)  # before the next test begins


async def begin_turn(
    manager: AsyncMongoDBSessionManager | MongoDBSessionManager, text: str = "first", reply: str = "one"
) -> tuple[Paused, asyncio.Task[Any]]:
    """Begin a turn, up to the call of its model, which has not answered."""
    model = Paused([reply])
    live = agent(manager)
    live.model = model
    turn = asyncio.create_task(live.invoke_async(text))
    await asyncio.wait({turn, asyncio.create_task(model.asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert model.asked.is_set()
    return model, turn


async def happens(condition: Callable[[], object], seconds: float = 30.0, pause: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        await asyncio.sleep(pause)


def waits(factory: MongoDBSessionManagerFactory) -> int:
    """Return the number of managers that have waited or are waiting."""
    leases = of_connections.get(factory._connection)
    if leases is None:
        return 0
    return leases.waits + sum(waiter.has_slept for queue in leases.queues.values() for waiter in queue.waiters)


def lease_of(stored: Stored) -> dict[str, Any]:
    document = stored.find_one({"_id": "s"})
    assert document is not None
    found: dict[str, Any] = document.get("lease", {})
    return found


async def is_renewed(stored: Stored) -> None:
    """Wait until a manager renews its lease."""
    until = lease_of(stored)["until"]
    await happens(lambda: lease_of(stored)["until"] > until, pause=0.1)


def take_lease(stored: Stored, seconds: float) -> None:
    """Store a lease of another process."""
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    stored.update_one(
        {"_id": "s"}, {"$set": {"lease": {"token": ObjectId(), "until": until, "fence": 99}}}, upsert=True
    )


async def request(factory: MongoDBSessionManagerFactory, text: str, reply: str, **options: Any) -> list[str]:
    """Serve one request; return the conversation that its model received."""
    async with factory.create_session_manager_async("s", **options) as manager:
        live = agent(manager, reply)
        await live.invoke_async(text)
        return texts(live.model.calls[0])


# The second request.


async def test_the_second_request_sees_the_answer_of_the_first(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    second = asyncio.create_task(request(waiting, "second", "two"))
    await happens(lambda: waits(waiting))
    assert not second.done()
    model.go.set()
    await turn
    assert await second == ["first", "one", "second"]
    assert lease_of(stored).keys() == {"fence", "line"} or lease_of(stored).keys() == {"fence"}


async def test_waiters_are_served_in_the_order_they_came(waiting: MongoDBSessionManagerFactory) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    others = []
    for number in range(5):
        others.append(asyncio.create_task(request(waiting, f"q{number}", f"a{number}")))
        await happens(lambda: waits(waiting) == number + 1)  # noqa: B023
    model.go.set()
    await turn
    last = (await asyncio.gather(*others))[-1]
    assert last == ["first", "one", *(f"{kind}{n}" for n in range(4) for kind in "qa"), "q4"]


def test_two_threads(waiting: MongoDBSessionManagerFactory) -> None:
    heard: dict[str, list[str]] = {}

    def ask(name: str) -> None:
        with waiting.create_session_manager("s") as manager:
            live = agent(manager, f"answer to {name}")
            live(name)
            heard[name] = texts(live.model.calls[0])

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(len, heard.values())) == [1, 3, 5]


async def test_a_refused_request_sends_nothing_to_a_model(factory: MongoDBSessionManagerFactory) -> None:
    options: dict[str, Any] = {"on_busy": "refuse"}
    model, turn = await begin_turn(await factory.create_session_manager_async("s", **options))
    with pytest.raises(SessionBusyError, match="'s' is busy") as raised:
        await factory.create_session_manager_async("s", **options)
    assert isinstance(raised.value, SessionConflictError)
    assert isinstance(raised.value, TimeoutError)
    with pytest.raises(SessionBusyError):
        await asyncio.to_thread(factory.create_session_manager, "s", on_busy="refuse")
    model.go.set()
    await turn
    assert await request(factory, "second", "two", **options) == ["first", "one", "second"]


async def test_waiting_ends_after_busy_timeout(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    for seconds in (0, 0.05):
        with pytest.raises(SessionBusyError, match=f"after {seconds:g} s"):
            await waiting.create_session_manager_async("s", busy_timeout=seconds)
    model.go.set()
    await turn
    assert await request(waiting, "second", "two") == ["first", "one", "second"]
    stats = await waiting.get_connection_stats_async()
    assert stats["lease_waits"] == 1  # a timeout of 0 counts as no wait
    assert stats["lease_wait_seconds"] > 0


async def test_a_manager_without_a_lease_is_not_refused(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    first = await waiting.create_session_manager_async("s")
    model, turn = await begin_turn(first)
    model.go.set()
    await turn
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"), "third", "three")
    assert await request(waiting, "beside", "ok", on_busy="conflict") == ["first", "one", "third", "beside"]
    model.go.set()
    with pytest.raises(SessionConflictError, match="another writer"):
        await turn


# Further turns and other writes.


async def test_a_further_turn_takes_the_lease_again(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async with waiting.create_session_manager_async("s") as manager:
        live = agent(manager, "one", "two")
        await live.invoke_async("first")
        assert "token" not in lease_of(stored)
        live.model = model = Paused(["two"])
        turn = asyncio.create_task(live.invoke_async("second"))
        await model.asked.wait()
        assert lease_of(stored)["fence"] == 2
        with pytest.raises(SessionBusyError):
            await waiting.create_session_manager_async("s", on_busy="refuse")
        model.go.set()
        await turn
    assert await request(waiting, "third", "three") == ["first", "one", "second", "two", "third"]


@pytest.mark.parametrize("on_busy", alternating("wait", "refuse"))
@pytest.mark.parametrize("save_on", alternating("message", "overlap"))
async def test_a_further_turn_of_a_busy_session_sends_nothing_to_a_model(
    factory: MongoDBSessionManagerFactory, stored: Stored, on_busy: str, save_on: str
) -> None:
    manager = await factory.create_session_manager_async("s", on_busy=on_busy, busy_timeout=0.05, save_on=save_on)
    live = agent(manager, "one", "two")
    await live.invoke_async("first")
    take_lease(stored, 60)
    with pytest.raises(SessionBusyError):
        await live.invoke_async("second")
    assert len(live.model.calls) == 1
    assert texts(stored.find_one({})["agents"]["agent"]["messages"]) == ["first", "one"]
    await manager.close()


@pytest.mark.parametrize("save_on", ["message", "overlap"])
async def test_a_further_turn_after_that_of_another_sends_nothing_to_a_model(
    waiting: MongoDBSessionManagerFactory, stored: Stored, save_on: Any
) -> None:
    manager = await waiting.create_session_manager_async("s", save_on=save_on)
    live = agent(manager, "one", "two")
    await live.invoke_async("first")
    await request(waiting, "beside", "ok")
    with pytest.raises(SessionConflictError, match="another writer"):
        await live.invoke_async("second")
    assert len(live.model.calls) == 1
    await manager.close()
    assert "token" not in lease_of(stored)


class Again(HookProvider):
    """A hook that makes the agent continue once."""

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(AfterInvocationEvent, self._continue)

    def _continue(self, event: AfterInvocationEvent) -> None:
        if len(event.agent.messages) == 2:
            event.resume = "and then?"


async def test_an_agent_that_continues_keeps_its_turn(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async def ask(number: int) -> None:
        async with waiting.create_session_manager_async("s") as manager:
            await agent(manager, "one", "two", hooks=[Again()]).invoke_async(f"q{number}")

    await asyncio.gather(ask(0), ask(1))
    said = texts(stored.find_one({})["agents"]["agent"]["messages"])
    assert said[1:4] == ["one", "and then?", "two"]
    assert len(said) == 6
    assert lease_of(stored)["fence"] == 2


async def test_a_further_turn_waits_for_its_turn(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async with waiting.create_session_manager_async("s") as manager:
        live = agent(manager, "one", "two")
        await live.invoke_async("first")
        take_lease(stored, 60)
        turn = asyncio.create_task(live.invoke_async("second"))
        await happens(lambda: waits(waiting))
        stored.update_one({}, {"$unset": {"lease.token": "", "lease.until": ""}})
        await turn
        assert message_ids(stored.find_one({})) == [0, 1, 2, 3]
        assert "token" not in lease_of(stored)


async def test_state_that_is_stored_after_the_turn(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async with waiting.create_session_manager_async("s") as manager:
        live = agent(manager, "one")
        await live.invoke_async("first")
        live.state.set("seen", 1)
        manager.sync_agent(live)
        await manager.flush()
        assert stored.find_one({})["agents"]["agent"]["agent_data"]["state"] == {"seen": 1}
        assert "token" not in lease_of(stored)
        take_lease(stored, 60)
        live.state.set("seen", 2)
        manager.sync_agent(live)
        flush = asyncio.create_task(manager.flush())
        await happens(lambda: waits(waiting))
        assert stored.find_one({})["agents"]["agent"]["agent_data"]["state"] == {"seen": 1}
        stored.update_one({}, {"$unset": {"lease.token": "", "lease.until": ""}})
        await flush
        assert stored.find_one({})["agents"]["agent"]["agent_data"]["state"] == {"seen": 2}


class Stamp(HookProvider):
    """A hook that changes the agent's state after the turn."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(AfterInvocationEvent, self._stamp)

    async def _stamp(self, event: AfterInvocationEvent) -> None:
        await asyncio.sleep(0.05)
        if self.fail:
            raise ValueError("the hook failed")
        event.agent.state.set("stamped", True)


async def test_changes_by_a_hook_at_the_end_belong_to_the_turn(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async def ask(number: int) -> None:
        async with waiting.create_session_manager_async("s") as manager:
            await agent(manager, f"a{number}", hooks=[Stamp()]).invoke_async(f"q{number}")

    await asyncio.gather(*map(ask, range(4)))
    assert message_ids(stored.find_one({})) == list(range(8))
    assert stored.find_one({})["agents"]["agent"]["agent_data"]["state"] == {"stamped": True}


async def test_a_hook_that_fails_at_the_end_holds_nobody_up_for_long(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await waiting.create_session_manager_async("s", lease=0.5)
    with pytest.raises(ValueError, match="the hook failed"):
        await agent(manager, "one", hooks=[Stamp(fail=True)]).invoke_async("first")
    assert await request(waiting, "second", "two") == ["first", "one", "second"]


@pytest.mark.may_block
@pytest.mark.parametrize("kind", ["graph", "swarm"])
async def test_orchestrators_take_turns(waiting: MongoDBSessionManagerFactory, stored: Stored, kind: str) -> None:
    async def run() -> None:
        async with waiting.create_session_manager_async("s") as manager:
            nodes = node("a", "done"), node("b", "done")
            multi_agent = pipeline(manager, *nodes) if kind == "graph" else team(manager, nodes[0])
            result = await multi_agent.invoke_async("go")
            assert result.status.value == "completed"

    await asyncio.gather(run(), run())
    assert "token" not in lease_of(stored)


def test_state_that_waited_leaves_the_session_free(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    with waiting.create_session_manager("s") as manager:
        live = agent(manager, "one")
        live("first")
        take_lease(stored, 60)
        live.state.set("seen", 1)
        storing = threading.Thread(target=manager.sync_agent, args=(live,))
        storing.start()
        eventually(lambda: waits(waiting))
        stored.update_one({}, {"$unset": {"lease.token": "", "lease.until": ""}})
        storing.join(60)
        assert stored.find_one({})["agents"]["agent"]["agent_data"]["state"] == {"seen": 1}
        assert "token" not in lease_of(stored)


async def test_a_turn_after_a_reload_keeps_its_lease_while_the_model_answers(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async with waiting.create_session_manager_async("s", save_on="invocation", lease=2.0) as manager:
        live = agent(manager, "one")
        await live.invoke_async("first")
        await manager.reload()
        await asyncio.sleep(0.8)  # after the time of a renewal, but the lease is not renewed between two turns
        live.model = model = Paused(["two"])
        turn = asyncio.create_task(live.invoke_async("second"))
        await model.asked.wait()
        await is_renewed(stored)
        with pytest.raises(SessionBusyError):
            await waiting.create_session_manager_async("s", on_busy="refuse")
        model.go.set()
        await turn


async def test_a_turn_long_after_a_reload_does_not_trust_its_lease(waiting: MongoDBSessionManagerFactory) -> None:
    async with waiting.create_session_manager_async("s", save_on="overlap", lease=0.3) as manager:
        live = agent(manager, "one", "two")
        await live.invoke_async("first")
        await manager.reload()
        await asyncio.sleep(0.4)
        await request(waiting, "beside", "ok")
        with pytest.raises(SessionConflictError):
            await live.invoke_async("second")
        assert len(live.model.calls) == 1


async def test_a_further_turn_that_is_cancelled_while_it_waits_ends_at_once(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await waiting.create_session_manager_async("s", busy_timeout=60)
    live = agent(manager, "one", "two")
    await live.invoke_async("first")
    take_lease(stored, 60)
    turn = asyncio.create_task(live.invoke_async("second"))
    await happens(lambda: waits(waiting))
    turn.cancel()
    await asyncio.wait({turn}, timeout=30)
    assert turn.cancelled()
    assert len(live.model.calls) == 1
    stored.update_one({}, {"$unset": {"lease.token": "", "lease.until": ""}})
    assert await request(waiting, "third", "three") == ["first", "one", "third"]
    with suppress(SessionBusyError):
        await manager.close()
    assert "token" not in lease_of(stored)


@pytest.mark.parametrize("on_busy", ["wait", "refuse"])
async def test_a_further_turn_without_a_message_sends_nothing_to_a_model_while_the_session_is_busy(
    factory: MongoDBSessionManagerFactory, stored: Stored, on_busy: Any
) -> None:
    manager = await factory.create_session_manager_async("s", on_busy=on_busy, busy_timeout=0.05)
    live = agent(manager, "one", "two")
    await live.invoke_async("first")
    take_lease(stored, 60)
    with pytest.raises(SessionBusyError):
        await live.invoke_async(None)
    assert len(live.model.calls) == 1
    stored.update_one({}, {"$unset": {"lease.token": "", "lease.until": ""}})
    await live.invoke_async(None)
    assert "token" not in lease_of(stored)
    await manager.close()
    await happens(lambda: not lease_of(stored).get("line"))


class Told(HookProvider):
    """Makes the agent continue once, as the background tasks of Strands do."""

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(AfterInvocationEvent, self._continue)

    def _continue(self, event: AfterInvocationEvent) -> None:
        if len(event.agent.messages) == 2:
            _continuation.add_input(event, _continuation._ContinuationInput(args="the task is done"))


async def test_an_agent_that_a_background_task_continues_keeps_its_turn(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async def ask(number: int) -> None:
        async with waiting.create_session_manager_async("s") as manager:
            await agent(manager, "one", "two", hooks=[Told()]).invoke_async(f"q{number}")

    await asyncio.gather(ask(0), ask(1))
    assert texts(stored.find_one({})["agents"]["agent"]["messages"])[1:4] == ["one", "the task is done", "two"]
    assert lease_of(stored)["fence"] == 2


@pytest.mark.may_block
@pytest.mark.parametrize("kind", ["graph", "swarm"])
async def test_a_further_run_of_an_orchestrator_sends_nothing_to_a_model_while_the_session_is_busy(
    waiting: MongoDBSessionManagerFactory, stored: Stored, kind: str
) -> None:
    manager = await waiting.create_session_manager_async("s", busy_timeout=0.05)
    only = node("a", "done", "done", "done")
    multi_agent = pipeline(manager, only) if kind == "graph" else team(manager, only)
    await multi_agent.invoke_async("go")
    take_lease(stored, 60)
    with pytest.raises(SessionBusyError):
        await multi_agent.invoke_async("again")
    assert len(only.model.calls) == 1
    stored.update_one({}, {"$unset": {"lease.token": "", "lease.until": ""}})
    await multi_agent.invoke_async("again")
    assert "token" not in lease_of(stored)
    await manager.close()


# Managers that do not release their lease.


async def test_a_manager_that_does_nothing_keeps_its_lease(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await waiting.create_session_manager_async("s", lease=2.0)
    await is_renewed(stored)
    model, turn = await begin_turn(manager)
    await is_renewed(stored)
    with pytest.raises(SessionBusyError):
        await waiting.create_session_manager_async("s", on_busy="refuse")
    model.go.set()
    await turn


async def test_a_late_write_of_a_manager_that_lost_its_turn_is_refused(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    stored.update_one({}, {"$set": {"lease.until": datetime.now(UTC) - timedelta(seconds=1)}})
    uri = waiting._connection.settings.connection_string
    async with MongoDBSessionManagerFactory(uri, stored.database.name, on_busy="wait") as other:
        assert await request(other, "second", "two") == ["first", "second"]
    model.go.set()
    with pytest.raises(SessionConflictError, match="has lost its turn"):
        await turn
    assert texts(stored.find_one({})["agents"]["agent"]["messages"]) == ["first", "second", "two"]
    assert (await waiting.get_connection_stats_async())["leases_lost"] == 1


async def test_a_late_write_is_stored_if_no_other_manager_has_taken_the_lease(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    stored.update_one({}, {"$set": {"lease.until": datetime.now(UTC) - timedelta(seconds=1)}})
    model.go.set()
    await turn
    assert await request(waiting, "second", "two") == ["first", "one", "second"]


async def test_a_state_of_a_manager_that_lost_its_turn_is_refused(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await waiting.create_session_manager_async("s")
    live = agent(manager)
    await manager.flush()
    take_lease(stored, -1)
    live.state.set("seen", 1)
    manager.sync_agent(live)
    with pytest.raises(SessionConflictError, match="has lost its turn"):
        await manager.flush()


async def test_a_manager_that_was_collected_does_not_hold_its_lease(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async def abandon() -> None:
        manager = await waiting.create_session_manager_async("s")
        agent(manager, "one")

    await abandon()
    await happens(lambda: gc.collect() >= 0 and "token" not in lease_of(stored))


async def test_closing_releases_the_lease(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = await waiting.create_session_manager_async("s")
    await manager.close()
    assert "token" not in lease_of(stored)
    await asyncio.to_thread(lambda: waiting.create_session_manager("s").close())
    assert "token" not in lease_of(stored)


async def test_a_caller_that_is_cancelled_leaves_nothing_behind(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    opening = asyncio.ensure_future(waiting.create_session_manager_async("s"))
    await happens(lambda: waits(waiting) == 1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    gone = asyncio.create_task(request(waiting, "never", "sent"))
    await happens(lambda: waits(waiting) == 2)
    gone.cancel()
    last = asyncio.create_task(request(waiting, "last", "two"))
    await happens(lambda: waits(waiting) == 3)
    model.go.set()
    await turn
    assert await last == ["first", "one", "last"]
    await happens(lambda: "token" not in lease_of(stored))


async def test_an_opening_of_unknown_outcome_does_not_release_the_lease_of_the_next(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    lease = Lease(waiting._async._store, "s", True, 30.0, 30.0)

    async def open_twice() -> None:
        opening = Opening(waiting._async._store)
        lease.give_up()  # simulates that the reply to a first opening was lost
        await opening.open("s", lease)
        await asyncio.sleep(0.2)

    await waiting._connection.portal.run(open_twice)
    assert "token" in lease_of(stored)


async def test_cancelled_at_any_moment(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    for number in range(20):
        opening = asyncio.create_task(request(waiting, "q", "a"))
        await asyncio.sleep(number / 2000)
        opening.cancel()
        await asyncio.wait({opening})
    assert (await request(waiting, "last", "two"))[-1] == "last"
    await happens(lambda: "token" not in lease_of(stored))


async def test_closing_the_factory_ends_the_wait(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    take_lease(stored, 60)
    opening = asyncio.create_task(request(waiting, "never", "sent"))
    await happens(lambda: waits(waiting))
    await asyncio.wait_for(waiting.close_async(), 10)
    with pytest.raises(SessionClosedError, match="busy, and the connection was closed"):
        await opening


async def test_closing_the_factory_releases_the_leases_of_its_managers(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await waiting.create_session_manager_async("s")
    await waiting.close_async()
    assert "token" not in lease_of(stored)
    del manager


def test_a_lease_of_an_application(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    waiting.create_session_manager("s").close()
    stored.update_one({}, {"$set": {"lease": None}})
    waiting.create_session_manager("s").close()
    stored.update_one({}, {"$set": {"lease": "until June"}})
    with pytest.raises(DatabaseError, match=r"'s'.*'lease'"):
        waiting.create_session_manager("s")
    waiting.create_session_manager("s", on_busy="conflict").close()
    assert stored.find_one({})["lease"] == "until June"


def test_a_copy_has_no_lease(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = waiting.create_session_manager("s")
    agent(manager, "one")("first")
    stored.update_one({}, {"$set": {"lease.token": ObjectId()}})
    waiting.fork_session("s", "copy")
    assert "lease" not in stored.find_one({"_id": "copy"})


# Other processes.

PROCESS = """
import asyncio, sys, threading, time
from mongodb_session_manager import MongoDBSessionManagerFactory
from support import agent

uri, database, lease, name = sys.argv[1:5]
factory = MongoDBSessionManagerFactory(uri, database, on_busy="wait", lease=float(lease))

def say(*words):
    print(*words, flush=True)
"""

HOLDER = f"""{PROCESS}
manager = factory.create_session_manager("s")
live = agent(manager, lambda _: say("asked") or input() or "late")
try:
    live("from the holder")
except Exception as error:
    say(type(error).__name__, error)
"""

ASKER = f"""{PROCESS}
factory.ping()
say("ready")
input()
for number in range(5):
    with factory.create_session_manager("s") as manager:
        agent(manager, name)(f"{{name}}{{number}}")
"""


@pytest.fixture
def holder(server: str, database: str) -> Iterator[interpreter.Process]:
    with interpreter.start(HOLDER, server, database, 1.0, "holder") as process:
        assert process.stdout.readline() == "asked\n"
        yield process


async def test_a_holder_that_is_killed(
    holder: interpreter.Process, waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    holder.kill()
    assert await request(waiting, "next", "one") == ["from the holder", "next"]
    assert message_ids(stored.find_one({})) == [0, 1, 2]


async def test_a_holder_that_is_frozen(
    holder: interpreter.Process, waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    assert await request(waiting, "next", "one") == ["from the holder", "next"]
    os.kill(holder.pid, signal.SIGCONT)
    holder.stdin.write("\n")
    shown, errors = await asyncio.to_thread(holder.communicate)
    assert shown.startswith("SessionConflictError") or shown.startswith("EventLoopException"), (shown, errors)
    assert "has lost its turn" in shown
    assert texts(stored.find_one({})["agents"]["agent"]["messages"]) == ["from the holder", "next", "one"]


def test_waiters_of_several_processes_take_turns(
    server: str, database: str, waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    names = ("a", "b", "c")
    processes = [interpreter.start(ASKER, server, database, 30, name) for name in names]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        first = waiting.create_session_manager("s")
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        eventually(lambda: len(lease_of(stored).get("line", [])) == 3)
        first.close()
        for process in processes:
            shown, errors = process.communicate()
            assert process.returncode == 0, (shown, errors)
    finally:
        for process in processes:
            process.kill()
    messages = stored.find_one({})["agents"]["agent"]["messages"]
    served = [text[0] for text in texts(messages)[::2]]
    assert sorted(served) == sorted(5 * names)
    assert sorted(served[:3]) == list(names)  # each one was in the line
    runs = [len(list(run)) for _, run in itertools.groupby(served)]
    assert max(runs) < 5  # none has all of its turns while the others wait


def test_a_forked_child_holds_nothing(server: str, database: str, stored: Stored) -> None:
    script = f"""{PROCESS}
import os
manager = factory.create_session_manager("s")
live = agent(manager, "one")
if (child := os.fork()) == 0:
    del manager, live
    import gc
    gc.collect()
    sys.exit(0)
os.waitpid(child, 0)
live("first")
say("done")
"""
    shown, _ = interpreter.run(script, server, database, 30, "parent", warnings=(interpreter.FORK_WARNING,))
    assert shown == "done\n"
    assert "token" not in lease_of(stored)


def test_a_process_that_ends_releases_its_leases(server: str, database: str, stored: Stored) -> None:
    script = f"""{PROCESS}
manager = factory.create_session_manager("s")
say("done")
"""
    interpreter.run(script, server, database, 30, "process")
    assert lease_of(stored)["fence"] == 1
    assert "token" not in lease_of(stored)


@pytest.mark.may_block
def test_a_holder_whose_event_loop_has_ended(server: str, database: str, stored: Stored) -> None:
    async def hold() -> Any:
        client: Any = pymongo.AsyncMongoClient(server)
        factory = MongoDBSessionManagerFactory(client=client, database_name=database, on_busy="wait", lease=0.5)
        manager = await factory.create_session_manager_async("s")
        await begin_turn(manager)
        await client.close()
        return manager

    holder = asyncio.run(hold())
    with (
        MongoDBSessionManagerFactory(server, database, on_busy="wait") as factory,
        factory.create_session_manager("s") as manager,
    ):
        assert texts(agent(manager).messages) == ["first"]
    del holder


def test_turns_on_a_standalone_server(standalone: str, database: str) -> None:
    with MongoDBSessionManagerFactory(standalone, database, on_busy="wait") as factory:

        def ask(name: str) -> None:
            with factory.create_session_manager("turns") as manager:
                agent(manager, "answer")(name)

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        with factory.create_session_manager("turns") as manager:
            assert len(agent(manager).messages) == 8


# Expired and deleted sessions.


@pytest.mark.parametrize("on_busy", ["wait", "refuse"])
def test_an_expired_session_is_not_busy(factory: MongoDBSessionManagerFactory, stored: Stored, on_busy: Any) -> None:
    options: dict[str, Any] = {"on_busy": on_busy, "session_ttl": timedelta(hours=1)}
    manager = factory.create_session_manager("s", **options)
    agent(manager, "one")("first")
    take_lease(stored, 60)
    stored.update_one({}, {"$set": {"expires_at": datetime.now(UTC) - timedelta(hours=1)}})
    with factory.create_session_manager("s", **options) as manager:
        assert agent(manager).messages == []


async def test_a_session_that_is_deleted_is_not_busy(waiting: MongoDBSessionManagerFactory, stored: Stored) -> None:
    model, turn = await begin_turn(await waiting.create_session_manager_async("s"))
    await waiting.delete_session_async("s")
    model.go.set()
    with pytest.raises(SessionNotFoundError):
        await turn
    assert await request(waiting, "second", "two") == ["second"]


async def test_a_reload_of_a_session_that_was_created_again_does_not_keep_it(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await waiting.create_session_manager_async("s")
    await agent(manager, "one").invoke_async("first")
    await waiting.delete_session_async("s")
    await request(waiting, "second", "two")
    with pytest.raises(SessionNotFoundError, match="created again"):
        await manager.reload()
    assert "token" not in lease_of(stored)


async def test_who_waits_for_a_session_that_is_deleted_gets_a_new_one(
    waiting: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    take_lease(stored, 60)
    opening = asyncio.create_task(request(waiting, "next", "one"))
    await happens(lambda: waits(waiting))
    await waiting.delete_session_async("s")
    assert await opening == ["next"]
