"""Any document that an earlier version, or a hand, has left opens: what cannot be used is kept, and read as absent."""

from __future__ import annotations

import copy
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Any

import bson
import pymongo
import pytest
from bson import Binary, DatetimeMS, Decimal128, Int64, ObjectId, Regex
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.raw_bson import RawBSONDocument
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pymongo.collection import Collection

from fix_legacy import CREATED, conversation, old_agent, old_session
from mongodb_session_manager import (
    DatabaseError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from support import agent, alternating, eventually, texts

ABSENT = Ellipsis

ODD: list[Any] = [ABSENT, None, -1, "x", [None, 3, "x"], {"a": {"b": [1]}}]
ODDER: list[Any] = [
    5,
    2.5,
    True,
    "",
    [],
    [{"role": "user"}],
    {},
    b"x",
    ObjectId(),
    Regex("x"),
    Decimal128("1.5"),
    Int64(2**62),
    DatetimeMS(2**55),
    CREATED,
]

SESSION = [
    "session_id",
    "application_name",
    "session_type",
    "created_at",
    "updated_at",
    "metadata",
    "feedbacks",
    "feedbacks.0",
    "guardrail_events",
    "guardrail_events.0",
    "incarnation",
    "removed_attachments",
    "expires_at",
    "time_to_live",
    "session_ttl",
    "migrating",
    "moved",
    "state",
    "multi_agents",
    "multi_agents.graph",
]
AGENT = [
    "",
    ".agent_data",
    ".agent_data.agent_id",
    ".agent_data.state",
    ".agent_data.conversation_manager_state",
    ".agent_data.conversation_manager_state.__name__",
    ".agent_data.conversation_manager_state.removed_message_count",
    ".agent_data._internal_state",
    ".agent_data._internal_state.interrupt_state",
    ".agent_data._internal_state.model_state",
    ".agent_data.created_at",
    ".agent_data.prompt_metadata",
    ".agent_data.config_set",
    ".created_at",
    ".updated_at",
    ".usage",
    ".usage.inputTokens",
    ".messages",
]
MESSAGE = [
    "",
    ".message",
    ".message.role",
    ".message.content",
    ".message.content.0",
    ".message.tracking_id",
    ".message_id",
    ".redact_message",
    ".redact_message.content",
    ".created_at",
    ".updated_at",
    ".attachments",
    ".event_loop_metrics",
    ".guardrail_event",
]
AGENTS = ["agents", *(f"agents.agent{path}" for path in AGENT)]
CALL = [
    *(f"agents.agent.messages.1{path}" for path in MESSAGE),
    "agents.agent.messages.1.message.content.0.toolUse",
    "agents.agent.messages.2.message.content.0.toolResult",
]
REDACTED = [f"agents.agent.messages.4{path}" for path in MESSAGE]
PATHS = [*SESSION, *AGENTS, *CALL, *REDACTED]

READ = CodecOptions(tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO)

Documents = Collection[dict[str, Any]]
Some = Callable[[Iterable[Any], int], list[Any]]


def usual() -> dict[str, Any]:
    session = old_session(agent=old_agent("agent", *conversation(), state={"visits": 3}), other=old_agent("other"))
    session["agents"]["agent"]["usage"] = {"inputTokens": 12}
    session["agents"]["agent"]["agent_data"]["_internal_state"]["model_state"] = {}
    session["agents"]["agent"]["agent_data"]["config_set"] = ["model", "system_prompt"]
    session["multi_agents"] = {"graph": {"state": {"type": "graph"}, "revision": 0, "writer": "w"}}
    return session


def put(document: Any, path: str, value: Any) -> None:
    *way, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    for name in way:
        try:
            document = document[name]
        except (KeyError, IndexError, TypeError):
            return  # another odd value is there already
    if not isinstance(document, list if isinstance(last, int) else dict):
        return
    if value is not ABSENT:
        if isinstance(document, dict) or last < len(document):
            document[last] = value
    elif isinstance(document, dict):
        document.pop(last, None)
    elif last < len(document):
        del document[last]


def attempt(function: Any, *args: Any, **options: Any) -> Any:
    """Call a function; return what it returns, or the error of ours that names the session and a field."""
    try:
        return function(*args, **options)
    except MongoDBSessionError as error:
        refusal = error
    assert re.search("session '[sf]'", str(refusal)), refusal
    assert re.search("'(agents|multi_agents|metadata|feedbacks|guardrail_)|no (agent|message)", str(refusal)), refusal
    return refusal


def is_error(outcome: Any) -> bool:
    return isinstance(outcome, MongoDBSessionError)


def left(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the paths at which `after` does not hold what `before` holds."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            yield from left(value, after.get(name, ABSENT), f"{path}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(after) >= len(before):
        for n, value in enumerate(before):
            yield from left(value, after[n], f"{path}.{n}")
    elif after is ABSENT or bson.encode({"": before}) != bson.encode({"": after}):
        yield path


FOLLOWS = (
    # What a turn, or opening, is to change.
    ".updated_at",
    ".incarnation",
    ".migrating",
    ".moved",
    ".session_ttl",
    ".removed_attachments",
    ".agents.agent.updated_at",
    ".agents.agent.agent_data.updated_at",
    ".agents.agent.agent_data.model",
    ".agents.agent.agent_data.system_prompt",
    ".agents.agent.usage",
    ".agents.agent.agent_data.config_set",
    ".agents.agent.agent_data.state",
    ".agents.agent.agent_data.conversation_manager_state",
    ".agents.agent.agent_data._internal_state",
)


class Server:
    """Documents, and what every test does with one."""

    def __init__(self, factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository) -> None:
        self.factory, self.repository = factory, repository
        self.stored: Documents
        self.some: Some

    def use(self, document: dict[str, Any]) -> None:
        self.stored.delete_many({})
        self.stored.insert_one(copy.deepcopy(document))
        self.read_before()
        self.read(5)
        # With a turn, or with an error before anything of it is stored.
        with self.factory.create_session_manager("s") as manager:
            made = attempt(lambda: agent(manager, "a reply"))
            eventually(lambda: not self.factory._connection._tasks)  # opening removes odd lists of attachments
            after_opening = self.stored.find_one({"_id": "s"})
            said = made if is_error(made) else attempt(made, "a prompt")
            attempt(manager.list_agents)
            attempt(manager.get_application_name)
        after = self.stored.find_one({"_id": "s"})
        assert after is not None
        if is_error(said):
            assert after == after_opening
        else:
            assert made.messages[-1]["content"] == [{"text": "a reply"}]
            assert texts(after["agents"]["agent"]["messages"][-2:]) == ["a prompt", "a reply"]
            with self.factory.create_session_manager("s") as manager:
                again = agent(manager, "never said")
            assert texts(again.messages[-2:]) == ["a prompt", "a reply"]
        lost = [path for path in left(document, after) if not path.startswith(FOLLOWS) and not was_null(document, path)]
        lost = [path for path in lost if not path.endswith(".message_id")]  # an id that is none is exchanged
        assert not lost, lost
        self.read(2)
        if not is_error(attempt(self.repository.fork_session, "s", "f")):
            assert self.repository.get_usage("f") == self.repository.get_usage("s")
            attempt(self.repository.read_agent, "f", "agent")
            attempt(self.repository.list_messages, "f", "agent")
        attempt(lambda: list(self.repository.export_session("s")))
        attempt(self.repository.update_metadata, "s", {"a": 1})
        attempt(self.repository.add_feedback, "s", {"rating": "up"})
        assert self.repository.delete_session("s")
        assert self.stored.find_one({"_id": "s"}) is None

    def read_before(self) -> None:
        """Ask what reads one field, or the session among others."""
        repository = self.repository
        assert repository.session_exists("s")
        assert repository.count_sessions() == 1
        for order in ("-updated_at", "created_at"):
            repository.list_sessions(order=order, limit=1)  # one without a date is in no order of it
        attempt(repository.list_messages, "s", "agent", limit=2, offset=3)
        for n in (0, 5):
            attempt(repository.read_message, "s", "agent", n)

    def read(self, count: int) -> None:
        """Ask so many of what reads a session."""
        repository = self.repository
        assert repository.read_session("s") is not None
        attempt(repository.list_messages, "s", "agent")
        readings: list[Callable[[], Any]] = [
            lambda: repository.get_feedbacks("s"),
            lambda: repository.list_agents("s"),
            lambda: repository.get_usage("s"),
            lambda: repository.get_metadata("s")["metadata"].items(),
            lambda: attempt(repository.get_agent_config, "s", "agent"),
            lambda: attempt(repository.read_agent, "s", "agent"),
            lambda: attempt(repository.get_message_count, "s", "agent"),
            lambda: attempt(repository.read_message, "s", "agent", 1),
            lambda: attempt(repository.read_message, "s", "agent", 4),
        ]
        for reading in self.some(readings, count):
            reading()


def was_null(document: Any, path: str) -> bool:
    """Return whether a field held `null`, in whose place there may be something by now."""
    for name in path.split(".")[1:]:
        document = document[int(name)] if isinstance(document, list) else document[name]
    return document is None


@pytest.fixture(scope="module")
def connected(server: str, shared_database: str) -> Iterator[Server]:
    with (
        MongoDBSessionManagerFactory(server, shared_database) as factory,
        MongoDBSessionRepository(server, shared_database) as repository,
    ):
        yield Server(factory, repository)


@pytest.fixture
def repository(database: str, connected: Server) -> MongoDBSessionRepository:
    return connected.repository


@pytest.fixture
def odd_server(connected: Server, stored: Documents, some: Some) -> Server:
    connected.stored, connected.some = stored.with_options(READ), some
    return connected


TOGETHER = [*((path,) for path in AGENTS), *zip_longest(REDACTED, CALL, SESSION)]
"""Each path; those of two messages with one of the session, which keep no agent from its turn."""


@pytest.mark.parametrize(
    "paths", alternating(*((paths,) for paths in TOGETHER)), ids=lambda paths: " ".join(filter(None, paths))
)
def test_a_session_with_an_odd_field_is_used(odd_server: Server, some: Some, paths: tuple[str | None, ...]) -> None:
    fields = [path for path in paths if path is not None]
    for values in zip(*(some(ODD, 1) for _ in fields), strict=True):
        document = usual()
        for path, value in zip(fields, values, strict=True):
            put(document, path, value)
        document.setdefault("colour", uuid.uuid4().hex)
        try:
            odd_server.use(document)
        except BaseException as error:
            error.add_note(f"{fields} = {values!r}")
            raise


PARALLEL_ARRAYS = 171

odd_values = st.sampled_from(ODD + ODDER) | st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=3).filter(lambda t: "\0" not in t),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "role", "v"]), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=settings.default.max_examples // 5)
@example([("agents.agent.messages.1.message_id", [])])
@example([("migrating", None), ("agents.agent.messages.4.attachments", [])])
@example([("migrating", [[]])])
@given(st.lists(st.tuples(st.sampled_from(PATHS), odd_values), min_size=1, max_size=4))
def test_a_session_with_several_odd_fields_is_used(odd_server: Server, fields: list[tuple[str, Any]]) -> None:
    document = usual()
    for path, value in fields:
        put(document, path, copy.deepcopy(value))
    try:
        odd_server.use(document)
    except pymongo.errors.WriteError as error:
        assume(error.code != PARALLEL_ARRAYS)  # the server stores no document with arrays in two fields of one index
        raise


