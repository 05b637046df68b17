"""Every message is stored once, in order, by one writer: concurrent writers, lost acknowledgements, outages."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pymongo
import pytest
from strands import Agent, tool
from strands.hooks import BeforeModelCallEvent

import interpreter
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    DatabaseError,
    MessageTooLargeError,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    SessionConflictError,
    SessionNotFoundError,
)
from proxy import Proxy, command
from support import agent, alternating, client_of, fail_point, message_ids, sampled, texts, untraced

Stored = pymongo.collection.Collection[dict[str, Any]]
Manager = MongoDBSessionManager | AsyncMongoDBSessionManager

SAVE_ON = pytest.mark.parametrize("save_on", alternating("message", "invocation"))


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}


class Sync:
    """The synchronous manager, as synchronous code uses it."""

    def open(self, factory: MongoDBSessionManagerFactory, session_id: str, **options: Any) -> Manager:
        return factory.create_session_manager(session_id, **options)

    def ask(self, asked: Agent, text: str) -> str:
        return str(asked(text)).strip()

    def sync(self, manager: Manager, synced: Agent) -> None:
        manager.sync_agent(synced)

    def flush(self, manager: Any) -> None:
        manager.flush()

    def close(self, manager: Any) -> None:
        manager.close()


class Async:
    """The asynchronous manager, each call on an event loop of its own."""

    def open(self, factory: MongoDBSessionManagerFactory, session_id: str, **options: Any) -> Manager:
        return asyncio.run(factory.create_session_manager_async(session_id, **options))

    def ask(self, asked: Agent, text: str) -> str:
        return str(asyncio.run(asked.invoke_async(text))).strip()

    def sync(self, manager: Any, synced: Agent) -> None:
        async def run() -> None:
            manager.sync_agent(synced)
            await manager.flush()

        asyncio.run(run())

    def flush(self, manager: Any) -> None:
        asyncio.run(manager.flush())

    def close(self, manager: Any) -> None:
        asyncio.run(manager.close())


Api = Sync | Async


@pytest.fixture(params=alternating(Sync, Async), ids=["sync", "async"])
def api(request: pytest.FixtureRequest) -> Api:
    return request.param()


def conversation(stored: Stored, session_id: str = "s", key: str = "agent") -> list[str]:
    """Return the stored texts after checking that ids are 0..n-1 and that the next one is n."""
    document = stored.find_one({"_id": session_id})
    assert document is not None
    messages = document["agents"][key]["messages"]
    assert message_ids(document, key) == list(range(len(messages)))
    assert document["agents"][key]["next_message_id"] == len(messages)
    return texts(messages)


# Two writers.


@SAVE_ON
def test_of_two_writers_of_an_agent_the_second_is_refused_for_good(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    winners, losers = api.open(factory, "s", save_on=save_on), api.open(factory, "s", save_on=save_on)
    winner, loser = agent(winners, "w1", "w2"), agent(losers, "l1", "l2", "l3", "l4")
    api.ask(winner, "one")
    for text in ("mine", "mine again"):
        with pytest.raises(SessionConflictError):
            api.ask(loser, text)
    assert conversation(stored) == ["one", "w1"]
    api.ask(winner, "two")
    with pytest.raises(SessionConflictError):
        api.ask(loser, "and again")
    assert conversation(stored) == ["one", "w1", "two", "w2"]
    api.close(losers)
    api.close(winners)
    assert conversation(stored) == ["one", "w1", "two", "w2"]


def test_a_writer_that_is_overtaken_between_two_of_its_turns_is_refused(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    loser = agent(api.open(factory, "s"), "l1", "l2")
    api.ask(loser, "one")
    api.ask(agent(api.open(factory, "s"), "w1"), "two")
    with pytest.raises(SessionConflictError):
        api.ask(loser, "three")
    assert conversation(stored) == ["one", "l1", "two", "w1"]
    api.ask(agent(api.open(factory, "s"), "n1"), "new manager")
    assert conversation(stored) == ["one", "l1", "two", "w1", "new manager", "n1"]


def test_a_writer_that_is_overtaken_in_the_middle_of_its_turn_is_refused(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    def overtaken(_: object) -> str:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: agent(factory.create_session_manager("s"), "w1")("two")).result()
        return "never stored"

    loser = agent(api.open(factory, "s"), overtaken)
    with pytest.raises(SessionConflictError):
        api.ask(loser, "one")
    assert conversation(stored) == ["one", "two", "w1"]


def test_a_stale_agent_does_not_overwrite_newer_state(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    losers = api.open(factory, "s")
    loser = agent(losers)
    api.flush(losers)
    winner = agent(api.open(factory, "s"), "w1")
    winner.state.set("colour", "green")
    api.ask(winner, "one")
    loser.state.set("colour", "red")
    for _ in range(2):
        with pytest.raises(SessionConflictError):
            api.sync(losers, loser)
    api.close(losers)
    assert stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]["state"] == {"colour": "green"}
    assert agent(api.open(factory, "s")).state.get("colour") == "green"


def test_leaving_the_context_after_the_caller_was_told_says_nothing_more(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as losers:
        loser = agent(losers, "l1")
        agent(factory.create_session_manager("s"), "w1")("one")
        with pytest.raises(SessionConflictError):
            loser("mine")
    assert conversation(stored) == ["one", "w1"]


@pytest.mark.anyio
async def test_leaving_the_async_context_after_the_caller_was_told_says_nothing_more(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async with await factory.create_session_manager_async("s") as losers:
        loser = agent(losers, "l1")
        await agent(await factory.create_session_manager_async("s"), "w1").invoke_async("one")
        with pytest.raises(SessionConflictError):
            await loser.invoke_async("mine")
    assert conversation(stored) == ["one", "w1"]


@pytest.mark.anyio
async def test_closing_says_what_nobody_was_told(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    losers = await factory.create_session_manager_async("s")
    loser = agent(losers)
    await agent(await factory.create_session_manager_async("s"), "w1").invoke_async("one")
    loser.state.set("colour", "red")
    losers.sync_agent(loser)  # on a running loop: recorded, and refused where nobody waits
    with pytest.raises(SessionConflictError):
        await losers.close()
    await losers.close()
    assert conversation(stored) == ["one", "w1"]


def test_closing_the_synchronous_manager_says_what_nobody_was_told(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    losers = factory.create_session_manager("s")
    loser = agent(losers)
    agent(factory.create_session_manager("s"), "w1")("one")
    loser.state.set("colour", "red")

    async def on_a_loop() -> None:
        losers.sync_agent(loser)

    asyncio.run(on_a_loop())
    with pytest.raises(SessionConflictError):
        losers.close()
    losers.close()
    assert conversation(stored) == ["one", "w1"]


def test_a_refused_agent_does_not_harm_another_of_the_same_manager(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    managers = api.open(factory, "s", save_on="invocation")
    loser, bystander = agent(managers, "l1", agent_id="a"), agent(managers, "b1", "b2", agent_id="b")
    api.ask(agent(api.open(factory, "s"), "w1", agent_id="a"), "one")
    api.ask(bystander, "first")  # the same command carries what is recorded for the loser
    with pytest.raises(SessionConflictError):
        api.ask(loser, "mine")
    api.ask(bystander, "second")
    assert conversation(stored, key="a") == ["one", "w1"]
    assert conversation(stored, key="b") == ["first", "b1", "second", "b2"]


# Two agents.


@pytest.mark.parametrize("managers", alternating(1, 2))
def test_two_agents_take_turns(api: Api, factory: MongoDBSessionManagerFactory, stored: Stored, managers: int) -> None:
    first = api.open(factory, "s")
    second = first if managers == 1 else api.open(factory, "s")
    one, two = agent(first, agent_id="one"), agent(second, agent_id="two")
    for turn in range(3):
        api.ask(one, f"to one {turn}")
        api.ask(two, f"to two {turn}")
        two.state.set("turn", turn)
        api.sync(second, two)
    for key in ("one", "two"):
        assert conversation(stored, key=key)[::2] == [f"to {key} {turn}" for turn in range(3)]
    resumed = api.open(factory, "s")
    assert [len(agent(resumed, agent_id=key).messages) for key in ("one", "two")] == [6, 6]


@pytest.mark.anyio
@SAVE_ON
@pytest.mark.parametrize("managers", alternating(1, 2))
async def test_agents_of_a_session_work_at_the_same_time(
    factory: MongoDBSessionManagerFactory, stored: Stored, managers: int, save_on: str
) -> None:
    opened = [await factory.create_session_manager_async("s", save_on=save_on) for _ in range(managers)]
    agents = [agent(opened[n % managers], agent_id=f"agent-{n}", tools=[add]) for n in range(4)]

    async def talk(talking: Agent) -> None:
        for turn in range(3):
            talking.model.replies.extend([CALL_ADD, f"answer {turn}"])
            await talking.invoke_async(f"turn {turn}")

    await asyncio.gather(*map(talk, agents))
    for n in range(4):
        assert conversation(stored, key=f"agent-{n}") == [
            text for turn in range(3) for text in (f"turn {turn}", "", "", f"answer {turn}")
        ]


@pytest.mark.anyio
async def test_many_sessions_at_once(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async def life(session_id: str) -> None:
        async with await factory.create_session_manager_async(session_id) as created:
            await agent(created, "created").invoke_async(f"{session_id} one")
        async with await factory.create_session_manager_async(session_id) as resumed:
            continued = agent(resumed, CALL_ADD, "resumed", "continued", tools=[add])
            assert texts(continued.messages) == [f"{session_id} one", "created"]
            await continued.invoke_async(f"{session_id} two")
            await continued.invoke_async(f"{session_id} three")

    names = [f"session-{n}" for n in range(8)]
    await asyncio.gather(*map(life, names))
    for name in names:
        assert conversation(stored, name) == [
            f"{name} one", "created", f"{name} two", "", "", "resumed", f"{name} three", "continued",
        ]  # fmt: skip
    assert stored.count_documents({"_id": {"$regex": "^session-"}}) == 8


# Many processes.

PROCESSES = 4

PROGRAM = """
import sys
from mongodb_session_manager import MongoDBSessionManagerFactory
from support import agent

