"""Machines whose clocks are wrong: what several of them compare is dated by the server's clock."""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, monitoring

import interpreter
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from mongodb_session_manager._io import clock as _clock
from proxy import Proxy
from support import agent, alternating

Documents = pymongo.collection.Collection[dict[str, Any]]

HOUR = 3600.0
NEAR = timedelta(minutes=1)


SERVES = """
import base64, pickle, sys, time, traceback
right, seconds = time.time, float(sys.argv[1])
time.time = lambda: right() + seconds
for line in sys.stdin:
    function, arguments = pickle.loads(base64.b64decode(line))
    try:
        function(*arguments)
        print("done", flush=True)
    except BaseException:
        print(repr(traceback.format_exc()), flush=True)
"""


class Machine:
    """A process whose clock is wrong by so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._process = interpreter.start(SERVES, seconds)

    def run(self, function: Callable[..., None], *args: Any) -> None:
        self._process.stdin.write(base64.b64encode(pickle.dumps((function, args))).decode() + "\n")
        self._process.stdin.flush()
        assert (answer := self._process.stdout.readline()) == "done\n", answer

    def close(self) -> None:
        _, errors = self._process.communicate()
        assert self._process.returncode == 0, errors


@pytest.fixture(scope="module")
def behind() -> Iterator[Machine]:
    machine = Machine(-HOUR)
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def ahead() -> Iterator[Machine]:
    machine = Machine(HOUR)
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def right() -> Iterator[Machine]:
    machine = Machine(0)
    yield machine
    machine.close()


@contextmanager
def repository_of(uri: str, database: str, borrows: bool) -> Iterator[MongoDBSessionRepository]:
    with (
        pymongo.MongoClient[Any](uri) if borrows else nullcontext() as client,
        MongoDBSessionRepository(None if borrows else uri, database, client=client) as repository,
    ):
        yield repository


def open_session(uri: str, database: str, session_id: str, borrows: bool = False) -> None:
    with pymongo.MongoClient[Any](uri) if borrows else nullcontext() as client:
        MongoDBSessionManager(session_id, None if borrows else uri, database, client=client).close()


def take_turn(uri: str, database: str, session_id: str, borrows: bool = False) -> None:
    with (
        pymongo.MongoClient[Any](uri) if borrows else nullcontext() as client,
        MongoDBSessionManager(session_id, None if borrows else uri, database, client=client) as manager,
    ):
        agent(manager, "hello")("hi")


def set_metadata(uri: str, database: str, session_id: str, borrows: bool = False) -> None:
    with repository_of(uri, database, borrows) as repository:
        repository.update_metadata(session_id, {"a": 1})


def delete_metadata(uri: str, database: str, session_id: str, borrows: bool = False) -> None:
    with repository_of(uri, database, borrows) as repository:
        repository.delete_metadata(session_id, ["a"])


def give_feedback(uri: str, database: str, session_id: str, borrows: bool = False, comment: str = "fine") -> None:
    with repository_of(uri, database, borrows) as repository:
        repository.add_feedback(session_id, {"comment": comment})


def configure(uri: str, database: str, session_id: str, borrows: bool = False) -> None:
    with repository_of(uri, database, borrows) as repository:
        repository.update_agent_config(session_id, "agent", model="m")


WRITES = [open_session, take_turn, set_metadata, delete_metadata, give_feedback, configure]


@pytest.mark.parametrize("borrows", alternating(False, True))
def test_every_date_of_a_session_is_the_servers_whatever_the_machine_says(
    behind: Machine, ahead: Machine, server: str, database: str, stored: Documents, borrows: bool
) -> None:
    take_turn(server, database, "s")
    for machine, borrows_there in ((behind, borrows), (ahead, not borrows)):
        for write in WRITES:
            machine.run(write, server, database, "s", borrows_there)
            updated_at = stored.find_one({"_id": "s"})["updated_at"]
            assert abs(updated_at - datetime.now(UTC)) < NEAR, write.__name__
        machine.run(open_session, server, database, "new", borrows_there)
        assert abs(stored.find_one_and_delete({"_id": "new"})["created_at"] - datetime.now(UTC)) < NEAR


def test_sessions_are_listed_in_the_order_of_their_last_turns_on_machines_with_wrong_clocks(
    behind: Machine, right: Machine, ahead: Machine, server: str, database: str
) -> None:
    machines = [ahead, behind, right]
    written = []
    for number in range(6):
        machines[number % 3].run(take_turn, server, database, f"s{number}")
        written.append(f"s{number}")
        time.sleep(0.3)  # more than a round trip on a busy machine: a clock is read no more precisely than that
    with MongoDBSessionManagerFactory(server, database) as factory:
        cursor = None
        listed: list[str] = []
        while True:
            page = factory.list_sessions(order="updated_at", limit=2, cursor=cursor)
            listed += [session.session_id for session in page.sessions]
            if len(listed) == 4:  # what is written now comes later, and not twice
                behind.run(take_turn, server, database, "late")
                written.append("late")
            cursor = page.next_cursor
            if cursor is None:
                break
        assert listed == written
        newest = factory.list_sessions(order="-created_at").sessions
        assert [session.session_id for session in newest] == written[::-1]
        assert factory.list_sessions(updated_after=datetime.now(UTC) + NEAR).sessions == ()


def test_feedback_from_machines_with_wrong_clocks_is_in_order(
    behind: Machine, ahead: Machine, server: str, database: str
) -> None:
    open_session(server, database, "s")
    for number, machine in enumerate([ahead, behind, ahead, behind]):
        machine.run(give_feedback, server, database, "s", False, str(number))
    with MongoDBSessionRepository(server, database) as repository:
        given = repository.get_feedbacks("s")
    dates = [entry["created_at"] for entry in given]
    assert [entry["comment"] for entry in given] == ["0", "1", "2", "3"]
    assert dates == sorted(dates)
    assert abs(dates[0] - datetime.now(UTC)) < NEAR


class HelloLog(monitoring.CommandListener):
    """The `hello` commands that were sent other than to connect."""

    def __init__(self) -> None:
        self.hellos = 0
        self.first: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.first.append(event.command_name)
        self.hellos += event.command_name == "hello"

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def test_an_owned_client_sends_no_command_for_the_servers_clock(server: str, database: str) -> None:
    log = HelloLog()
    with MongoDBSessionManager("s", server, database, event_listeners=[log]) as manager:
        agent(manager, "hello")("hi")
    assert log.hellos == 0


def test_a_borrowed_client_asks_for_the_servers_clock_once_and_before_anything_else(server: str, database: str) -> None:
    log = HelloLog()
    with pymongo.MongoClient[Any](server, event_listeners=[log]) as client:
        for number in range(3):
            with MongoDBSessionManager(f"s{number}", client=client, database_name=database) as manager:
                agent(manager, "hello")("hi")
    assert log.hellos == 1
    assert log.first[0] == "hello"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "driver_class", [AsyncIOMotorClient, pytest.param(AsyncMongoClient, marks=pytest.mark.may_block)]
)
async def test_a_borrowed_client_of_either_driver_dates_by_the_servers_clock(
    driver_class: Any, server: str, database: str, monkeypatch: pytest.MonkeyPatch, stored: Documents
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - HOUR)
    client = driver_class(server)
    async with AsyncMongoDBSessionRepository(client=client, database_name=database) as repository:
        await repository.open_session("s")
    assert abs(stored.find_one({"_id": "s"})["created_at"].timestamp() - right()) < 60
    if (closing := client.close()) is not None:
        await closing


@pytest.mark.parametrize("borrows", [False, True])
def test_a_clock_that_is_set_while_a_process_runs_changes_no_date(
    server: str, database: str, stored: Documents, monkeypatch: pytest.MonkeyPatch, borrows: bool
) -> None:
    right = time.time
    open_session(server, database, "s")
    with repository_of(server, database, borrows) as repository:
        for seconds in (0, -HOUR, HOUR):
            monkeypatch.setattr(time, "time", lambda seconds=seconds: right() + seconds)
            repository.add_feedback("s", {"at": seconds})
        dates = [entry["created_at"] for entry in repository.get_feedbacks("s")]
    assert dates == sorted(dates)
    assert all(abs(date.timestamp() - right()) < 60 for date in dates)


def test_a_borrowed_client_whose_connections_were_cut_asks_for_the_servers_clock_again(
    server: str, database: str, stored: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - HOUR)
    with Proxy(server) as proxy, pymongo.MongoClient[Any](proxy.uri) as client:
        client.admin.command("ping")
        proxy.cut()
        MongoDBSessionManager("s", client=client, database_name=database).close()
    assert abs(stored.find_one({"_id": "s"})["created_at"].timestamp() - right()) < 60


def test_the_servers_clock_is_read_again_each_hour_while_commands_go_on(
    server: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = HelloLog()
    with (
        pymongo.MongoClient[Any](server, event_listeners=[log]) as client,
        MongoDBSessionRepository(client=client, database_name=database) as repository,
    ):
        repository.session_exists("s")
        monkeypatch.setattr(_clock, "_FRESH", 0.0)
        repository.session_exists("s")
    assert log.hellos == 2


# Sessions that expire.


def live_for_half_an_hour(uri: str, database: str, session_id: str, borrows: bool) -> None:
    options: Any = {"session_ttl": timedelta(minutes=30), "max_embedded_messages": 4, "max_inline_attachment_bytes": 99}
    with (
        pymongo.MongoClient[Any](uri) if borrows else nullcontext() as client,
        MongoDBSessionManagerFactory(None if borrows else uri, database, client=client, **options) as factory,
    ):
        live = agent(factory.create_session_manager(session_id), "one", "two", "three")
        for text in ("1", "2", "3"):
            live([{"text": text}, {"document": {"format": "txt", "name": text, "source": {"bytes": b"x" * 200}}}])


@pytest.mark.parametrize("borrows", alternating(False, True), ids=["own client", "borrowed client"])
@pytest.mark.parametrize("wrong", alternating("behind", "ahead"))
def test_a_session_lives_as_long_as_it_should(
    request: pytest.FixtureRequest, server: str, database: str, stored: Documents, wrong: str, borrows: bool
) -> None:
    begin = datetime.now(UTC)
    request.getfixturevalue(wrong).run(live_for_half_an_hour, server, database, "s", borrows)
    date = stored.find_one({"_id": "s"})["expires_at"]
    assert begin + timedelta(minutes=30) - NEAR < date < datetime.now(UTC) + timedelta(minutes=34) + NEAR
    for name in ("archive", "attachments.files", "attachments.chunks"):
        parts = list(stored.database[f"agent_sessions_{name}"].find({}, {"expires_at": 1}))
        assert parts
        assert all(date <= part["expires_at"] < date + timedelta(minutes=40) for part in parts)
