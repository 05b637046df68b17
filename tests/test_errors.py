"""Errors and log lines hold no content, keep what the server said, and cannot be forged by an id."""

from __future__ import annotations

import ast
import asyncio
import copy
import functools
import io
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pymongo
import pytest
from strands import Agent
from strands.types.session import SessionAgent, SessionMessage

import mongodb_session_manager as package
from mongodb_session_manager import (
    AgentNotFoundError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EncodingError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    MongoDBStorage,
    SessionConflictError,
    StateTooLargeError,
    notify_later,
)
from mongodb_session_manager._format.multi_agents import MultiAgents, first_write
from mongodb_session_manager._io.driver_errors import driver_errors
from mongodb_session_manager.demo import ScriptedModel
from support import agent, alternating, assert_no_driver_error, chained, client_of, eventually, fail_point, texts

Documents = pymongo.collection.Collection[dict[str, Any]]

SECRET = "x7q-" + "said-by-a-user"
ALWAYS = 1_000_000


Nodes = TypeVar("Nodes", bound=ast.AST)


@functools.cache
def sources() -> list[tuple[Path, ast.AST]]:
    """Return the exception handlers, calls and imports of the package, each with its file."""
    kinds = (ast.ExceptHandler, ast.Call, ast.ImportFrom)
    files = sorted(Path(package.__file__).parent.rglob("*.py"))
    return [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]


def nodes(kind: type[Nodes]) -> Iterator[tuple[Path, Nodes]]:
    """Yield the nodes of one of the kinds, each with its file."""
    yield from ((file, node) for file, node in sources() if isinstance(node, kind))


def check_silent(error: BaseException, secret: str = SECRET) -> None:
    """Whatever shows an error, with or without what led to it, shows no content."""
    assert_no_driver_error(error)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    exc_info = (type(error), error, error.__traceback__)
    handler.emit(logging.LogRecord("name", logging.ERROR, "file", 1, "failed", (), exc_info))
    shown = traceback.TracebackException.from_exception(error)
    parts = [log.getvalue(), *shown.format(chain=True), *shown.format(chain=False)]
    for each in chained(error):
        parts += [str(each), repr(each), repr(each.args)]
    assert secret not in "".join(parts)


# The driver takes a server that says so for one that is gone until it has asked it again; asked so, it answers at once.
HURRY: dict[str, Any] = {"serverMonitoringMode": "poll", "serverSelectionTimeoutMS": 10_000}


@pytest.fixture(scope="module")
def repository(server: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, "test_errors", **HURRY) as repository:
        repository.open_session("s")
        yield repository


# The driver's error hangs on none of ours.