server, database, number = sys.argv[1:]

def wait_for_the_others():
    print("here", flush=True)
    sys.stdin.readline()

with MongoDBSessionManagerFactory(server, database) as factory:
    factory.ping()
    wait_for_the_others()
    with factory.create_session_manager("s") as manager:
        agent(manager, "answer", agent_id=f"agent-{number}")(f"question {number}")
    wait_for_the_others()
    with factory.create_session_manager("t", application_name="app") as manager:
        manager.sync_agent(agent(manager))
        manager.flush()
"""


def test_four_processes_enter_a_new_session_at_once(server: str, database: str, stored: Stored) -> None:
    """Each with an agent of its own, and in the other session all with the same one."""
    processes = [interpreter.start(PROGRAM, server, database, number) for number in range(PROCESSES)]
    for _ in ("s", "t"):
        assert [process.stdout.readline() for process in processes] == ["here\n"] * PROCESSES
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert stored.count_documents({}) == 2
    for number in range(PROCESSES):
        assert conversation(stored, key=f"agent-{number}") == [f"question {number}", "answer"]
    document = stored.find_one({"_id": "t"})
    assert document is not None
    assert document["application_name"] == "app"
    assert list(document["agents"]) == ["agent"]
    assert conversation(stored, "t") == []


def test_an_agent_created_by_two_belongs_to_who_writes_first(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    first, second = api.open(factory, "s"), api.open(factory, "s")
    one, two = agent(first, "mine"), agent(second, "not mine")
    for manager in (first, second, first):
        api.flush(manager)
    api.ask(one, "one")
    with pytest.raises(SessionConflictError):
        api.ask(two, "two")
    assert conversation(stored) == ["one", "mine"]


def test_an_agent_created_by_two_at_the_same_moment(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    managers = [factory.create_session_manager("s") for _ in range(8)]
    agents = [agent(manager, "mine") for manager in managers]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda manager: manager.flush(), managers))

        def ask(asked: Agent) -> str | None:
            try:
                return str(asked(asked.name)).strip()
            except SessionConflictError:
                return None

        answers = list(threads.map(ask, agents))
    assert sorted(answer or "" for answer in answers) == [""] * 7 + ["mine"]
    assert conversation(stored) == [agents[0].name, "mine"]


# A session that is gone.


def test_the_session_of_a_live_agent_is_deleted(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = api.open(factory, "s")
    live = agent(manager, "1", "2", "3")
    api.ask(live, "one")
    stored.delete_one({"_id": "s"})
    for text in ("two", "three"):
        with pytest.raises(SessionNotFoundError):
            api.ask(live, text)
    api.close(manager)
    assert stored.find_one({"_id": "s"}) is None
    api.ask(agent(api.open(factory, "s"), "anew"), "one")
    assert conversation(stored) == ["one", "anew"]


def test_the_session_is_deleted_before_the_state_is_stored(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = api.open(factory, "s")
    live = agent(manager, "1")
    api.ask(live, "one")
    stored.delete_one({"_id": "s"})
    live.state.set("colour", "red")
    with pytest.raises(SessionNotFoundError):
        api.sync(manager, live)
    api.close(manager)
    assert stored.find_one({"_id": "s"}) is None


# What gets lost on the way.


@dataclass
class Site:
    """A server behind a proxy, and a factory that reaches it through the proxy."""

    kind: str
    server: str
    proxy: Proxy
    factory: MongoDBSessionManagerFactory
    stored: Stored


@pytest.fixture(scope="module")
def sites(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Site]]:
    """Return a getter of the site of a server, which is made once."""
    with ExitStack() as stack:

        @functools.cache
        def site(kind: str) -> Site:
            server = request.getfixturevalue(kind)
            driver = stack.enter_context(client_of(server))
            proxy = stack.enter_context(Proxy(server))
            factory = MongoDBSessionManagerFactory(proxy.uri, "test_exactness", serverMonitoringMode="poll")
            stack.enter_context(factory).list_sessions()
            return Site(kind, server, proxy, factory, driver["test_exactness"]["agent_sessions"])

        yield site


@pytest.fixture(params=alternating("server", "standalone"))
def site(request: pytest.FixtureRequest, sites: Callable[[str], Site]) -> Site:
    site = sites(request.param)
    site.proxy.reset()
    site.stored.delete_many({})
    return site


Arm = Callable[[str], None]
"""Have the next command of that name meet its fate."""


def open_new_session(site: Site, arm: Arm) -> list[str]:
    arm("findAndModify")
    agent(site.factory.create_session_manager("s"), "hello")("hi")
    return ["hi", "hello"]


def store_first_message(site: Site, arm: Arm) -> list[str]:
    asked = agent(site.factory.create_session_manager("s"), "hello")
    arm("update")
    asked("hi")
    return ["hi", "hello"]


def store_user_message(site: Site, arm: Arm) -> list[str]:
    asked = agent(site.factory.create_session_manager("s"), "hello", "fine")
    asked("hi")
    arm("update")
    asked("how are you?")
    return ["hi", "hello", "how are you?", "fine"]


def store_final_message(site: Site, arm: Arm) -> list[str]:
    def answer(_: object) -> str:
        arm("update")
        return "hello"

    agent(site.factory.create_session_manager("s"), answer)("hi")
    return ["hi", "hello"]


def store_whole_turn(site: Site, arm: Arm) -> list[str]:
    asked = agent(site.factory.create_session_manager("s", save_on="invocation"), CALL_ADD, "3", tools=[add])
    arm("update")
    asked("1 + 2?")
    return ["1 + 2?", "", "", "3"]


def store_state(site: Site, arm: Arm) -> list[str]:
    manager = site.factory.create_session_manager("s")
    asked = agent(manager, "hello")
    asked("hi")
    asked.state.set("colour", "green")
    arm("update")
    manager.sync_agent(asked)
    assert site.stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]["state"] == {"colour": "green"}
    return ["hi", "hello"]


def store_redaction(site: Site, arm: Arm) -> list[str]:
    manager = site.factory.create_session_manager("s")
    asked = agent(manager, "hello")
    asked("hi")
    arm("findAndModify")
    manager.redact_latest_message({"role": "assistant", "content": [{"text": "[redacted]"}]}, asked)
    return ["hi", "[redacted]"]


def store_redaction_and_message(site: Site, arm: Arm) -> list[str]:
    """Both in one command, as when a redaction waits while an earlier command is under way."""
    manager = site.factory.create_session_manager("s")
    asked = agent(manager, "hello", "fine")
    asked("hi")

    async def turn() -> None:
        manager._unit.update_message("s", "agent", redacted)
        await asked.invoke_async("how are you?")

    redacted = manager._latest_agent_message["agent"]
    redacted.redact_message = {"role": "assistant", "content": [{"text": "[redacted]"}]}
    arm("findAndModify")
    asyncio.run(turn())
    return ["hi", "[redacted]", "how are you?", "fine"]


OPERATIONS = (
    open_new_session,
    store_first_message,
    store_user_message,
    store_final_message,
    store_whole_turn,
    store_state,
    store_redaction,
    store_redaction_and_message,
)


def check(site: Site, expected: list[str]) -> None:
    """The conversation is stored once, and goes on in a new manager."""
    assert conversation(site.stored) == expected
    assert site.stored.count_documents({"_id": "s"}) == 1
    resumed = agent(site.factory.create_session_manager("s"), "bye")
    assert texts(resumed.messages) == expected
    resumed("go on")
    assert conversation(site.stored) == [*expected, "go on", "bye"]


@pytest.mark.parametrize(
    ("operation", "lost", "site"),
    sampled(
        [
            (operation, lost, kind)
            for operation in OPERATIONS
            for lost in ("request", "acknowledgement")
            for kind in ("server", "standalone")
        ],
        *((operation, "acknowledgement", ("server", "standalone")[n % 2]) for n, operation in enumerate(OPERATIONS)),
        *((operation, "request", ("standalone", "server")[n % 2]) for n, operation in enumerate(OPERATIONS[::3])),
    ),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
    indirect=["site"],
)
def test_lost_on_the_way_and_stored_once(site: Site, operation: Callable[[Site, Arm], list[str]], lost: str) -> None:
    drop = site.proxy.drop_before_request if lost == "request" else site.proxy.drop_after_request
    times = 2 if site.kind == "server" else 1  # a replica set's driver repeats a write once, by itself and safely
    expected = operation(site, lambda name: drop(command(name), times))
    assert site.proxy.dropped == times
    check(site, expected)


@contextmanager
def primary_closes_after_write(server: str) -> Iterator[None]:
    """Have the primary apply the next retryable write and close the connection instead of replying."""
    with client_of(server) as client:
        client.admin.command({"configureFailPoint": "onPrimaryTransactionalWrite", "mode": {"times": 1}})
        try:
            yield
        finally:
            ended = client.admin.command({"configureFailPoint": "onPrimaryTransactionalWrite", "mode": "off"})
            assert ended["count"] == 1


@pytest.mark.parametrize("site", ["server"], indirect=True)  # a standalone server knows no retryable writes
def test_the_primary_dies_after_the_write(site: Site) -> None:
    asked = agent(site.factory.create_session_manager("s"), "hello", "fine")
    asked("hi")
    with primary_closes_after_write(site.server):
        asked("how are you?")
    check(site, ["hi", "hello", "how are you?", "fine"])


@pytest.mark.parametrize(
    "failure",
    alternating(
        {"closeConnection": True},
        {"errorCode": 11600, "errorLabels": ["RetryableWriteError"]},
        {"writeConcernError": {"code": 91, "errmsg": "shutting down", "errorLabels": ["RetryableWriteError"]}},
    ),
    ids=["connection closed", "interrupted", "not yet on a majority"],
)
def test_the_server_fails_a_write(site: Site, failure: dict[str, Any]) -> None:
    asked = agent(site.factory.create_session_manager("s"), "hello", "fine")
    asked("hi")
    with fail_point(site.server, failCommands=["update"], times=2, **failure):
        asked("how are you?")
    check(site, ["hi", "hello", "how are you?", "fine"])


# An outage.


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def unreliable(proxy: Proxy, database: str) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory behind the proxy that gives up soon."""
    with MongoDBSessionManagerFactory(proxy.uri, database, serverSelectionTimeoutMS=200) as factory:
        yield factory