# What is read in the place of what cannot be used.


def put_in(stored: Documents, path: str, value: Any) -> dict[str, Any]:
    document = usual()
    put(document, path, value)
    stored.insert_one(document)
    return document


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mongodb_session_manager") and record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("value", ["chat", "default", "agent", None, 5, {"a": 1}, ABSENT], ids=repr)
def test_a_session_of_any_type_opens(
    factory: MongoDBSessionManagerFactory, stored: Documents, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    put_in(stored, "session_type", value)
    with factory.create_session_manager("s") as manager:
        first = agent(manager, "a reply")
        first("a prompt")
    assert len(first.messages) == 8
    assert manager.session.session_type == "AGENT"
    assert (stored.find_one() or {}).get("session_type", ABSENT) == value
    assert warnings(caplog) == []


def test_what_cannot_be_used_is_told_once_without_what_it_holds(
    factory: MongoDBSessionManagerFactory, stored: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    document = usual()
    document["_id"] = name = f"s\n{uuid.uuid4().hex}"
    document["agents"]["agent"]["agent_data"]["state"] = ["secret"]
    document["agents"]["agent"]["messages"] += [{"message": "secret"}, "secret", {"message": {"role": "secret"}}]
    stored.insert_one(document)
    for _ in range(2):
        with factory.create_session_manager(name) as manager:
            first = agent(manager, "a reply")
            assert len(first.messages) == 6
    told = warnings(caplog)
    assert len(told) == 2
    assert all(repr(name) in line and "agents.agent." in line for line in told)
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "redacted", ["x", 5, False, [], {}, {"role": "user"}, {"role": "user", "content": 5}], ids=repr
)
def test_a_redacted_message_is_never_shown_as_it_was(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Documents, redacted: Any
) -> None:
    document = put_in(stored, "agents.agent.messages.4.redact_message", redacted)
    with factory.create_session_manager("s") as manager:
        first = agent(manager)
    assert "4111" not in repr(first.messages)
    assert "4111" not in repr(repository.list_messages("s", "agent"))
    with pytest.raises(MongoDBSessionError, match=r"session 's' .* 'agents\.agent\.messages'"):
        repository.read_message("s", "agent", 4)
    after = stored.find_one()
    assert after is not None
    assert after["agents"]["agent"]["messages"] == document["agents"]["agent"]["messages"]


@pytest.mark.parametrize(
    ("content", "restored"),
    [
        ("Hi", [{"text": "Hi"}]),
        ([{"text": "Hi"}, None, "x", {"toolUse": None}, {"toolResult": {}}], [{"text": "Hi"}]),
        ([], []),
    ],
    ids=["text", "odd blocks", "none"],
)
def test_a_message_is_restored_with_what_can_be_used_of_it(
    factory: MongoDBSessionManagerFactory, stored: Documents, content: Any, restored: Any
) -> None:
    put_in(stored, "agents.agent.messages.3.message.content", content)
    with factory.create_session_manager("s") as manager:
        assert agent(manager).messages[3]["content"] == restored
    after = stored.find_one()
    assert after is not None
    assert after["agents"]["agent"]["messages"][3]["message"]["content"] == content


@pytest.mark.parametrize("name", ["state", "conversation_manager_state", "_internal_state"])
def test_odd_state_is_kept_until_the_agent_has_another(
    factory: MongoDBSessionManagerFactory, stored: Documents, name: str
) -> None:
    odd = ["what", {"nobody": "understands"}]
    put_in(stored, f"agents.agent.agent_data.{name}", odd)

    def data() -> Any:
        return (stored.find_one() or {})["agents"]["agent"]["agent_data"]

    with factory.create_session_manager("s") as manager:
        agent(manager, "a reply")("a prompt")
    assert data()[name] == odd
    with factory.create_session_manager("s") as manager:
        first = agent(manager, "a reply")
        assert len(first.messages) == 8
        first.state.set("visits", 4)
        first.conversation_manager.removed_message_count = 2
        first("a prompt")
    assert data()["state"] == {"visits": 4} if name == "state" else data()["state"]["visits"] == 4
    assert (data()[name] == odd) == (name == "_internal_state")


DATES = {
    "2024-11-05T09:30:00Z": "2024-11-05T09:30:00+00:00",
    "2024-11-05 10:30:00.123456+01:00": "2024-11-05T09:30:00.123000+00:00",
    "2024-11-05": "2024-11-05T00:00:00+00:00",
    1730799000: "2024-11-05T09:30:00+00:00",
    1730799000.5: "2024-11-05T09:30:00.500000+00:00",
    1730799000123: "2024-11-05T09:30:00.123000+00:00",
}


@pytest.mark.parametrize(("value", "read"), DATES.items())
def test_a_date_is_read_in_each_form(
    repository: MongoDBSessionRepository, stored: Documents, value: Any, read: str
) -> None:
    document = usual()
    for path in ("created_at", "agents.agent.agent_data.created_at", "agents.agent.messages.1.created_at"):
        put(document, path, value)
    stored.insert_one(document)
    session, stored_agent = repository.read_session("s"), repository.read_agent("s", "agent")
    message = repository.list_messages("s", "agent")[1]
    assert session is not None
    assert stored_agent is not None
    assert [found.created_at for found in (session, stored_agent, message)] == [read] * 3


@pytest.mark.parametrize(
    "value", ["garbage", float("nan"), 1e300, DatetimeMS(2**55), DatetimeMS(-(2**55)), b"x"], ids=repr
)
def test_what_is_no_date_is_read_as_the_present(
    repository: MongoDBSessionRepository, stored: Documents, value: Any
) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    put_in(stored, "agents.agent.messages.1.created_at", value)
    assert datetime.fromisoformat(repository.list_messages("s", "agent")[1].created_at) >= before


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("agents", ["x"], "agents"),
        ("agents.agent", "x", "agents.agent"),
        ("agents.agent.messages", {"0": "x"}, "agents.agent.messages"),
        ("agents.agent.agent_data", 5, "agents.agent.agent_data"),
        ("agents.agent.agent_data.state", {"at": CREATED}, "agents.agent.agent_data.state"),
        (
            "agents.agent.agent_data.conversation_manager_state.__name__",
            "Another",
            "agents.agent.agent_data.conversation_manager_state",
        ),
        (
            "agents.agent.agent_data._internal_state.interrupt_state",
            {"activated": 1, "context": {}, "interrupts": {"i": 5}},
            "agents.agent.agent_data._internal_state",
        ),
        (
            "agents.agent.agent_data._internal_state.interrupt_state",
            {"activated": True, "context": {}, "interrupts": {}, "pending_tool_execution": {"another": 1}},
            "agents.agent.agent_data._internal_state",
        ),
    ],
)
def test_an_agent_that_cannot_be_restored_says_so_before_anything_is_said(
    factory: MongoDBSessionManagerFactory, stored: Documents, path: str, value: Any, field: str
) -> None:
    document = put_in(stored, path, value)
    with factory.create_session_manager("s") as manager:
        with pytest.raises(DatabaseError, match=rf"^session 's'.*the field '{re.escape(field)}'") as refused:
            agent(manager, "a reply")
        assert refused.value.__cause__ is None
        if path != "agents":
            agent(manager, "a reply", agent_id="third")("a prompt")
    after = stored.find_one() or {}
    moved = {".updated_at", ".agents.agent.agent_data.config_set"}  # the second is where 1.0.0 kept it
    assert not [path for path in left(document, after) if path not in moved]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("metadata", lambda repository: repository.update_metadata("s", {"a": 1})),
        ("feedbacks", lambda repository: repository.add_feedback("s", {"rating": "up"})),
        ("agents.agent.agent_data", lambda repository: repository.update_agent_config("s", "agent", model="m")),
    ],
    ids=["metadata", "feedbacks", "configuration"],
)
def test_a_field_that_cannot_be_written_into_is_named_and_null_is_as_none(
    repository: MongoDBSessionRepository, stored: Documents, path: str, change: Any
) -> None:
    put_in(stored, path, "secret")
    with pytest.raises(DatabaseError, match=rf"^session 's' holds a str in the field '{re.escape(path)}'") as refused:
        change(repository)
    assert "secret" not in str(refused.value)
    stored.delete_many({})
    put_in(stored, path, None)
    change(repository)
    after = stored.find_one()
    for name in path.split("."):
        after = (after or {})[name]
    assert after