def test_a_refused_metadata_key_does_not_show_the_stored_value(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    manager.update_metadata({"a": SECRET})
    with pytest.raises(InvalidArgumentError) as raised:
        manager.update_metadata({"a.b": 1})
    check_silent(raised.value)
    assert (raised.value.code, raised.value.operation) == (28, "update_one")


def test_a_refused_metadata_key_does_not_show_the_stored_value_async(factory: MongoDBSessionManagerFactory) -> None:
    async def run() -> MongoDBSessionError:
        async with await factory.create_session_manager_async("s") as manager:
            await manager.update_metadata({"a": SECRET})
            with pytest.raises(InvalidArgumentError) as raised:
                await manager.update_metadata({"a.b": 1})
        return raised.value

    error = asyncio.run(run())
    check_silent(error)
    assert error.code == 28


@pytest.fixture
def refuse(driver: pymongo.MongoClient[dict[str, Any]], database: str) -> Iterator[Callable[..., None]]:
    """Have the server refuse every write to a collection; its answer quotes what it refused."""
    refusing: list[str] = []

    def refuse(name: str, path: str = "never") -> None:
        if name not in driver[database].list_collection_names():
            driver[database].create_collection(name)
        refusing.append(name)
        driver[database].command("collMod", name, validator={path: {"$size": 99}})

    yield refuse
    for name in refusing:
        driver[database].command("collMod", name, validator={})


def test_a_refused_blob_is_in_no_traceback(server: str, database: str, refuse: Callable[..., None]) -> None:
    refuse("refused_blobs.chunks")
    data = SECRET.encode() * 300_000

    async def run() -> MongoDBSessionError:
        async with MongoDBStorage(server, database, collection_name="refused") as storage:
            with pytest.raises(DatabaseError) as raised:
                await storage.write("key", data)
        return raised.value

    error = asyncio.run(run())
    check_silent(error)
    assert (error.code, error.operation) == (121, "insert_many")
    assert sum(len(line) for line in traceback.format_exception(error)) < 20_000


def test_a_refused_attachment_is_in_no_traceback(
    factory: MongoDBSessionManagerFactory, refuse: Callable[..., None]
) -> None:
    refuse("agent_sessions_attachments.chunks")
    document = {"document": {"format": "txt", "name": "d", "source": {"bytes": SECRET.encode() * 100_000}}}
    live = agent(factory.create_session_manager("s"), "hello")
    with pytest.raises(DatabaseError) as raised:
        live([{"text": "hi"}, document])  # type: ignore[list-item]
    check_silent(raised.value)
    assert raised.value.code == 121


def test_a_refused_message_is_in_no_traceback_of_an_agent(
    factory: MongoDBSessionManagerFactory, refuse: Callable[..., None]
) -> None:
    live, other = (agent(factory.create_session_manager(name), "hello") for name in ("s", "t"))
    refuse("agent_sessions", "agents.agent.messages")
    for call in (live, lambda prompt: asyncio.run(other.invoke_async(prompt))):
        with pytest.raises(DatabaseError) as raised:
            call(SECRET)
        check_silent(raised.value)
        assert (raised.value.code, raised.value.operation) == (121, "update_one")


def test_a_unique_index_of_the_users_own_does_not_show_what_is_stored_twice(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    name = stored.create_index("metadata.mail", unique=True, sparse=True)
    try:
        factory.create_session_manager("one").update_metadata({"mail": SECRET})
        other = factory.create_session_manager("other")
        with pytest.raises(MongoDBSessionError) as raised:
            other.update_metadata({"mail": SECRET})
    finally:
        stored.drop_index(name)
    check_silent(raised.value)
    assert isinstance(raised.value, DatabaseError)
    assert raised.value.code == 11000


@pytest.mark.parametrize(
    "value", [{SECRET: object()}, SECRET + "\ud800", [SECRET, 2**70], {SECRET + "\0": 1}, {SECRET}], ids=range(5)
)
def test_what_bson_cannot_hold_is_in_no_traceback(driver: pymongo.MongoClient[dict[str, Any]], value: Any) -> None:
    with pytest.raises(EncodingError) as raised, driver_errors():
        driver["test_errors"]["values"].insert_one({"a": value})
    check_silent(raised.value)


def test_text_that_is_no_unicode_is_in_no_traceback(
    server: str, database: str, repository: MongoDBSessionRepository
) -> None:
    broken = SECRET + "\ud800"

    def storage(key: str) -> None:
        asyncio.run(MongoDBStorage(server, database).read(key))

    calls: list[Callable[[], object]] = [
        lambda: MongoDBSessionManager(broken, server, database),
        lambda: repository.update_metadata("s", {broken: 1}),
        lambda: repository.list_sessions(application_name=broken),
        lambda: repository.get_agent_config("s", broken),
        lambda: storage(broken),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError) as raised:
            call()
        check_silent(raised.value)


@pytest.mark.parametrize(
    "line",
    [SECRET, '{"said": "' + SECRET, '{"a": {"$date": "' + SECRET + '"}}', SECRET.encode() + b"\xff"],
    ids=range(4),
)
def test_a_damaged_export_is_in_no_traceback(repository: MongoDBSessionRepository, line: Any) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        repository.import_session([line])
    check_silent(raised.value)


def test_what_raises_within_an_except_block_raises_alone() -> None:
    """Where another error is being handled, ours is raised with `raise_alone`, or that one cannot hold content."""
    harmless = {"ImportError", "OSError", "SupervisorError", "CancelledError", "TimeoutError", "MongoDBSessionError"}
    harmless |= {name for name in dir(package) if name.endswith("Error")} | {"RefusedError"}
    harmless |= {"importlib", "metadata", "PackageNotFoundError"}
    raising = []
    for path, handler in nodes(ast.ExceptHandler):
        caught = {"everything"} if handler.type is None else set(re.findall(r"\w+", ast.unparse(handler.type)))
        raising += [
            f"{path.stem}: {ast.unparse(node)}"
            for statement in (handler.body if caught - harmless else ())
            for node in ast.walk(statement)
            if isinstance(node, ast.Raise) and node.exc is not None
        ]
    caught_by_the_codec = {
        "marked: raise RecursionError(str(error)) from error",
        "encoder: raise RefusedError(f'a {_type_name(value)} that cannot be read ({type(error).__name__})') from None",
    }
    assert set(raising) == caught_by_the_codec


def test_only_what_translates_the_drivers_errors_names_them() -> None:
    knowing = {
        path.stem
        for path, node in nodes(ast.ImportFrom)
        if node.module == "pymongo.errors"
        or (node.module == "pymongo" and "errors" in [name.name for name in node.names])
    }
    assert knowing == {"driver_errors", "drivers", "settings", "connection", "collection", "gridfs", "gate", "_server"}


# What an error keeps.


def test_an_error_says_what_the_server_said(server: str, repository: MongoDBSessionRepository) -> None:
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "findAndModify": ("find_one_and_update", lambda: repository.open_session("t")),
        "find": ("find_one", lambda: repository.read_session("s")),
        "update": ("update_one", lambda: repository.update_metadata("s", {"a": 1})),
        "aggregate": ("count_documents", repository.count_sessions),
    }
    for command, (operation, call) in calls.items():
        with fail_point(server, failCommands=[command], errorCode=17), pytest.raises(DatabaseError) as raised:
            call()
        error = raised.value
        assert (error.code, error.code_name, error.operation) == (17, "ProtocolError", operation), command
        assert not error.outcome_unknown
        assert str(error) == "MongoDB refused the command: ProtocolError (code 17)"


@pytest.mark.parametrize("code", [365, 388])
def test_a_write_that_found_the_cache_of_the_server_full_is_sent_again(
    server: str, repository: MongoDBSessionRepository, code: int
) -> None:
    with fail_point(server, failCommands=["update"], errorCode=code, times=3):
        repository.update_metadata("s", {"a": code})
    assert repository.get_metadata("s") == {"metadata": {"a": code}}
    with fail_point(server, failCommands=["update"], errorCode=code, times=4):
        with pytest.raises(DatabaseError) as raised:
            repository.update_metadata("s", {"a": 2})
        assert (raised.value.code, raised.value.outcome_unknown) == (code, False)


def test_an_error_of_arguments_has_no_code(factory: MongoDBSessionManagerFactory) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        factory.create_session_manager("")
    error = raised.value
    assert (error.code, error.code_name, error.operation, error.outcome_unknown) == (None, None, None, False)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(package).values() if isinstance(kind, type) and issubclass(kind, MongoDBSessionError)],
    ids=lambda kind: kind.__name__,
)
def test_a_copy_of_an_error_is_equal(kind: type[MongoDBSessionError]) -> None:
    error = kind("what happened")
    error.code, error.code_name, error.operation, error.outcome_unknown = 13, "Unauthorized", "update_one", True
    for copied in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(copied) is kind
        assert str(copied) == "what happened"
        assert vars(copied) == vars(error)


