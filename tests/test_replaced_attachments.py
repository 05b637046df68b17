"""Attachments while messages are replaced, redacted, read and refused: none is lost, and none is left behind."""

from __future__ import annotations

import functools
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from pymongo import monitoring
from strands.types.session import Session, SessionAgent, SessionType

import interpreter
from fix_archive import documents_of, emptied, store_again
from fix_attachments import (
    CHUNKS,
    LARGE,
    Driver,
    asking,
    content,
    hashes,
    ids,
    image,
    of,
    redacted,
    restored,
    said,
)
from mongodb_session_manager import (
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
    SessionNotFoundError,
)
from proxy import Proxy, command
from support import agent, alternating, client_of, eventually, run_random, sampled

OPTIONS: dict[str, Any] = {"max_inline_attachment_bytes": 1000, "max_embedded_messages": 4}
ARCHIVED, IN_HEAD = 0, 6
"""Messages of the session that `long` begins, each with an attachment."""


def picture(seed: int) -> bytes:
    return content(2000, seed)


def begin(repository: MongoDBSessionRepository) -> None:
    repository.create_session(Session("s", SessionType.AGENT))
    repository.create_agent("s", SessionAgent("agent", {}, {}))


@pytest.fixture(scope="module")
def repository(server: str, shared_database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, shared_database, **OPTIONS) as repository:
        yield repository


def fill(repository: MongoDBSessionRepository, *with_pictures: int) -> None:
    """Begin a session of 7 messages, of which the older ones are archived."""
    begin(repository)
    for message_id in range(7):
        blocks = [image(picture(message_id))] if message_id in with_pictures else []
        repository.create_message("s", "agent", said(*blocks, message_id=message_id))
    eventually(lambda: not repository._async._connection._tasks)


@pytest.fixture(scope="module")
def prepared(repository: MongoDBSessionRepository, driver: Driver, shared_database: str) -> dict[str, list[Any]]:
    """The documents of the session that `long` begins with, by collection."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    fill(repository, ARCHIVED, 1, IN_HEAD)
    assert stored.find_one()["agents"]["agent"].get("archived", 0) > 1
    documents = documents_of(stored)
    repository.delete_session("s")
    return documents


@pytest.fixture
def long(repository: MongoDBSessionRepository, prepared: dict[str, list[Any]], stored: Any) -> MongoDBSessionRepository:
    """A repository with a session of 7 messages, of which the older ones are archived."""
    store_again(stored, prepared)
    return repository


def removed_lists(stored: Any) -> list[Any]:
    """What documents list as still to be removed."""
    condition = {"removed_attachments.0": {"$exists": True}}
    return [*stored.find(condition), *stored.database["agent_sessions_archive"].find(condition)]


# One message gets an attachment while another one loses its own.


class At(monitoring.CommandListener):
    """Does something once, before the `number`th command that follows the storing of a file."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self.left, self.action, self.is_stored = number, action, False

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if not self.is_stored:
            self.is_stored = event.command.get("insert", "").endswith(".files")
            return
        self.left -= 1
        if self.left == 0:
            self.action()

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.mark.may_block  # the listener waits for another repository
@pytest.mark.parametrize("other", [1, IN_HEAD], ids=["archived", "in the head"])
@pytest.mark.parametrize("number", sampled(range(1, 8), 1, *run_random().sample(range(2, 8), 2)))
def test_an_archived_message_keeps_its_new_attachment_while_another_one_is_replaced(
    long: MongoDBSessionRepository, server: str, database: str, driver: Driver, stored: Any, number: int, other: int
) -> None:
    at = At(number, lambda: long.update_message("s", "agent", said(image(picture(21)), message_id=other)))
    with MongoDBSessionRepository(server, database, event_listeners=[at], **OPTIONS) as repository:
        repository.update_message("s", "agent", said(image(picture(20)), message_id=ARCHIVED))
    assert at.left <= 0
    for message_id, seed in ((ARCHIVED, 20), (other, 21)):
        found = long.read_message("s", "agent", message_id)
        assert found.message["content"][1] == image(picture(seed))
    (kept,) = {0, 1, 6} - {ARCHIVED, other}
    assert hashes(driver, database) == of(picture(20), picture(21), picture(kept))
    assert removed_lists(stored) == []