def test_a_date_beyond_the_calendar_ends_no_list(repository: MongoDBSessionRepository, stored: Documents) -> None:
    for number, moment in enumerate([DatetimeMS(2**55), DatetimeMS(-(2**55)), CREATED, CREATED]):
        stored.insert_one({**usual(), "_id": f"s{number}", "updated_at": moment})
    for order in ("-updated_at", "updated_at"):
        cursor, found = None, []
        for _ in range(3):
            page = repository.list_sessions(order=order, limit=1, cursor=cursor)
            cursor, found = page.next_cursor, [*found, *(each.session_id for each in page.sessions)]
            if cursor is None:
                break
        assert sorted(found) == ["s2", "s3"]
    assert repository.count_sessions() == 4


# One odd document must not end what is asked of all sessions.


def packed(times: int) -> Any:
    """What `encode` writes for a value too deep for a document, again and again within itself."""
    value: Any = 1
    for _ in range(times):
        for _ in range(80):
            value = [value]
        value = {"__msm__": "bson", "v": bson.encode({"v": value})}
    return value


def nested_bson(levels: int) -> bytes:
    """The BSON of lists within lists, deeper than the driver encodes it."""
    data = b"\x10v\0\1\0\0\0"
    for _ in range(levels):
        data = b"\x030\0" + (len(data) + 5).to_bytes(4, "little") + data + b"\0"
    return (len(data) + 5).to_bytes(4, "little") + b"\x03v\0" + data[3:] + b"\0"


