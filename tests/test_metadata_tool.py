"""The tool `manage_metadata`, called by a model through a real agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from bson import Decimal128, ObjectId
from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo.collection import Collection
from pymongo.errors import ConnectionFailure
from strands.interrupt import Interrupt, InterruptException

from mongodb_session_manager import (
    DatabaseUnavailableError,
    FeedbackSNSHook,
    InvalidArgumentError,
    MetadataSQSHook,
    MetadataWebSocketHook,
    MongoDBSessionManagerFactory,
    SessionNotFoundError,
)
from mongodb_session_manager._io.requested_fields import ACTED_ON
from support import CommandLog, agent, alternating, fail_point

Stored = Collection[dict[str, Any]]


class Session:
    """The session "s" through one of the managers, with agents that run in one of two ways."""

    def __init__(
        self, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, is_async: bool, awaited: bool
    ) -> None:
        self._factory, self._runner, self._is_async, self._awaited = factory, runner, is_async, awaited

    def open(self, **options: Any) -> Session:
        create = self._factory.create_session_manager_async if self._is_async else self._factory.create_session_manager
        self.manager = self.run(create, "s", **options)
        return self

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return self._runner.run(result) if asyncio.iscoroutine(result) else result

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self.run, getattr(self.manager, name))

    def ask(self, *inputs: Any, **policy: Any) -> list[str]:
        """Have a model call the tool with each of the inputs, one after the other; return the answers it gets."""
        answers: list[str] = []

        def after(reply: Any) -> Callable[[Any], Any]:
            def next_reply(messages: Any) -> Any:
                (content,) = [block["toolResult"]["content"] for block in messages[-1]["content"]]
                answers.extend(block["text"] for block in content)
                return reply

            return next_reply

        calls = [{"tool": "manage_metadata", "input": given} for given in inputs]
        replies = [calls[0], *(after(call) for call in calls[1:]), after("done")]
        self._serial = getattr(self, "_serial", 0) + 1
        live = agent(
            self.manager,
            *replies,
            agent_id=f"agent{self._serial}",
            tools=[self.manager.get_metadata_tool(**policy)],
        )
        result = self._runner.run(live.invoke_async("go")) if self._awaited else live("go")
        assert str(result) == "done\n"
        assert len(answers) == len(inputs)
        return answers

    def ask_directly(self, *inputs: Any, **policy: Any) -> list[str]:
        """Call the tool with each of the inputs as an agent does, without a model; return the answers."""
        live = agent(None, tools=[self.manager.get_metadata_tool(**policy)], record_direct_tool_call=False)
        results = [live.tool.manage_metadata(**given) for given in inputs]
        return [block["text"] for result in results for block in result["content"]]

    def ask_one(self, given: Any, **policy: Any) -> str:
        return self.ask(given, **policy)[0]

    @property
    def metadata(self) -> Any:
        return self.get_metadata()["metadata"]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(
    params=alternating(False, True),
    ids=["manager", "async manager awaited"],
)
def session(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Session:
    return Session(factory, runner, request.param, request.param).open()


def values(answer: str) -> Any:
    """Return the metadata that an answer of "get" shows."""
    assert answer.startswith("Metadata: ")
    return json.loads(answer.removeprefix("Metadata: "))


def test_every_action(session: Session) -> None:
    answers = session.ask(
        {"action": "get"},
        {"action": "set", "metadata": {"topic": "travel", "city": {"name": "Oslo"}}},
        {"action": "update", "metadata": {"city.rain": True, "step": 2}},
        {"action": "get"},
        {"action": "get", "keys": ["city.name", "step", "unknown"]},
        {"action": "delete", "keys": ["topic", "city.name", "unknown"]},
        {"action": "get"},
    )
    assert answers == [
        "There is no metadata.",
        "Metadata updated: topic, city.",
        "Metadata updated: city.rain, step.",
        'Metadata: {"city": {"name": "Oslo", "rain": true}, "topic": "travel", "step": 2}',
        'Metadata: {"city.name": "Oslo", "step": 2}',
        "Metadata deleted: topic, city.name, unknown.",
        'Metadata: {"city": {"rain": true}, "step": 2}',
    ]
    assert session.metadata == {"city": {"rain": True}, "step": 2}


def test_actions_in_any_case(session: Session) -> None:
    session.ask_directly({"action": "SET", "metadata": {"a": 1}}, {"action": " Update ", "metadata": {"b": 2}})
    assert session.ask_directly({"action": "Get"}) == ['Metadata: {"a": 1, "b": 2}']
    session.ask_directly({"action": "DELETE", "keys": ["a"]})
    assert session.metadata == {"b": 2}


def test_arguments_as_json_strings(session: Session) -> None:
    answers = session.ask(
        {"action": "set", "metadata": '{"topic": "travel", "city": {"name": "Zürich"}}'},
        {"action": "get", "keys": '["city.name"]'},
        {"action": "delete", "keys": '["topic"]'},
    )
    assert answers == [
        "Metadata updated: topic, city.",
        'Metadata: {"city.name": "Zürich"}',
        "Metadata deleted: topic.",
    ]
    assert session.metadata == {"city": {"name": "Zürich"}}


NONSENSE = [
    {"action": "replace", "metadata": {"a": 1}},
    {"action": "", "metadata": {"a": 1}},
    {"action": "$set", "metadata": {"a": 1}},
    {"action": "set"},
    {"action": "update"},
    {"action": "set", "metadata": {}},
    {"action": "set", "metadata": None},
    {"action": "set", "keys": ["a"]},
    {"action": "delete"},
    {"action": "delete", "keys": []},
    {"action": "delete", "metadata": {"kept": 1}},
    {"action": "set", "metadata": "{not json"},
    {"action": "set", "metadata": "kept=2"},
    {"action": "set", "metadata": '["a"]'},
    {"action": "set", "metadata": "7"},
    {"action": "set", "metadata": ["a"]},
    {"action": "set", "metadata": "[" * 100_000},
    {"action": "delete", "keys": "kept"},
    {"action": "delete", "keys": '"kept"'},
    {"action": "delete", "keys": '{"kept": 1}'},
    {"action": "delete", "keys": {"kept": 1}},
    {"action": "delete", "keys": [1]},
    {"action": "delete", "keys": 1},
    {"action": "get", "keys": "[1"},
    {"action": "get", "keys": ["$x"]},
    {"action": "set", "metadata": {"$set": {"agents": {}}}},
    {"action": "set", "metadata": {"": 1}},
    {"action": "set", "metadata": {"a..b": 1}},
    {"action": "set", "metadata": {"a": 1, "a.b": 2}},
    {"action": "set", "metadata": {"kept.below": 1}},
    {},
]


def test_nonsense_is_answered_and_changes_nothing(
    session: Session, some: Callable[[list[Any], int], list[Any]]
) -> None:
    session.update_metadata({"kept": "text"})
    for request, answer in zip(NONSENSE, session.ask_directly(*NONSENSE), strict=True):
        assert answer.startswith("Error: "), (request, answer)
    asked = some(NONSENSE, 3)
    for request, answer in zip(asked, session.ask(*asked), strict=True):
        assert answer.startswith("Error: "), (request, answer)
    assert session.metadata == {"kept": "text"}


def test_errors_say_what_to_do(session: Session) -> None:
    answers = session.ask_directly(
        {"action": "replace"},
        {"action": "set"},
        {"action": "delete"},
        {"action": "set", "metadata": "{"},
        {"action": "set", "metadata": {"$x": 1}},
        {"action": "delete", "keys": "[1]"},
    )
    assert answers == [
        "Error: action must be get, set, update or delete",
        "Error: set needs metadata, an object of the keys to set",
        "Error: delete needs keys, a list of the keys to remove",
        "Error: metadata is not valid JSON",
        "Error: metadata contains the key '$x': a key must not be empty, contain NUL, or have a segment between dots "
        "that is empty or begins with $",
        "Error: every key of keys must be a str, not int",
    ]


def test_values_that_json_does_not_know_are_shown_as_text(session: Session) -> None:
    session.update_metadata(
        {
            "when": datetime(2026, 1, 2, tzinfo=UTC),
            "price": Decimal128("1.10"),
            "id": ObjectId("65b2f0c2a1b2c3d4e5f60718"),
        }
    )
    assert values(session.ask_one({"action": "get"})) == {
        "when": "2026-01-02 00:00:00+00:00",
        "price": "1.10",
        "id": "65b2f0c2a1b2c3d4e5f60718",
    }


def test_whatever_is_stored_can_be_shown(session: Session) -> None:
    session.update_metadata({"odd": {(1, 2): "pair", b"x": {1, 2}, None: "none"}, "half": "\ud83d", "plain": 1})
    answer = session.ask_one({"action": "get"})
    assert not answer.startswith("Error")
    assert "pair" in answer
    assert values(session.ask_one({"action": "get", "keys": ["plain"]})) == {"plain": 1}


# What a model may touch.


def test_read_only(session: Session) -> None:
    session.update_metadata({"a": 1})
    answers = session.ask_directly(
        {"action": "get"},
        {"action": "set", "metadata": {"a": 2}},
        {"action": "UPDATE", "metadata": {"b": 2}},
        {"action": "delete", "keys": ["a"]},
        read_only=True,
    )
    assert answers == ['Metadata: {"a": 1}', *["Error: metadata can only be read here"] * 3]
    assert session.metadata == {"a": 1}


def test_allowed_keys(session: Session) -> None:
    session.update_metadata({"profile": {"name": "Ada", "plan": "pro"}, "profiles": 1, "secret": "x"})
    answers = session.ask_directly(
        {"action": "get"},
        {"action": "get", "keys": ["profile.name", "profile.plan"]},
        {"action": "get", "keys": ["secret"]},
        {"action": "get", "keys": ["profile"]},
        {"action": "set", "metadata": {"step": 2, "profile.name.first": "Ada"}},
        {"action": "set", "metadata": {"step": 2, "profile.name": {"last": "Lovelace"}}},
        {"action": "set", "metadata": {"profile": {"plan": "free"}}},
        {"action": "set", "metadata": {"step": 3, "secret": "y"}},
        {"action": "set", "metadata": {"profile.plan": "free"}},
        {"action": "set", "metadata": {"profile.names": "free"}},
        {"action": "delete", "keys": ["profile"]},
        {"action": "delete", "keys": ["step", "secret"]},
        {"action": "delete", "keys": ["profile.name.last", "step"]},
        allowed_keys=["profile.name", "step"],
    )
    refused = "Error: the key '{}' is not one of profile.name, step"
    assert answers == [
        'Metadata: {"profile.name": "Ada"}',
        refused.format("profile.plan"),
        refused.format("secret"),
        refused.format("profile"),
        "Error: a key with dots leads through a stored value that is not a document",
        "Metadata updated: step, profile.name.",
        refused.format("profile"),
        refused.format("secret"),
        refused.format("profile.plan"),
        refused.format("profile.names"),
        refused.format("profile"),
        refused.format("secret"),
        "Metadata deleted: profile.name.last, step.",
    ]
    assert session.metadata == {"profile": {"name": {}, "plan": "pro"}, "profiles": 1, "secret": "x"}


def test_no_allowed_keys_at_all(session: Session) -> None:
    session.update_metadata({"a": 1})
    answers = session.ask_directly({"action": "get"}, {"action": "set", "metadata": {"a": 2}}, allowed_keys=[])
    assert answers[0] == "There is no metadata."
    assert answers[1].startswith("Error: ")
    assert session.metadata == {"a": 1}


def test_bad_allowed_keys_are_refused(session: Session) -> None:
    for allowed in ("profile", {"profile": 1}, ["$x"], [""], [1]):
        with pytest.raises(InvalidArgumentError, match="allowed_keys"):
            session.manager.get_metadata_tool(allowed_keys=allowed)


def test_what_the_model_is_told(session: Session) -> None:
    def told(**policy: Any) -> Any:
        live = agent(None, tools=[session.manager.get_metadata_tool(**policy)])
        (spec,) = live.tool_registry.get_all_tool_specs()
        return spec

    spec = told()
    assert spec["name"] == "manage_metadata"
    schema = spec["inputSchema"]["json"]
    assert schema["required"] == ["action"]
    assert schema["properties"]["action"]["enum"] == ["get", "set", "update", "delete"]
    assert sorted(schema["properties"]) == ["action", "keys", "metadata"]
    assert "Read and change the metadata" in spec["description"]
    assert "Read the metadata" in told(read_only=True)["description"]


# Through the hook.


def test_it_goes_through_a_def_hook(session: Session) -> None:
    calls: list[Any] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        calls.append((action, session_id, kwargs))
        if action == "update":
            return original_func({**kwargs["metadata"], "by": "hook"})
        return original_func(**kwargs)

    session.open(metadata_hook=hook)
    session.ask({"action": "set", "metadata": {"a": 1}}, {"action": "get"}, {"action": "delete", "keys": ["a"]})
    assert calls == [("update", "s", {"metadata": {"a": 1}}), ("get", "s", {}), ("delete", "s", {"keys": ["a"]})]
    assert session.metadata == {"by": "hook"}


def test_it_goes_through_an_async_def_hook(session: Session, stored: Stored) -> None:
    async def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        if action == "get":
            return {"metadata": {"seen": "by the hook"}}
        if action == "delete":
            raise PermissionError("nothing is deleted here")
        return await original_func(**kwargs)

    session.open(metadata_hook=hook)
    answers = session.ask(
        {"action": "set", "metadata": {"a": 1}}, {"action": "get"}, {"action": "delete", "keys": ["a"]}
    )
    assert answers[:2] == ["Metadata updated: a.", 'Metadata: {"seen": "by the hook"}']
    assert answers[2].startswith("Error: ")
    assert stored.find_one({"_id": "s"})["metadata"] == {"a": 1}


# What it costs the conversation.


def test_a_call_costs_its_own_command_and_no_conflict(session: Session, commands: CommandLog, stored: Stored) -> None:
    commands.clear()
    session.ask({"action": "set", "metadata": {"a": 1}}, {"action": "get"}, {"action": "delete", "keys": ["b"]})
    assert sorted(commands.names) == ["find", *["update"] * (8 + 2)]
    document = stored.find_one({"_id": "s"})
    assert len(document["agents"]["agent1"]["messages"]) == 8


# Nothing outside metadata.

SEGMENTS = (
    st.sampled_from(["", " ", "..", ".", "$", "$set", "$[]", "$unset", "\0", "\ud83d", "%24", "__proto__", "__msm__"])
    | st.sampled_from(["_id", "session_id", "agents", "agent1", "messages", "feedbacks", "updated_at", "metadata"])
    | st.sampled_from(["a", "b", "v", "0", "é", "metadata.a"])
)
KEYS = st.lists(SEGMENTS, max_size=4).map(".".join) | st.text(max_size=8)
HOSTILE_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {"action": st.sampled_from(["set", "update", "delete", "get"])},
        optional={
            "metadata": st.dictionaries(KEYS, HOSTILE_VALUES, max_size=3),
            "keys": st.lists(KEYS, max_size=3) | KEYS,
        },
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("is_async", alternating(False, True), ids=["manager", "async manager"])
@pytest.mark.parametrize("allowed_keys", alternating(None, ["a.b", "_id"]), ids=["all keys", "some keys"])
def test_no_key_leads_out_of_metadata(
    factory: MongoDBSessionManagerFactory,
    runner: asyncio.Runner,
    stored: Stored,
    is_async: bool,
    allowed_keys: list[str] | None,
) -> None:
    session = Session(factory, runner, is_async, False).open()
    session.add_feedback({"rating": "up"})
    session.ask_directly({"action": "set", "metadata": {"a": {"c": "kept"}, "kept": 1}})
    factory.create_session_manager("other").update_metadata({"other": 1})

    def outside() -> Any:
        documents = {document.pop("_id"): document for document in stored.find()}
        metadata = documents["s"].pop("metadata")
        documents["s"].pop("updated_at")
        if allowed_keys is not None:
            documents["not allowed"] = metadata
            for path in allowed_keys:
                *parents, last = path.split(".")
                for parent in parents:
                    metadata = metadata[parent]
                metadata.pop(last, None)
                metadata = documents["not allowed"]
        return documents

    before = outside()

    @settings(max_examples=settings.default.max_examples // 3)
    @given(REQUESTS)
    def attack(requests: list[dict[str, Any]]) -> None:
        answers = session.ask_directly(*requests, allowed_keys=allowed_keys)
        assert all(answer.startswith(("Error: ", "Metadata", "There is no metadata.")) for answer in answers)
        assert outside() == before
        assert isinstance(session.metadata, dict)

    attack()


def test_a_model_that_may_only_read_is_offered_nothing_else(session: Session) -> None:
    schema = session.manager.get_metadata_tool(read_only=True).tool_spec["inputSchema"]
    schema = schema.get("json", schema)
    assert schema["properties"]["action"]["enum"] == ["get"]
    assert schema["properties"].keys() == {"action", "keys"}


# Keys that the library acts on.

PROTECTED: list[Any] = [
    {"action": "set", "metadata": {"connection_id": "theirs"}},
    {"action": "update", "metadata": {"topic": "x", "connection_id": "theirs"}},
    {"action": "SET", "metadata": {"connection_id.x": "theirs"}},
    {"action": "set", "metadata": {"Connection_ID": "theirs"}},
    {"action": "set", "metadata": {" connection_id": "theirs"}},
    {"action": "set", "metadata": {"\uff43onnection_id": "theirs"}},
    {"action": "set", "metadata": '{"connection_id": "theirs"}'},
    {"action": "set", "metadata": '{"\\u0063onnection_id": "theirs"}'},
    {"action": "delete", "keys": ["connection_id"]},
    {"action": "delete", "keys": '["topic", "connection_id"]'},
    {"action": "delete", "keys": ["connection_id.x"]},
]


def test_a_model_cannot_redirect_notifications(session: Session, some: Callable[[list[Any], int], list[Any]]) -> None:
    session.update_metadata({"connection_id": "c-1", "topic": "travel"})
    asked = some(PROTECTED, 3)
    for request, answer in zip(
        [*asked, *PROTECTED], session.ask(*asked) + session.ask_directly(*PROTECTED), strict=True
    ):
        assert answer.startswith("Error: the key '"), (request, answer)
        assert answer.endswith("' cannot be changed here"), (request, answer)
    assert session.metadata == {"connection_id": "c-1", "topic": "travel"}
    assert session.ask_one({"action": "get", "keys": ["connection_id"]}) == 'Metadata: {"connection_id": "c-1"}'


def test_keys_that_only_look_alike_are_free(session: Session) -> None:
    session.ask_directly(
        {"action": "set", "metadata": {"connection": 1, "connection_ids": 2, "my": {"connection_id": 3}}}
    )
    assert session.metadata == {"connection": 1, "connection_ids": 2, "my": {"connection_id": 3}}


@pytest.mark.parametrize("allowed", ["connection_id", "connection_id.x"])
def test_a_key_that_is_named_for_the_model_is_writable(session: Session, allowed: str) -> None:
    session.ask_directly({"action": "set", "metadata": {allowed: "c-2"}}, allowed_keys=["topic", allowed])
    assert session.metadata == {"connection_id": "c-2" if allowed == "connection_id" else {"x": "c-2"}}
    session.ask_directly({"action": "delete", "keys": [allowed]}, allowed_keys=[allowed])
    assert session.metadata == ({} if allowed == "connection_id" else {"connection_id": {}})


def test_every_key_that_a_hook_reads_is_one_that_a_model_cannot_write() -> None:
    read = {name for cls in (FeedbackSNSHook, MetadataSQSHook, MetadataWebSocketHook) for name in cls.stored_fields}
    assert read == ACTED_ON


# What fails.


class PrivateError(Exception):
    pass


FAILURES: dict[str, tuple[Exception, str]] = {
    "of the user": (PrivateError("mongodb://ada:s3cret@host said: my card is 4111"), "PrivateError"),
    "of Python": (KeyError("my card is 4111"), "KeyError"),
    "of the database": (DatabaseUnavailableError("no usable MongoDB server: host:27017"), "DatabaseUnavailableError"),
    "of the driver": (ConnectionFailure("host:27017: connection refused"), "ConnectionFailure"),
    "of the session": (SessionNotFoundError("session 's' does not exist"), "SessionNotFoundError"),
}
ACTIONS: list[Any] = [
    {"action": "get"},
    {"action": "set", "metadata": {"a": 1}},
    {"action": "delete", "keys": ["a"]},
]


@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
def test_whatever_fails_is_answered_without_content(
    session: Session, caplog: pytest.LogCaptureFixture, is_async: bool
) -> None:
    errors: list[Exception] = []

    def fail(*_: Any, **__: Any) -> Any:
        raise errors[-1]

    async def fail_async(*_: Any, **__: Any) -> Any:
        raise errors[-1]

    session.open(metadata_hook=fail_async if is_async else fail)
    for error, name in FAILURES.values():
        caplog.clear()
        errors.append(error)
        answers = [f"Error: the metadata could not be used ({name})"] * 3
        if len(errors) == 1:
            assert session.ask(*ACTIONS) == answers
        assert session.ask_directly(*ACTIONS) == answers
        assert "4111" not in caplog.text
        assert "s3cret" not in caplog.text
        assert name in caplog.text or "exist" in caplog.text or "no usable" in caplog.text


def test_what_the_database_refuses_is_answered(session: Session, server: str) -> None:
    with fail_point(server, failCommands=["update"], errorCode=2, times=4):
        (answer,) = session.ask_directly(ACTIONS[1])
    assert answer == "Error: the metadata could not be used (DatabaseError)"
    session.run(session.manager.close)
    (answer,) = session.ask_directly(ACTIONS[1])
    assert answer == "Error: the metadata could not be used (SessionClosedError)"


def test_a_value_that_cannot_be_stored_and_a_hook_with_a_reason_are_answered_in_words(session: Session) -> None:
    def refuse(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        raise InvalidArgumentError("the plan is changed by the sales department")

    session.open(metadata_hook=refuse)
    assert session.ask_one(ACTIONS[1]) == "Error: the plan is changed by the sales department"


def test_an_answer_of_a_hook_that_is_no_metadata_is_an_error(session: Session) -> None:
    session.open(metadata_hook=lambda *_, **__: "prevented")
    assert session.ask_one({"action": "get"}) == "Error: the metadata could not be used (AttributeError)"


def test_a_hook_may_ask_a_person(session: Session) -> None:
    def ask(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        raise InterruptException(Interrupt(id="1", name="approval"))

    session.open(metadata_hook=ask)
    tool = session.manager.get_metadata_tool()
    live = agent(session.manager, {"tool": "manage_metadata", "input": ACTIONS[1]}, tools=[tool])
    assert live("go").stop_reason == "interrupt"


class Ending(BaseException):
    pass


@pytest.mark.parametrize("ending", [Ending, asyncio.CancelledError])
def test_what_ends_a_call_is_no_answer(
    factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, ending: type[BaseException]
) -> None:
    async def end(*_: Any, **__: Any) -> Any:
        raise ending

    session = Session(factory, runner, True, True).open(metadata_hook=end)
    with pytest.raises(ending):
        session.ask_directly({"action": "get"})