def test_several_failed_flushes_and_then_recovery(
    api: Api, proxy: Proxy, unreliable: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = api.open(unreliable, "s")
    asked = agent(manager, "1", "4", tools=[add])
    api.ask(asked, "one")
    proxy.refuse()
    for text in ("two", "three"):
        with pytest.raises(MongoDBSessionError):
            api.ask(asked, text)
    with pytest.raises(MongoDBSessionError):
        api.flush(manager)
    assert conversation(stored) == ["one", "1"]
    proxy.accept()
    api.flush(manager)
    assert conversation(stored) == ["one", "1", "two", "three"]
    api.ask(asked, "four")
    assert conversation(stored) == ["one", "1", "two", "three", "four", "4"]
    api.close(manager)


@pytest.mark.parametrize("reply", alternating(CALL_ADD, "answer"), ids=["at a tool call", "at the end"])
def test_an_outage_in_the_middle_of_a_turn(
    api: Api, proxy: Proxy, unreliable: MongoDBSessionManagerFactory, stored: Stored, reply: dict[str, Any] | str
) -> None:

    def and_then_it_is_down(_: object) -> dict[str, Any] | str:
        proxy.refuse()
        return reply

    manager = api.open(unreliable, "s")
    asked = agent(manager, and_then_it_is_down, "done", tools=[add])
    with pytest.raises(MongoDBSessionError):
        api.ask(asked, "one")
    assert conversation(stored) == ["one"]
    proxy.accept()
    api.flush(manager)
    assert len(conversation(stored)) == 2
    api.ask(asked, "two")
    expected = ["one", "", "", "two", "done"] if reply is CALL_ADD else ["one", "answer", "two", "done"]
    assert conversation(stored) == expected
    api.close(manager)


def test_closing_after_an_outage_stores_what_is_pending(
    proxy: Proxy, unreliable: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with unreliable.create_session_manager("s") as manager:
        asked = agent(manager, "1")
        asked("one")
        proxy.refuse()
        with pytest.raises(MongoDBSessionError):
            asked("two")
        proxy.accept()
    assert conversation(stored) == ["one", "1", "two"]


@pytest.mark.parametrize("first", alternating(True, False), ids=["first turn", "later turn"])
def test_what_a_failed_flush_has_stored_is_not_stored_again(
    api: Api, proxy: Proxy, unreliable: MongoDBSessionManagerFactory, stored: Stored, first: bool
) -> None:
    manager = api.open(unreliable, "s")
    asked = agent(manager, *(["done"] if first else ["1", "done"]))
    if not first:
        api.ask(asked, "zero")
    before = [] if first else ["zero", "1"]
    proxy.refuse_after_request(command("update"))
    for text in ("one", "two"):
        with pytest.raises(MongoDBSessionError):
            api.ask(asked, text)
    assert proxy.dropped == 1
    assert conversation(stored) == [*before, "one"]
    proxy.accept()
    api.flush(manager)
    assert conversation(stored) == [*before, "one", "two"]
    api.ask(asked, "three")
    assert conversation(stored) == [*before, "one", "two", "three", "done"]
    api.close(manager)


@pytest.mark.parametrize("in_place", alternating(True, False), ids=["like Strands", "by another message"])
def test_a_redaction_after_a_flush_that_failed_though_it_stored(
    proxy: Proxy, unreliable: MongoDBSessionManagerFactory, stored: Stored, in_place: bool
) -> None:
    manager = unreliable.create_session_manager("s")
    asked = agent(manager, "done")
    proxy.refuse_after_request(command("update"))
    with pytest.raises(MongoDBSessionError):
        asked("secret")
    proxy.accept()
    redacted = asked.messages[-1] if in_place else {"role": "user"}
    manager.redact_latest_message(redacted | {"content": [{"text": "[redacted]"}]}, asked)
    assert conversation(stored) == ["[redacted]"]
    asked("go on")
    assert conversation(stored) == ["[redacted]", "go on", "done"]


def test_metrics_of_a_turn_that_failed_though_it_was_stored(
    proxy: Proxy, unreliable: MongoDBSessionManagerFactory, stored: Stored
) -> None:

    def and_then_the_server_dies(_: object) -> dict[str, Any]:
        proxy.refuse_after_request(command("update"))
        return CALL_ADD

    manager = unreliable.create_session_manager("s")
    with pytest.raises(MongoDBSessionError):
        agent(manager, and_then_the_server_dies, tools=[add])("1 + 2?")
    proxy.accept()
    manager.flush()
    assert conversation(stored) == ["1 + 2?", ""]
    messages = stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]
    assert ["cycle_metrics" in message.get("event_loop_metrics", {}) for message in messages] == [False, True]


# A message that no document can hold.


@SAVE_ON
def test_a_message_too_large_to_store_harms_no_other_agent(
    api: Api, factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    manager = api.open(factory, "s", save_on=save_on)
    talkative, other = agent(manager, "1", agent_id="talkative"), agent(manager, "1", "2", agent_id="other")
    with untraced(), pytest.raises(MessageTooLargeError):
        api.ask(talkative, "a" * 17 * 2**20)
    for text in ("one", "two"):
        api.ask(other, text)
    assert conversation(stored, key="other") == ["one", "1", "two", "2"]


def test_a_failed_flush_reaches_the_caller_as_our_error_even_if_the_next_one_succeeds(
    server: str, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = factory.create_session_manager("s")
    calling = agent(manager, CALL_ADD, "done", tools=[add])
    fail = {"failCommands": ["update"], "errorCode": 8000}

    def fail_the_tool_call(event: BeforeModelCallEvent) -> None:
        failing.enter_context(fail_point(server, **fail))

    calling.hooks.add_callback(BeforeModelCallEvent, fail_the_tool_call)
    with ExitStack() as failing, pytest.raises(DatabaseError):
        calling("hi")
    assert texts(stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]) == ["hi", ""]