@pytest.mark.timeout(600)
def test_two_writers_of_attachments_again_and_again(
    request: pytest.FixtureRequest,
    long: MongoDBSessionRepository,
    server: str,
    database: str,
    driver: Driver,
    stored: Any,
) -> None:
    barrier = threading.Barrier(2)

    def update(repository: MongoDBSessionRepository, message_id: int, seed: int) -> None:
        barrier.wait(60)
        repository.update_message("s", "agent", said(image(picture(seed)), message_id=message_id))

    with MongoDBSessionRepository(server, database, **OPTIONS) as second, ThreadPoolExecutor(2) as threads:
        rounds = 300 if request.config.getoption("--full-adversity") else 10
        for number in range(rounds):
            other = (1, IN_HEAD)[number % 2]
            seeds = {ARCHIVED: 1000 + number, other: 2000 + number}
            work = zip((long, second), seeds.items(), strict=True)
            for future in [threads.submit(update, repository, *one) for repository, one in work]:
                future.result()
            for message_id, seed in seeds.items():
                found = long.read_message("s", "agent", message_id)
                assert found.message["content"][1] == image(picture(seed))
    assert hashes(driver, database) == of(picture(999 + rounds), picture(1998 + rounds), picture(1999 + rounds))
    assert removed_lists(stored) == []


# Reading while messages are redacted.


READS: dict[str, Callable[[MongoDBSessionRepository], list[Any]]] = {
    "open_session": lambda of: [each["message"] for each in of.open_session("s")["agents"]["agent"]["messages"]],
    "list_messages": lambda of: [each.message for each in of.list_messages("s", "agent")],
    "read_message": lambda of: [of.read_message("s", "agent", each).message for each in (ARCHIVED, 1, IN_HEAD)],
}


class BeforeChunks(monitoring.CommandListener):
    """Does something before each of the first reads of chunks."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if self.actions and event.command.get("find", "").endswith(".chunks"):
            self.actions.pop(0)()

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.mark.may_block  # the listener waits for another repository
@pytest.mark.parametrize("message_id", alternating(ARCHIVED, IN_HEAD), ids=["archived", "in the head"])
@pytest.mark.parametrize("read", alternating(*READS))
def test_a_message_that_is_replaced_after_it_was_read_is_read_again(
    long: MongoDBSessionRepository, server: str, database: str, read: str, message_id: int
) -> None:
    """Twice, because other attachments are then missing when it is read again."""
    replaced = [said(image(picture(seed)), message_id=message_id) for seed in (20, 21)]
    at = BeforeChunks(*(partial(long.update_message, "s", "agent", each) for each in replaced))
    with MongoDBSessionRepository(server, database, event_listeners=[at], **OPTIONS) as repository:
        found = READS[read](repository)
    assert at.actions == []
    assert replaced[1].message in found


@pytest.mark.timeout(600)
def test_reading_while_messages_are_redacted_as_fast_as_possible(
    request: pytest.FixtureRequest, long: MongoDBSessionRepository, server: str, database: str
) -> None:
    stop, times = threading.Event(), {ARCHIVED: 0, 1: 0, IN_HEAD: 0}

    def redact(message_id: int) -> None:
        with MongoDBSessionRepository(server, database, **OPTIONS) as repository:
            while not stop.is_set():
                times[message_id] += 1
                repository.update_message("s", "agent", said(image(picture(times[message_id])), message_id=message_id))
                repository.update_message("s", "agent", redacted(message_id))

    with ThreadPoolExecutor(3) as threads:
        redacting = [threads.submit(redact, message_id) for message_id in times]
        try:
            rounds = 900 if request.config.getoption("--full-adversity") else 12
            reads = itertools.cycle(READS.values())
            for _ in itertools.takewhile(lambda n: n < rounds or min(times.values()) < 5, itertools.count()):
                assert next(reads)(long)
        finally:
            stop.set()
        for future in redacting:
            future.result()


# Refused.


def test_the_attachments_of_a_writer_who_came_too_late_are_removed(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    first, second = (agent(factory.create_session_manager("s"), "1", "2") for _ in range(2))
    first(asking(image(LARGE)))
    with pytest.raises(SessionConflictError):
        second(asking(image(content(300_000, 7))))
    assert hashes(driver, database) == of(LARGE)


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "deleted and created again"])
def test_the_attachments_of_a_writer_whose_session_was_deleted_are_removed(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str, again: bool
) -> None:
    live = agent(factory.create_session_manager("s"), "1", "2")
    live("hello")
    assert factory.delete_session("s")
    if again:
        agent(factory.create_session_manager("s"), "1")(asking(image(LARGE)))
    with pytest.raises(SessionNotFoundError):
        live(asking(image(content(300_000, 7))))
    assert hashes(driver, database) == (of(LARGE) if again else [])
    if again:
        assert restored(factory)[0][1] == asking(image(LARGE))


def test_the_repository_leaves_no_attachment_of_a_refused_message(
    long: MongoDBSessionRepository, driver: Driver, database: str
) -> None:
    before = hashes(driver, database)
    for message_id in (3, 8):
        with pytest.raises(SessionConflictError):
            long.create_message("s", "agent", said(image(picture(30)), message_id=message_id))
    assert hashes(driver, database) == before


# Interrupted.

KILLED = """
import os, signal, sys
from pymongo import monitoring
from fix_attachments import redacted
from mongodb_session_manager import MongoDBSessionRepository