def not_utf8(document: dict[str, Any]) -> RawBSONDocument:
    return RawBSONDocument(bson.encode(document).replace(b"????", b"\xff\xfe\xfa\xf0"))


ODDEST: dict[str, Any] = {
    "null": None,
    "set": {"__msm__": "set"},
    "set of dicts": {"__msm__": "set", "v": [{"a": 1}]},
    "set of nothing": {"__msm__": "set", "v": None},
    "pairs": {"__msm__": "dict", "v": [[1], [[], 2]]},
    "nested": {"__msm__": "tuple", "v": [{"__msm__": "set", "v": [{"__msm__": "tuple", "v": [{}]}]}]},
    "int": {"__msm__": "int", "v": "1" * 6000},
    "timedelta": {"__msm__": "timedelta", "v": "9" * 30},
    "binary": {"__msm__": "binary", "v": b""},
    "bytes": {"__bytes_encoded__": True, "data": "***"},
    "bson": {"__msm__": "bson", "v": b"zzz"},
    "packed": packed(12),
    "packed deep": {"__msm__": "bson", "v": nested_bson(3000)},
    "nan": float("nan"),
    "infinity": float("-inf"),
    "largest": Int64(2**63 - 1),
    "least": Int64(-(2**63)),
    "date": DatetimeMS(2**62),
    "early date": DatetimeMS(-(2**62)),
    "uuid": Binary(b"x" * 15, 4),
    "dbref": {"$ref": "a", "$id": 1},
    "text": not_utf8({"a": "????"}),
    "key": not_utf8({"????": 1}),
    "usage": {"inputTokens": None, "outputTokens": float("nan"), "totalTokens": Int64(2**63 - 1), "toolCalls": "x"},
}
EVERYWHERE = [
    "metadata",
    "metadata.a",
    "feedbacks",
    "feedbacks.0",
    "feedbacks.0.created_at",
    "created_at",
    "updated_at",
    "application_name",
    "agents.agent.usage",
    "agents.agent.usage.inputTokens",
    "agents.agent.agent_data.prompt_metadata",
    "agents.agent.agent_data.system_prompt",
    "agents.agent.agent_data.conversation_manager_state",
    "agents.agent.agent_data.conversation_manager_state.removed_message_count",
    "agents.agent.agent_data._internal_state",
    "agents.agent.messages.0.message",
    "agents.agent.messages.0.message.content.0",
    "agents.agent.messages.0.event_loop_metrics",
    "multi_agents.graph",
]