def test_a_refusal_that_is_raised_again_keeps_what_the_server_said(
    server: str, factory: MongoDBSessionManagerFactory
) -> None:
    live = agent(factory.create_session_manager("s"), "hello", "bye")
    errors = []
    with fail_point(server, failCommands=["update"], errorCode=17419, times=ALWAYS):
        for prompt in ("hi", "and"):
            with pytest.raises(StateTooLargeError) as raised:
                live(prompt)
            errors.append(raised.value)
    assert [(error.code, error.operation) for error in errors] == [(17419, "update_one")] * 2
    assert errors[0] is not errors[1]


def test_a_graphs_refusal_that_is_raised_again_keeps_what_the_server_said() -> None:
    known = MultiAgents({})
    known.create("graph", {})
    refusal = MessageTooLargeError("too large")
    refusal.code, refusal.operation = 17419, "update_one"
    known.settle(first_write("graph", {}, "me"), refusal)
    with pytest.raises(MessageTooLargeError) as raised:
        known.raise_refusal()
    assert raised.value is not refusal
    assert (raised.value.code, raised.value.operation) == (17419, "update_one")


# Write concern errors.

UNAVAILABLE = {
    6: "HostUnreachable",
    7: "HostNotFound",
    91: "ShutdownInProgress",
    189: "PrimarySteppedDown",
    9001: "SocketException",
    10058: "LegacyNotPrimary",
    10107: "NotWritablePrimary",
    11600: "InterruptedAtShutdown",
    11602: "InterruptedDueToReplStateChange",
    13435: "NotPrimaryNoSecondaryOk",
    13436: "NotPrimaryOrSecondary",
}
TOO_SLOW = {
    50: "MaxTimeMSExpired",
    64: "WriteConcernTimeout",
    89: "NetworkTimeout",
    202: "NetworkInterfaceExceededTimeLimit",
    262: "ExceededTimeLimit",
}


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    alternating(
        *((code, name, DatabaseUnavailableError) for code, name in UNAVAILABLE.items()),
        *((code, name, DatabaseTimeoutError) for code, name in TOO_SLOW.items()),
        (79, "UnknownReplWriteConcern", DatabaseError),
        (100, "UnsatisfiableWriteConcern", DatabaseError),
    ),
)
def test_a_write_concern_error_is_of_its_kind(
    server: str, repository: MongoDBSessionRepository, code: int, name: str, expected: type[MongoDBSessionError]
) -> None:
    failure = {"code": code, "codeName": name, "errmsg": "not confirmed"}
    with (
        fail_point(server, failCommands=["update"], times=ALWAYS, writeConcernError=failure),
        pytest.raises(MongoDBSessionError) as raised,
    ):
        repository.update_metadata("s", {"a": SECRET})
    error = raised.value
    assert type(error) is expected
    assert error.code == code
    assert error.outcome_unknown
    assert str(error).endswith("; it is unknown whether the command was carried out")
    check_silent(error)


