"""Whose session it is: what another user can find out about a session, and do to it, which is nothing."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from fix_archive import appends, documents_of, emptied, said, store_again
from fix_copying import content, left_of, with_image
from fix_finding import Stored, idle, session
from mongodb_session_manager import (
    AccessDeniedError,
    AsyncMongoDBSessionRepository,
    ConfigurationError,
    InvalidArgumentError,
    MongoDBConnectionPool,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionBusyError,
    SessionExistsError,
    SessionNotFoundError,
    StateTooLargeError,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
)
from orchestrators import node, pipeline
from support import CommandLog, agent, alternating, apply, eventually, fail_point, sampled, texts

pytestmark = pytest.mark.anyio

Driver = pymongo.MongoClient[dict[str, Any]]

THEIRS, ABSENT = "theirs", "absent"


def a_message() -> SessionMessage:
    return SessionMessage({"role": "user", "content": [{"text": "hi"}]}, 0)


def an_agent() -> SessionAgent:
    return SessionAgent("agent", {"stolen": True}, {})


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "open_session": lambda: {"must_exist": True},
    "read_session": dict,
    "delete_session": dict,
    "create_agent": lambda: {"session_agent": SessionAgent("new", {}, {})},
    "read_agent": lambda: {"agent_id": "agent"},
    "update_agent": lambda: {"session_agent": an_agent()},
    "create_message": lambda: {"agent_id": "agent", "session_message": said(12)},
    "read_message": lambda: {"agent_id": "agent", "message_id": 1},
    "update_message": lambda: {"agent_id": "agent", "session_message": a_message()},
    "list_messages": lambda: {"agent_id": "agent"},
    "create_multi_agent": lambda: {"multi_agent": pipeline(None, node("one"))},
    "read_multi_agent": lambda: {"multi_agent_id": "pipeline"},
    "update_multi_agent": lambda: {"multi_agent": pipeline(None, node("one"))},
    "update_metadata": lambda: {"metadata": {"a.b": 1}},
    "get_metadata": dict,
    "delete_metadata": lambda: {"keys": ["a.b"]},
    "add_feedback": lambda: {"feedback": {"rating": "down"}},
    "get_application_name": dict,
    "get_feedbacks": dict,
    "get_agent_config": lambda: {"agent_id": "agent"},
    "list_agents": dict,
    "update_agent_config": lambda: {"agent_id": "agent", "model": "other"},
    "get_message_count": lambda: {"agent_id": "agent"},
    "get_usage": dict,
    "update_session": lambda: {"title": "mine", "tags": None},
    "claim_session": dict,
    "get_session_summary": dict,
    "session_exists": dict,
    "export_session": dict,
    "fork_session": lambda: {"new_id": "fork"},
    "rewind_session": lambda: {"at_message": 3, "keep_as": "kept"},
    "write_back": dict,
    "create_session_manager": lambda: {"must_exist": True},
}
"""The arguments of each method that takes the id of a session, besides the session and the owner."""

CREATES = {"import_session"}
"""A new id cannot be that of another session, and the error says so."""

EXPIRING = {"session_ttl": timedelta(hours=1)}

CLASSES = [MongoDBSessionRepository, AsyncMongoDBSessionRepository, MongoDBSessionManagerFactory]


def methods_of(cls: type) -> list[str]:
    """The public methods that take the id of a session."""
    return [
        name
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") and "session_id" in inspect.signature(method).parameters
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_method_that_takes_the_id_of_a_session_takes_an_owner(cls: type) -> None:
    """A new method needs one, too, and an entry in `ARGUMENTS`: then the tests below cover it."""
    found = methods_of(cls)
    assert {name.removesuffix("_async") for name in found} <= ARGUMENTS.keys() | CREATES
    without = {name for name in found if "owner" not in inspect.signature(getattr(cls, name)).parameters}
    assert without == {name for name in found if name.startswith("create_session_manager")}  # it is one of its options


def with_content(repository: MongoDBSessionRepository) -> None:
    """Give a session everything that a session can have."""
    repository.open_session(THEIRS, owner="bob")
    repository.create_agent(THEIRS, SessionAgent("agent", {"secret": 1}, {}))
    apply(repository, THEIRS, appends(range(11)))
    repository.create_message(THEIRS, "agent", with_image(11, content(4096)))
    repository.create_multi_agent(THEIRS, pipeline(None, node("one")))
    repository.update_metadata(THEIRS, {"a": {"b": "secret"}})
    repository.add_feedback(THEIRS, {"rating": "up"})
    repository.update_agent_config(THEIRS, "agent", model="secret")
    repository.update_session(THEIRS, title="secret", tags=["secret"])


@pytest.fixture(scope="module")
def documents(server: str, shared_database: str, driver: Driver) -> dict[str, dict[str, list[Any]]]:
    """The documents of the session, by collection: of one that lasts, and of one that expires."""
    stored, found = emptied(driver[shared_database]["agent_sessions"]), {}
    for name, options in (("lasts", {}), ("expires", EXPIRING)):
        with MongoDBSessionRepository(
            server, shared_database, max_embedded_messages=4, max_inline_attachment_bytes=1024, **options
        ) as repository:
            with_content(repository)
            eventually(lambda: not repository._async._connection._tasks)
            found[name] = documents_of(stored)
            repository.delete_session(THEIRS)
    return found


@pytest.fixture(scope="module")
def shared_repository(server: str, shared_database: str) -> Iterator[tuple[MongoDBSessionRepository, CommandLog]]:
    log = CommandLog()
    with MongoDBSessionRepository(
        server, shared_database, event_listeners=[log], max_embedded_messages=4
    ) as repository:
        yield repository, log


@pytest.fixture
def repository(
    database: str, shared_repository: tuple[MongoDBSessionRepository, CommandLog]
) -> Iterator[MongoDBSessionRepository]:
    repository, _ = shared_repository
    repository.open_session(THEIRS, owner="bob")
    eventually(lambda: not repository._async._connection._tasks)
    yield repository
    eventually(lambda: not repository._async._connection._tasks)


@pytest.fixture
def log(
    repository: MongoDBSessionRepository, shared_repository: tuple[MongoDBSessionRepository, CommandLog]
) -> CommandLog:
    """The commands of `repository`."""
    return shared_repository[1]


def everything(stored: Stored) -> dict[str, list[dict[str, Any]]]:
    names = stored.database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    return {name: list(stored.database[name].find({}, sort=[("_id", 1)])) for name in sorted(names)}


class Attacker:
    """Calls the methods of an object that has worked on the session before, and knows what it has read then."""

    def __init__(self, cls: type, server: str, database: str, commands: CommandLog, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._commands = commands
        options |= {"event_listeners": [commands], "max_embedded_messages": 4, "max_inline_attachment_bytes": 1024}
        self.target: Any = cls(server, database, **options)
        self._connection = getattr(self.target, "_async", self.target)._connection

    def run(self, method: Callable[..., Any], **arguments: Any) -> Any:
        result = method(**arguments)
        if inspect.isasyncgen(result):
            return self._runner.run(self._listed(result))
        if inspect.isawaitable(result):
            return self._runner.run(self._awaited(result))
        return list(result) if inspect.isgenerator(result) else result

    async def _listed(self, items: Any) -> list[Any]:
        return [item async for item in items]

    async def _awaited(self, result: Any) -> Any:
        return await result

    def outcome(self, name: str, session_id: str, **given: Any) -> tuple[Any, list[str]]:
        """Return what a call returns or raises, and the commands that it sends."""
        self._commands.clear()
        arguments = ARGUMENTS[name.removesuffix("_async")]() | given
        result: Any
        try:
            result = self.run(getattr(self.target, name), session_id=session_id, **arguments)
        except Exception as error:
            result = type(error), str(error).replace(session_id, "<id>")
        self.settle()
        return result, list(self._commands.names)

    def settle(self) -> None:
        if isinstance(self.target, AsyncMongoDBSessionRepository):
            self._runner.run(idle(self._connection))
        else:
            eventually(lambda: not self._connection._tasks)

    def close(self) -> None:
        self.run(self.target.close)
        self._runner.close()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("of", alternating("bob", None, ["alice", "bob"]))
@pytest.mark.parametrize(
    ("how", "ttl"),
    [*alternating(("argument", {}), ("option", EXPIRING)), *sampled([("argument", EXPIRING), ("option", {})])],
    ids=["argument", "option and expiry", "argument and expiry", "option"],
)
def test_a_session_of_another_is_one_that_does_not_exist(
    server: str,
    database: str,
    stored: Stored,
    commands: CommandLog,
    documents: dict[str, dict[str, list[Any]]],
    cls: type,
    of: Any,
    how: str,
    ttl: dict[str, Any],
) -> None:
    """The same error with the same text after as many commands, and nothing has changed.

    A list that an application has stored as the owner is no owner, even if it contains the caller.
    """
    store_again(stored, documents["expires" if ttl else "lasts"])
    if of is None:
        stored.update_one({"_id": THEIRS}, {"$unset": {"owner": ""}})
    elif of != "bob":
        stored.update_one({"_id": THEIRS}, {"$set": {"owner": of}})
    option, argument = ({"owner": "alice"}, {}) if how == "option" else ({}, {"owner": "alice"})
    attacker = Attacker(cls, server, database, commands, **option, **ttl)
    try:
        if how == "argument":
            attacker.outcome("session_exists", THEIRS)
            # What this process knows of the session must not help either.
            name = "write_back" if cls is MongoDBSessionManagerFactory else "update_message"
            attacker.outcome(name, THEIRS, **({"owner": "bob"} if of == "bob" else {}))
        before = everything(stored)
        for name in methods_of(cls):
            base = name.removesuffix("_async")
            if base in CREATES or (base == "claim_session" and of is None):
                continue
            given = {"owner": "alice"} if base == "claim_session" else argument
            assert attacker.outcome(name, THEIRS, **given) == attacker.outcome(name, ABSENT, **given), name
        assert everything(stored) == before
        if cls is not MongoDBSessionManagerFactory:  # a message in the session document
            given = {"message_id": 10, **argument}
            outcomes = [attacker.outcome("read_message", session_id, **given) for session_id in (THEIRS, ABSENT)]
            assert outcomes[0][0] == outcomes[1][0]
    finally:
        attacker.close()


def outcome_of(call: Callable[..., object], session_id: str, commands: CommandLog) -> tuple[type, str, list[str]]:
    """Return the error of a call and the commands that it sends."""
    commands.clear()
    with pytest.raises(MongoDBSessionError) as caught:
        call(session_id)
    return caught.type, str(caught.value).replace(session_id, "<id>"), list(commands.names)


def test_a_value_that_no_statement_can_hold_does_not_show_the_session(
    repository: MongoDBSessionRepository, log: CommandLog
) -> None:
    """The driver refuses it before the server has looked for the session."""
    metadata = {"k" * 20_000 + ".v": "x" * (16 * 1024 * 1024 - 21_000)}

    def update(session_id: str) -> None:
        repository.update_metadata(session_id, metadata, owner="eve")

    assert outcome_of(update, THEIRS, log) == outcome_of(update, ABSENT, log)
    with pytest.raises(StateTooLargeError, match="metadata was not stored"):
        repository.update_metadata(THEIRS, metadata, owner="bob")


def test_a_statement_that_the_server_refuses_does_not_show_the_session(
    repository: MongoDBSessionRepository, log: CommandLog, server: str, stored: Stored
) -> None:
    stored.update_one({"_id": THEIRS}, {"$set": {"feedbacks": "of an application"}})

    def add(session_id: str) -> None:
        with fail_point(server, failCommands=["update"], errorCode=8):
            repository.add_feedback(session_id, {"rating": "up"}, owner="eve")

    assert outcome_of(add, THEIRS, log) == outcome_of(add, ABSENT, log)


def test_what_another_tries_costs_the_owner_nothing(repository: MongoDBSessionRepository, log: CommandLog) -> None:
    repository.create_agent(THEIRS, SessionAgent("agent", {}, {}), owner="bob")
    for name in methods_of(MongoDBSessionRepository):
        if name not in CREATES:
            with suppress(MongoDBSessionError):
                result = getattr(repository, name)(THEIRS, **{"owner": "eve", **ARGUMENTS[name]()})
                list(result if inspect.isgenerator(result) else ())
    log.clear()
    repository.create_message(THEIRS, "agent", a_message(), owner="bob")
    assert log.names == ["update"]


def test_the_repository_of_an_open_session_is_for_its_owner(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager(THEIRS, owner="bob") as theirs:
        agent(theirs, "secret")("secret")
        pipeline(theirs, node("one", "secret"))("secret")
    with factory.create_session_manager(THEIRS) as of_any:
        opened = of_any.session_repository
        with pytest.raises(SessionNotFoundError, match="does not exist"):
            opened.create_session(Session(THEIRS, SessionType.AGENT), owner="eve")
        for name in methods_of(type(opened)):
            method, arguments = getattr(opened, name), ARGUMENTS[name]()
            with pytest.raises(SessionNotFoundError, match="session 'theirs' does not exist"):
                method(THEIRS, **arguments, owner="eve")
            with pytest.raises(InvalidArgumentError, match="owner"):
                method(THEIRS, **arguments, owner="")
        assert len(opened.list_messages(THEIRS, "agent", owner="bob")) == 2
        assert opened.read_multi_agent(THEIRS, "pipeline", owner="bob") is not None


# Opening.


@pytest.mark.parametrize("must_exist", alternating(False, True))
@pytest.mark.parametrize("is_busy", alternating(False, True))
@pytest.mark.parametrize(
    ("on_busy", "of"),
    [
        *alternating(("conflict", "bob"), ("wait", None), ("refuse", "bob")),
        *sampled([("conflict", None), ("wait", "bob"), ("refuse", None)]),
    ],
)
def test_a_session_of_another_cannot_be_opened_whoever_has_its_turn(
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    stored: Stored,
    must_exist: bool,
    is_busy: bool,
    on_busy: Any,
    of: str | None,
) -> None:
    """Nobody waits for it, its lease and its line stay, and it is not used."""
    holder = factory.create_session_manager(THEIRS, owner=of, on_busy="wait" if is_busy else "conflict", lease=600)
    if is_busy:
        line = [{"by": ObjectId(), "until": datetime.now(UTC) + timedelta(hours=1)}]
        stored.update_one({"_id": THEIRS}, {"$set": {"lease.line": line}})
    before = everything(stored)

    def outcome(session_id: str) -> tuple[str, list[str]]:
        commands.clear()
        with pytest.raises(SessionNotFoundError) as caught:
            factory.create_session_manager(
                session_id, owner="alice", must_exist=must_exist, on_busy=on_busy, busy_timeout=600
            )
        eventually(lambda: not factory._connection._tasks)
        return str(caught.value), list(commands.names)

    text, sent = outcome(THEIRS)
    assert text == "session 'theirs' does not exist"
    if must_exist:
        assert outcome(ABSENT) == ("session 'absent' does not exist", sent)
    assert everything(stored) == before
    agent(holder, "still here")("hi")
    holder.close()


def test_an_owner_waits_for_its_own_turns(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s", owner="alice", on_busy="wait") as first:
        with pytest.raises(SessionBusyError):
            factory.create_session_manager("s", owner="alice", on_busy="wait", busy_timeout=0.05)
        with pytest.raises(SessionBusyError):
            factory.create_session_manager("s", on_busy="refuse")
        agent(first, "one")("1")
    with factory.create_session_manager("s", on_busy="wait") as of_any:
        assert len(agent(of_any).messages) == 2


def test_an_owner_makes_no_wait_for_a_turn_dearer(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored
) -> None:
    factory.create_session_manager("s", owner="ada").close()
    lease = {"token": ObjectId(), "until": datetime.now(UTC) + timedelta(seconds=0.3), "fence": 1}
    stored.update_one({"_id": "s"}, {"$set": {"lease": lease}})
    commands.clear()
    with factory.create_session_manager("s", owner="ada", on_busy="wait"):
        assert set(commands.names) == {"findAndModify"}


def test_the_owner_is_stored_with_the_session(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    for number, on_busy in enumerate(["conflict", "wait"]):
        factory.create_session_manager(f"s{number}", owner="alice", on_busy=on_busy).close()  # type: ignore[arg-type]
        document = stored.find_one({"_id": f"s{number}"}) or {}
        assert document["owner"] == "alice"
        factory.create_session_manager(f"s{number}").close()  # anybody may, without an owner
        factory.create_session_manager(f"s{number}", owner="alice", must_exist=True).close()
    factory.create_session_manager("without").close()
    assert "owner" not in (stored.find_one({"_id": "without"}) or {})


async def test_of_two_users_who_create_a_session_one_gets_it(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async def opened(owner: str) -> str | None:
        try:
            async with factory.create_session_manager_async("s", owner=owner) as manager:
                await agent(manager, "hello").invoke_async(f"{owner} says hi")
        except SessionNotFoundError:
            return None
        return owner

    owners = await asyncio.gather(*map(opened, ["alice", "bob", "carol"]))
    (winner,) = [owner for owner in owners if owner is not None]
    document = stored.find_one({"_id": "s"}) or {}
    assert document["owner"] == winner
    assert texts(document["agents"]["agent"]["messages"]) == [f"{winner} says hi", "hello"]


def test_a_manager_does_not_reach_the_session_that_another_has_created_in_its_place(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = factory.create_session_manager("s", owner="alice")
    live = agent(manager, "one", "two")
    live("1")
    factory.delete_session("s")
    with factory.create_session_manager("s", owner="bob") as theirs:
        theirs.update_metadata({"secret": 1})
        agent(theirs, "secret")("secret")
    before = everything(stored)
    assert manager.get_metadata() == {}
    for call in (
        manager.get_usage,
        manager.list_agents,
        manager.reload,
        lambda: manager.list_messages("agent"),
        lambda: manager.update_metadata({"secret": 2}),
        lambda: manager.add_feedback({"rating": "down"}),
        lambda: manager.update_agent_config("agent", model="other"),
        lambda: live("2"),
    ):
        with pytest.raises(SessionNotFoundError):
            call()
    assert everything(stored) == before


async def test_the_one_call_constructors_take_an_owner(server: str, database: str) -> None:
    async with create_mongodb_session_manager_async("s", server, database, owner="alice") as manager:
        await agent(manager, "one").invoke_async("1")

    def open_again(owner: str) -> int:
        with create_mongodb_session_manager("s", server, database, owner=owner, must_exist=True) as manager:
            return len(agent(manager).messages)

    assert await asyncio.to_thread(open_again, "alice") == 2
    with pytest.raises(SessionNotFoundError):
        await asyncio.to_thread(open_again, "bob")
    with pytest.raises(SessionNotFoundError):
        await create_mongodb_session_manager_async("s", server, database, owner="bob")


def test_a_factory_of_an_owner_has_its_sessions_only(server: str, database: str) -> None:
    with (
        MongoDBSessionManagerFactory(server, database) as any_owner,
        MongoDBSessionManagerFactory(server, database, owner="alice") as hers,
    ):
        any_owner.create_session_manager("theirs", owner="bob").close()
        any_owner.create_session_manager("old").close()
        hers.create_session_manager("hers").close()
        assert [each.session_id for each in hers.list_sessions().sessions] == ["hers"]
        assert (hers.count_sessions(), any_owner.count_sessions()) == (1, 3)
        assert hers.get_session_summary("hers").owner == "alice"
        assert not hers.delete_session("theirs")
        with pytest.raises(SessionNotFoundError):
            hers.create_session_manager("theirs")
        hers.create_session_manager("theirs", owner="bob").close()  # an option of a session takes the factory's place
    with MongoDBSessionManager("hers", server, database, owner="alice", must_exist=True) as manager:
        assert manager.get_metadata() == {"metadata": {}}


def test_the_pool_of_the_process_has_no_owner(server: str) -> None:
    with pytest.raises(ConfigurationError, match="owner"):
        MongoDBConnectionPool.initialize(server, owner="alice")  # type: ignore[call-arg]


def test_an_owner_that_is_none_is_refused_and_nothing_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    calls: list[Callable[[Any], object]] = [
        lambda owner: factory.create_session_manager("s", owner=owner),
        lambda owner: factory.list_sessions(owner=owner),
        lambda owner: factory.count_sessions(owner=owner),
        lambda owner: factory.session_exists("s", owner=owner),
        lambda owner: factory.delete_session("s", owner=owner),
        lambda owner: factory.claim_session("s", owner),
        lambda owner: factory.update_session("s", title="t", owner=owner),
        lambda owner: list(factory.export_session("s", owner=owner)),
        lambda owner: factory.import_session([], owner=owner),
        lambda owner: factory.fork_session("s", "t", owner=owner),
        lambda owner: factory.rewind_session("s", 1, owner=owner),
        lambda owner: MongoDBSessionManagerFactory(factory._connection.settings.connection_string, owner=owner),
    ]
    owners: list[Any] = ["", "a\0b", "\ud800", "x" * 1025, 5, True, b"alice", {"$ne": None}, ["alice"]]
    for owner, call in itertools.product(owners, calls):
        with pytest.raises(InvalidArgumentError, match="owner"):
            call(owner)
        assert commands.names == [], owner


def test_must_exist_never_creates(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    for options in ({}, {"on_busy": "wait"}, {"owner": "alice"}):
        with pytest.raises(SessionNotFoundError, match="session 's' does not exist"):
            factory.create_session_manager("s", must_exist=True, **options)  # type: ignore[arg-type]
    assert stored.count_documents({}) == 0
    with pytest.raises(ConfigurationError, match="must_exist"):
        factory.create_session_manager("s", must_exist="yes")  # type: ignore[arg-type]
    factory.create_session_manager("s").close()
    factory.create_session_manager("s", must_exist=True).close()


# Sessions without an owner.


def test_a_session_without_an_owner_is_claimed_once(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored
) -> None:
    stored.insert_one(session("old", metadata={"a": 1}))
    with pytest.raises(SessionNotFoundError):
        factory.create_session_manager("old", owner="alice")
    commands.clear()
    factory.claim_session("old", "alice")
    factory.claim_session("old", "alice")
    assert commands.names == ["update", "update"]
    for session_id in ("old", "absent"):
        with pytest.raises(SessionNotFoundError, match="does not exist"):
            factory.claim_session(session_id, "bob")
    assert stored.find_one({"_id": "old"}) == session("old", metadata={"a": 1}, owner="alice")
    with factory.create_session_manager("old", owner="alice") as manager:
        assert manager.get_metadata() == {"metadata": {"a": 1}}


@pytest.mark.parametrize("ttl", alternating(None, timedelta(hours=1)))
def test_a_session_that_is_claimed_while_it_is_open_goes_on(server: str, database: str, ttl: timedelta | None) -> None:
    with MongoDBSessionManagerFactory(server, database, session_ttl=ttl) as factory:
        with factory.create_session_manager("s", on_busy="wait") as manager:
            live = agent(manager, "one", "two")
            live("1")
            factory.claim_session("s", "alice")
            live("2")
            manager.update_metadata({"a": 1})
            repository = factory._async
            factory._portal.call(repository.get_usage, "s")
        factory.update_session("s", title="mine", owner="alice")
        with factory.create_session_manager("s", owner="alice") as hers:
            assert len(agent(hers).messages) == 4


# Deleting, and copying.


def test_a_deletion_that_was_interrupted_is_finished_by_its_owner(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, max_embedded_messages=4, retryWrites=False) as repository:
        with_content(repository)
        with fail_point(server, failCommands=["delete"], errorCode=13, times=100), pytest.raises(AccessDeniedError):
            repository.delete_session(THEIRS, owner="bob")
        assert left_of(stored, THEIRS) != []
        before = everything(stored)
        assert not repository.delete_session(THEIRS, owner="alice")
        assert everything(stored) == before
        assert not repository.delete_session(THEIRS, owner="bob")
        assert left_of(stored, THEIRS) == []


def test_a_copy_belongs_to_its_owner(server: str, database: str) -> None:
    with MongoDBSessionRepository(server, database, max_embedded_messages=4) as repository:
        with_content(repository)
        lines = list(repository.export_session(THEIRS, owner="bob"))
        repository.fork_session(THEIRS, "fork", at_message=3, owner="bob")
        repository.rewind_session(THEIRS, 11, keep_as="kept", owner="bob")
        repository.import_session(lines, "same")
        repository.import_session(lines, "hers", owner="alice")
        found = {each.session_id: each for each in repository.list_sessions().sessions}
        assert {name: each.owner for name, each in found.items()} == {
            THEIRS: "bob",
            "fork": "bob",
            "kept": "bob",
            "same": "bob",
            "hers": "alice",
        }
        assert {(each.title, each.tags) for each in found.values()} == {("secret", ("secret",))}
        assert len(repository.list_messages("hers", "agent", owner="alice")) == 12
        with pytest.raises(SessionExistsError):  # the id is taken, by whomever
            repository.import_session(lines, THEIRS, owner="alice")


def test_an_exported_session_can_have_no_owner_and_get_one(server: str, database: str) -> None:
    with (
        MongoDBSessionRepository(server, database) as of_any,
        MongoDBSessionRepository(server, database, owner="alice") as hers,
    ):
        of_any.create_session(Session("s", SessionType.AGENT))
        lines = list(of_any.export_session("s"))
        of_any.import_session(lines, "of nobody")
        hers.import_session(lines, "hers")
        assert of_any.get_session_summary("of nobody").owner is None
        assert hers.get_session_summary("hers").owner == "alice"
        hers.create_session(Session("hers too", SessionType.AGENT))
        assert hers.read_session("hers too") is not None
        assert of_any.read_session("hers too", owner="bob") is None


def test_an_import_with_an_owner_that_is_none_is_refused(factory: MongoDBSessionManagerFactory) -> None:
    factory.create_session_manager("s").close()
    first, second, last = factory.export_session("s")
    owners: list[Any] = ["", "a\0b", 5, ["alice", "bob"], {"a": 1}, "x" * 1025]
    for owner in owners:
        changed = json.loads(second)
        changed["session"]["owner"] = owner
        with pytest.raises(InvalidArgumentError, match=r"line 2 cannot be imported: .*owner"):
            factory.import_session([first, json.dumps(changed), last], "copy")
        assert not factory.session_exists("copy"), owner