@pytest.fixture(scope="module")
def good(server: str, shared_database: str, driver: pymongo.MongoClient[dict[str, Any]]) -> dict[str, Any]:
    """The document of a session without anything odd, as it is stored today."""
    with (
        MongoDBSessionManagerFactory(server, shared_database) as factory,
        factory.create_session_manager("good") as manager,
    ):
        agent(manager, "hello")("hi")
        manager.update_metadata({"a": 1})
        manager.add_feedback({"a": 1})
    found = driver[shared_database]["agent_sessions"].find_one({"_id": "good"})
    assert found is not None
    return found


def test_odd_documents_end_no_list_and_their_sessions_go_on(
    good: dict[str, Any], factory: MongoDBSessionManagerFactory, stored: Documents, some: Some
) -> None:
    paths = {name: some(EVERYWHERE, 1) for name in ODDEST}
    stored.insert_one(good)
    for number in range(max(map(len, paths.values()))):
        stored.delete_many({"_id": {"$ne": "good"}})
        for name, found in paths.items():
            stored.insert_one({**good, "_id": name, "session_id": name})
            stored.update_one({"_id": name}, {"$set": {found[number]: ODDEST[name]}})
        go_on(factory, {name: found[number] for name, found in paths.items()})


def go_on(factory: MongoDBSessionManagerFactory, odd_fields: dict[str, str]) -> None:
    """List the sessions, of which those of these names have an odd value at these paths, and use each of them."""
    where = str(odd_fields)
    try:
        for order in ("updated_at", "created_at"):
            listed = factory.list_sessions(order=order, limit=100).sessions
            assert "good" in [summary.session_id for summary in listed]
        assert factory.count_sessions() == 1 + len(odd_fields)
        for name, path in odd_fields.items():
            where = f"{name}: {path}"
            with factory.create_session_manager(name) as odd:
                odd.get_metadata()
                odd.get_feedbacks()
                assert all(value == value and abs(value) < 2**63 for value in odd.get_usage()["total"].values())
                odd.list_agents()
                odd.list_messages("agent")
                agent(odd, "again")("hi")
    except BaseException as error:
        error.add_note(where)
        raise