@pytest.mark.parametrize(
    ("code", "name", "expected"),
    [
        (91, "ShutdownInProgress", DatabaseUnavailableError),
        (64, "WriteConcernTimeout", DatabaseTimeoutError),
        (100, "UnsatisfiableWriteConcern", DatabaseError),
    ],
)
@pytest.mark.parametrize("write", ["delete", "redact"])
def test_a_deletion_or_redaction_that_is_not_confirmed_is_an_error(
    server: str, repository: MongoDBSessionRepository, code: int, name: str, expected: type[Exception], write: str
) -> None:
    repository.open_session("t")
    repository.create_agent("t", SessionAgent("agent", {}, {}))
    said: Any = {"role": "user", "content": [{"text": SECRET}]}
    repository.create_message("t", "agent", SessionMessage(said, 0))
    gone: Any = {"role": "user", "content": [{"text": "gone"}]}
    writes: dict[str, Callable[[], object]] = {
        "delete": lambda: repository.delete_session("t"),
        "redact": lambda: repository.update_message("t", "agent", SessionMessage(said, 0, gone)),
    }
    failure = {"code": code, "codeName": name, "errmsg": "not confirmed"}
    with (
        fail_point(server, failCommands=["findAndModify"], times=ALWAYS, writeConcernError=failure),
        pytest.raises(MongoDBSessionError) as raised,
    ):
        writes[write]()
    assert type(raised.value) is expected
    assert raised.value.outcome_unknown
    repository.delete_session("t")
    assert not repository.session_exists("t")


@pytest.mark.parametrize("code", alternating(*UNAVAILABLE))
def test_a_write_concern_error_that_passes_is_not_noticed(
    server: str, repository: MongoDBSessionRepository, code: int
) -> None:
    failure = {"code": code, "codeName": UNAVAILABLE[code], "errmsg": "it passes"}
    with fail_point(server, failCommands=["update"], times=3, writeConcernError=failure):
        repository.add_feedback("s", {"code": code})
    assert [each["code"] for each in repository.get_feedbacks("s")].count(code) == 1


@pytest.mark.parametrize("kind", ["server", "standalone"])
def test_a_turn_that_is_not_confirmed_at_first_is_stored_once(
    request: pytest.FixtureRequest, database: str, kind: str
) -> None:
    server = request.getfixturevalue(kind)
    failure = {"code": 11602, "codeName": UNAVAILABLE[11602], "errmsg": "it passes"}
    session_id = f"unconfirmed-{kind}"
    with MongoDBSessionManagerFactory(server, database, **HURRY) as factory, client_of(server) as client:
        with fail_point(server, failCommands=["findAndModify"], writeConcernError=failure):
            live = agent(factory.create_session_manager(session_id), "hello", "bye")
        with fail_point(server, failCommands=["update"], times=2, writeConcernError=failure):
            live("hi")
        live("I am off")
        document = client[database]["agent_sessions"].find_one({"_id": session_id})
    assert document is not None
    assert texts(document["agents"]["agent"]["messages"]) == ["hi", "hello", "I am off", "bye"]


# What an encoding error calls the place.


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (lambda m: m.update_metadata({"a": {"b": object()}}), "metadata['a']['b']"),
        (lambda m: m.update_metadata({"a.b": [object()]}), "metadata['a']['b'][0]"),
        (lambda m: m.update_metadata({"a user's words": object()}), "metadata[<key>]"),
        (lambda m: m.add_feedback({"x": object()}), "feedback['x']"),
    ],
)
def test_an_encoding_error_names_the_place(
    factory: MongoDBSessionManagerFactory, call: Callable[[MongoDBSessionManager], object], place: str
) -> None:
    manager = factory.create_session_manager("s")
    with pytest.raises(EncodingError, match=re.escape(f", at {place}: convert it to a dict, ")):
        call(manager)