class Kill(monitoring.CommandListener):
    def started(self, event):
        if event.command_name == "delete" and event.command["delete"].endswith(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    def succeeded(self, event): pass
    def failed(self, event): pass

options = {"max_inline_attachment_bytes": 1000, "max_embedded_messages": 4}
with MongoDBSessionRepository(sys.argv[1], sys.argv[2], event_listeners=[Kill()], **options) as repository:
    repository.update_message("s", "agent", redacted(int(sys.argv[4])))
"""


def redact_and_be_killed(server: str, database: str, at: str, message_id: int) -> None:
    """Redact a message in a process that is killed before its first command `delete` of a collection."""
    with interpreter.start(KILLED, server, database, at, message_id) as process:
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize("at", alternating(".chunks", ".files"))
@pytest.mark.parametrize("message_id", alternating(ARCHIVED, IN_HEAD), ids=["archived", "in the head"])
def test_what_a_killed_process_had_to_remove_is_removed_by_the_next_opening(
    long: MongoDBSessionRepository,
    server: str,
    database: str,
    driver: Driver,
    stored: Any,
    at: str,
    message_id: int,
) -> None:
    redact_and_be_killed(server, database, at, message_id)
    assert len(ids(driver, database, CHUNKS)) == 3
    assert long.read_message("s", "agent", message_id).to_message() == redacted().to_message()
    long.open_session("s")
    eventually(lambda: not long._async._connection._tasks)
    kept = {0, 1, 6} - {message_id}
    assert hashes(driver, database) == of(*map(picture, kept))
    assert "removed_attachments" not in stored.find_one()


def test_a_redaction_that_is_repeated_removes_what_a_killed_process_had_to_remove(
    long: MongoDBSessionRepository, server: str, database: str, driver: Driver, stored: Any
) -> None:
    redact_and_be_killed(server, database, ".files", ARCHIVED)
    long.update_message("s", "agent", redacted(ARCHIVED))
    assert hashes(driver, database) == of(picture(1), picture(6))
    long.open_session("s")
    eventually(lambda: removed_lists(stored) == [])


@dataclass
class Site:
    """A server behind a proxy, and a repository that reaches it through the proxy."""

    proxy: Proxy
    repository: MongoDBSessionRepository
    stored: Any


@pytest.fixture(scope="module")
def sites(request: pytest.FixtureRequest, shared_database: str) -> Iterator[Callable[[str], Site]]:
    """Return a getter of the site of a server, which is made once."""
    with ExitStack() as stack:

        @functools.cache
        def site(where: str) -> Site:
            uri = request.getfixturevalue(where)
            stored = stack.enter_context(client_of(uri))[shared_database]["agent_sessions"]
            proxy = stack.enter_context(Proxy(uri))
            repository = MongoDBSessionRepository(proxy.uri, shared_database, serverMonitoringMode="poll", **OPTIONS)
            stack.enter_context(repository).list_sessions()
            return Site(proxy, repository, stored)

        yield site


@pytest.mark.parametrize("message_id", alternating(ARCHIVED, IN_HEAD), ids=["archived", "in the head"])
@pytest.mark.parametrize("lost", alternating("request", "acknowledgement"))
@pytest.mark.parametrize("where", alternating("server", "standalone"))
def test_a_replaced_message_keeps_its_attachment_when_a_reply_is_lost(
    sites: Callable[[str], Site], prepared: dict[str, list[Any]], database: str, message_id: int, lost: str, where: str
) -> None:
    """A statement that is sent again replaces what it has stored itself."""
    site = sites(where)
    site.proxy.reset()
    store_again(emptied(site.stored), prepared)
    drop = site.proxy.drop_before_request if lost == "request" else site.proxy.drop_after_request
    drop(command("findAndModify"), 1 if where == "standalone" else 2)
    site.repository.update_message("s", "agent", said(image(picture(20)), message_id=message_id))
    assert site.proxy.dropped > 0
    found = site.repository.read_message("s", "agent", message_id)
    assert found.message["content"][1] == image(picture(20))
    kept = {0, 1, 6} - {message_id}
    assert hashes(site.stored.database.client, database) == of(picture(20), *map(picture, kept))
    assert removed_lists(site.stored) == []