def test_an_encoding_error_names_the_place_in_a_message(factory: MongoDBSessionManagerFactory) -> None:
    live = agent(factory.create_session_manager("s"), "hello")
    with pytest.raises(EncodingError, match=re.escape("at message['content'][0]['text']: ")):
        live([{"text": object()}])  # type: ignore[list-item, typeddict-item]


def test_an_encoding_error_names_the_place_in_the_state(repository: MongoDBSessionRepository) -> None:
    restored = SessionAgent("agent", state={"k": object()}, conversation_manager_state={})
    with pytest.raises(EncodingError, match=re.escape("at state['k']: ")):
        repository.create_agent("s", restored)


def test_a_first_message_that_comes_too_late_names_no_message_before_it(factory: MongoDBSessionManagerFactory) -> None:
    one, other = factory.create_session_manager("s"), factory.create_session_manager("s")
    first, second = agent(one, "hello"), agent(other, "hello")
    first("hi")
    with pytest.raises(SessionConflictError) as raised:
        second("hi")
    assert "-1" not in str(raised.value)
    assert "another writer stored message 1 after this session was loaded" in str(raised.value)


# Log lines.

FORGED = "s\n2026-01-01 CRITICAL root: forged"


def test_an_id_with_a_line_break_forges_no_log_line(
    factory: MongoDBSessionManagerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mongodb_session_manager")
    one, other = factory.create_session_manager(FORGED), factory.create_session_manager(FORGED)
    first, second = (
        Agent(model=ScriptedModel(["hello"]), agent_id="a\nb", session_manager=manager, callback_handler=None)
        for manager in (one, other)
    )
    first("hi")
    with pytest.raises(SessionConflictError) as raised:
        second("hi")
    assert "\n" not in str(raised.value)

    async def fail() -> None:
        raise ValueError(FORGED)

    given_up: list[object] = []
    notify_later(FORGED, FORGED, fail, max_tries=1, on_error=lambda event, error: given_up.append(event))
    eventually(lambda: given_up)
    with pytest.raises(AgentNotFoundError) as missing:
        one.update_agent_config("c\nd", model="m")
    assert "\n" not in str(missing.value)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("mongodb_session_manager")]
    assert any("refused" in line for line in lines)
    assert any("notification not delivered" in line for line in lines)
    assert [line for line in lines if "\n" in line or "\r" in line] == []


LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
FROM_OUTSIDE = re.compile(
    r"(^|_)(ids?|keys?|names?|names_of|fields?|shown|template|collection|connection|event|hooks?|files?|paths?|owners?"
    r"|title|tags?|prompt|database)$"
)


def called(expression: ast.expr) -> str:
    """Return the last name of what is formatted, like `session_id` of `self.session_id`."""
    match expression:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=function):
            return called(function)
        case ast.Subscript(value=value) | ast.Await(value=value):
            return called(value)
        case _:
            return ""


def test_every_log_line_escapes_what_comes_from_outside() -> None:
    unescaped = []
    calls = 0
    for path, node in nodes(ast.Call):
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
            continue
        if "log" not in ast.unparse(node.func.value):
            continue
        calls += 1
        place = f"{path.name}:{node.lineno}"
        line = node.args[0]
        if not (isinstance(line, ast.Constant) and isinstance(line.value, str)):
            unescaped.append(f"{place} is formatted before it is logged")
            continue
        forms = re.findall(r"%[-+ #0-9.]*([a-zA-Z])", line.value)
        assert len(forms) == len(node.args) - 1, place
        unescaped += [
            f"{place} {ast.unparse(value)}"
            for form, value in zip(forms, node.args[1:], strict=True)
            if form == "s" and FROM_OUTSIDE.search(called(value))
        ]
    assert calls > 10
    assert unescaped == []


def test_every_error_escapes_what_comes_from_outside() -> None:
    unescaped = [
        f"{path.stem}: {ast.unparse(value)}"
        for path, error in nodes(ast.Call)
        if called(error.func).endswith("Error")
        for text in error.args
        for value in ast.walk(text)
        if isinstance(value, ast.FormattedValue)
        and re.search(r"(session|agent|new|connection)_id$|^(id|key|path|collection_name)$", called(value.value))
        and value.conversion != ord("r")
    ]
    assert unescaped == []
