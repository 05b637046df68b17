"""State, metadata and feedback that a session's document has no room for: refused by name, and the rest goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from strands import Agent
from strands.agent.conversation_manager import SlidingWindowConversationManager
from strands.types.session import Session, SessionAgent, SessionMessage

from mongodb_session_manager import (
    DatabaseError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
    StateTooLargeError,
)
from mongodb_session_manager._format.changes import AppendMessage, UpdateAgent
from mongodb_session_manager._format.dates import now
from mongodb_session_manager._format.documents import agent_state, stored_message
from orchestrators import Odd
from support import CommandLog, agent, alternating, apply, fail_point, texts, untraced

MIB = 1024 * 1024
LARGE = "x" * (17 * MIB)
IMAGE = {"image": {"format": "png", "source": {"bytes": b"z" * 300_000}}}
ALONE = r"takes (at least )?178\d{5} bytes, but a MongoDB document can hold at most 16777216$"


@pytest.fixture(autouse=True, scope="module")
def nothing_is_traced() -> Iterator[None]:
    with untraced():
        yield


def ask(live: Agent, text: Any) -> None:
    live(text)


def ask_async(live: Agent, text: Any) -> None:
    asyncio.run(live.invoke_async(text))


class Remembering(SlidingWindowConversationManager):
    """Keeps something large in its state."""

    kept: str = ""

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "kept": self.kept}


class Holder:
    """A manager with one agent, and a field of that agent to fill."""

    def __init__(self, factory: MongoDBSessionManagerFactory, field: str, **options: Any) -> None:
        self.field = field
        self.manager = factory.create_session_manager("s", **options)
        self.memory = Remembering()
        self.agent = agent(self.manager, *map(str, range(1, 9)), conversation_manager=self.memory)

    def fill(self, value: str) -> None:
        if self.field == "state":
            self.agent.state.set("kept", value)
        elif self.field == "conversation_manager_state":
            self.memory.kept = value
        else:
            self.agent._model_state["kept"] = value

    def stored(self, stored: Any) -> Any:
        data = stored.find_one({"_id": "s"}, ["agents.agent.agent_data"])["agents"]["agent"]["agent_data"][self.field]
        return (data["model_state"] if self.field == "_internal_state" else data).get("kept")


def conversation(stored: Any, key: str = "agent") -> list[str]:
    """Return what an agent's messages say, those in the archive first."""
    fields = [f"agents.{key}.{name}" for name in ("messages", "archived")]
    head = stored.find_one({"_id": "s"}, fields)["agents"][key]
    older = {"_id.agent": key, "_id.first": {"$lt": head.get("archived", 0)}}
    buckets = stored.database["agent_sessions_archive"].find(older, sort=[("_id", 1)])
    return texts([*(message for bucket in buckets for message in bucket["messages"]), *head["messages"]])


@pytest.mark.parametrize(
    ("field", "save_on", "ask"),
    alternating(
        ("state", "message", ask),
        ("state", "invocation", ask_async),
        ("conversation_manager_state", "message", ask_async),
        ("_internal_state", "invocation", ask),
    ),
)
def test_the_state_of_an_agent_is_refused_by_name_and_its_messages_are_stored(
    factory: MongoDBSessionManagerFactory, stored: Any, ask: Callable[..., None], field: str, save_on: str
) -> None:
    holder = Holder(factory, field, save_on=save_on)
    holder.fill("small")
    ask(holder.agent, "one")
    holder.fill(LARGE)
    says = rf"^session 's': {field} of agent 'agent' was not stored: it {ALONE}"
    with pytest.raises(StateTooLargeError, match=says) as raised:
        ask(holder.agent, "two")
    assert raised.value.__cause__ is None  # whose message could quote what was refused
    assert conversation(stored)[:3] == ["one", "1", "two"]
    assert holder.stored(stored) == "small"

    ask(holder.agent, "three")  # told once
    assert conversation(stored) == texts(holder.agent.messages)
    assert conversation(stored)[-2:] == ["three", str(len(holder.agent.model.calls))]
    with pytest.raises(StateTooLargeError, match=f"{field} of agent 'agent'"):
        holder.manager.flush()

    holder.fill("small again")
    ask(holder.agent, "four")
    holder.manager.flush()
    assert holder.stored(stored) == "small again"
    holder.manager.close()
    with factory.create_session_manager("s") as manager:
        restored = agent(manager, conversation_manager=Remembering())
        assert texts(restored.messages) == conversation(stored) == texts(holder.agent.messages)


def test_the_other_fields_of_the_agent_are_stored(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    holder = Holder(factory, "state")
    holder.agent("one")
    holder.fill(LARGE)
    holder.memory.kept = "new"
    with pytest.raises(StateTooLargeError, match="state of agent"):
        holder.agent("two")
    data = stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]
    assert data["conversation_manager_state"]["kept"] == "new"
    assert data["state"] == {}


def test_two_fields_that_only_together_are_too_large(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    holder = Holder(factory, "state")
    holder.agent("one")
    holder.fill("x" * (9 * MIB))
    holder.memory.kept = "y" * (8 * MIB)
    with pytest.raises(
        StateTooLargeError, match=r": state of agent 'agent' was not stored: .* its largest parts are: "
    ):
        holder.agent("two")
    data = stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]
    assert len(data["conversation_manager_state"]["kept"]) == 8 * MIB
    assert conversation(stored)[:3] == ["one", "1", "two"]


def test_an_agent_that_begins_with_too_much(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    live = agent(factory.create_session_manager("s"), "1", "2", state={"kept": LARGE}, system_prompt=LARGE)
    with pytest.raises(StateTooLargeError, match=f"of agent 'agent' was not stored: it {ALONE}"):
        live("one")
    live("two")
    assert conversation(stored) == ["one", "two", "1"]
    data = stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]
    assert "state" not in data
    assert "system_prompt" not in data
    with factory.create_session_manager("s") as manager:
        restored = agent(manager)
        assert texts(restored.messages) == ["one", "two", "1"]
        assert restored.state.get() == {}


@pytest.mark.parametrize("first", ["message", "state"])
def test_a_message_and_a_state_that_fit_one_after_the_other_are_stored(
    repository: MongoDBSessionRepository, stored: Any, first: str
) -> None:
    """The state without the message, and then the message, for which the state leaves no room but in the archive."""
    repository.open_session("s")
    repository.create_agent("s", SessionAgent("agent", {}, {}))
    message = SessionMessage({"role": "user", "content": [{"text": "y" * (9 * MIB)}]}, 0)
    state = agent_state(SessionAgent("agent", {"kept": "x" * (9 * MIB)}, {}))
    changes = [AppendMessage("agent", stored_message(message, 0)), UpdateAgent("agent", 0, state, now())]
    assert apply(repository, "s", changes if first == "message" else changes[::-1]) == {}
    assert len(repository.read_agent("s", "agent").state["kept"]) == 9 * MIB
    assert [len(text) for text in conversation(stored)] == [9 * MIB]


@pytest.mark.parametrize(("command", "times"), alternating(("update", 1), ("aggregate", 2), ("findAndModify", 2)))
def test_a_failure_in_between_stores_everything_once(
    server: str, factory: MongoDBSessionManagerFactory, stored: Any, command: str, times: int
) -> None:
    """What archives messages is tried in the background first."""
    holder = Holder(factory, "state")
    holder.agent("one")
    holder.fill("x" * (9 * MIB))
    with fail_point(server, failCommands=[command], errorCode=8, times=times), pytest.raises(DatabaseError):
        holder.agent("y" * (9 * MIB))
    holder.manager.flush()
    holder.agent("three")
    assert len(holder.stored(stored)) == 9 * MIB
    assert conversation(stored) == texts(holder.agent.messages)


def test_the_messages_of_several_statements_are_stored(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    holder = Holder(factory, "state", save_on="invocation")
    holder.fill(LARGE)
    holder.agent.model.replies.appendleft("y" * (9 * MIB))
    with pytest.raises(StateTooLargeError, match="state of agent 'agent'"):
        holder.agent("x" * (9 * MIB))
    assert [text[0] for text in conversation(stored)] == ["x", "y"]
    holder.manager.close()


def test_another_agent_in_the_same_statement_is_stored(repository: MongoDBSessionRepository) -> None:
    repository.open_session("s")
    for name in ("large", "small"):
        repository.create_agent("s", SessionAgent(name, {}, {}))
    changes = [
        UpdateAgent(name, 0, agent_state(SessionAgent(name, {"kept": kept}, {})), now())
        for name, kept in (("large", LARGE), ("small", 1))
    ]
    [(refused, error)] = apply(repository, "s", changes).items()
    assert refused == "large"
    assert isinstance(error, StateTooLargeError)
    assert repository.read_agent("s", "small").state == {"kept": 1}
    assert repository.read_agent("s", "large").state == {}


def test_a_stale_agent_is_refused_as_one(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    holder = Holder(factory, "state")
    holder.agent("one")
    other = agent(factory.create_session_manager("s"), "2", conversation_manager=Remembering())
    other("two")
    holder.fill(LARGE)
    with pytest.raises(SessionConflictError):
        holder.agent("three")
    assert conversation(stored) == ["one", "1", "two", "2"]


def test_closing_tells_it_if_nobody_was_told(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    holder = Holder(factory, "state")
    holder.agent("one")
    holder.fill(LARGE)

    async def sync() -> None:
        holder.manager.sync_agent(holder.agent)

    asyncio.run(sync())
    with pytest.raises(StateTooLargeError, match="state of agent 'agent'"):
        holder.manager.close()
    assert holder.stored(stored) is None


def test_states_of_two_agents_that_together_are_too_large(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    manager = factory.create_session_manager("s", save_on="invocation")
    first, second = (agent(manager, "1", "2", "3", agent_id=name) for name in ("first", "second"))
    first.state.set("kept", "x" * (9 * MIB))
    first("one")
    second.state.set("kept", "y" * (9 * MIB))
    says = (
        r"^session 's': state of agent 'second' was not stored: it takes 94\d{5} bytes, and with it the session's "
        r"document would exceed 16777216 bytes; its largest parts are: state of agent 'first' \(94\d{5} bytes\), "
    )
    with pytest.raises(StateTooLargeError, match=says):
        second("one")
    first("two")
    second("two")
    assert conversation(stored, "first") == ["one", "1", "two", "2"]
    assert conversation(stored, "second") == ["one", "1", "two", "2"]
    first.state.set("kept", "small")
    first("three")
    second.state.set("kept", "y" * (9 * MIB) + "!")
    second("three")
    manager.flush()
    assert len(stored.find_one({"_id": "s"})["agents"]["second"]["agent_data"]["state"]["kept"]) == 9 * MIB + 1


def test_what_is_too_large_alone_is_not_sent(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    manager = factory.create_session_manager("s")
    manager.initialize_multi_agent(Odd({}))
    manager.flush()
    commands.clear()
    with pytest.raises(StateTooLargeError):
        manager.sync_multi_agent(Odd(LARGE))
    for refused in (lambda: manager.add_feedback({"comment": LARGE}), lambda: manager.update_metadata({"a": LARGE})):
        with pytest.raises(StateTooLargeError):
            refused()
    assert commands.names == []


# Feedback, metadata, configuration, orchestrators.


@pytest.fixture
def crowded(factory: MongoDBSessionManagerFactory) -> MongoDBSessionManager:
    """The manager of a session whose metadata leaves 10 MiB."""
    manager = factory.create_session_manager("s")
    agent(manager, "1")("one")
    manager.update_metadata({"filler": "x" * (6 * MIB)})
    return manager


PARTS: list[tuple[str, Callable[[MongoDBSessionManager, str], Any]]] = [
    ("feedback", lambda manager, value: manager.add_feedback({"rating": "up", "comment": value})),
    ("metadata", lambda manager, value: manager.update_metadata({"a": 1, "b": value})),
    ("metadata", lambda manager, value: manager.update_metadata({"nested.b": value})),
    ("system_prompt of agent 'agent'", lambda manager, value: manager.update_agent_config("agent", None, value)),
    (
        "prompt_metadata of agent 'agent'",
        lambda manager, value: manager.set_prompt_metadata("agent", {"version": value}),
    ),
    ("state of multi-agent 'odd'", lambda manager, value: sync_odd(manager, value)),
]


def sync_odd(manager: MongoDBSessionManager, value: str) -> None:
    if manager.session_repository.read_multi_agent("s", "odd") is None:
        manager.initialize_multi_agent(Odd({}))
    manager.sync_multi_agent(Odd(value))


@pytest.mark.parametrize(("part", "store"), alternating(*PARTS))
def test_a_part_that_is_too_large_is_refused_by_name_and_the_session_goes_on(
    crowded: MongoDBSessionManager, stored: Any, part: str, store: Any
) -> None:
    with pytest.raises(StateTooLargeError, match=f"^session 's': {part} was not stored: it {ALONE}"):
        store(crowded, LARGE)
    says = rf"^session 's': {part} was not stored: .* its largest parts are: metadata \(629\d{{4}} bytes\), "
    with pytest.raises(StateTooLargeError, match=says):
        store(crowded, "y" * (11 * MIB))
    crowded.append_message({"role": "user", "content": [{"text": "one"}]}, agent(crowded, agent_id="other"))
    assert conversation(stored, "other") == ["one"]
    crowded.delete_metadata(["filler"])
    store(crowded, "y" * (11 * MIB))
    crowded.flush()


@pytest.mark.parametrize(("part", "store"), alternating(PARTS[0], PARTS[1], PARTS[-1]))
def test_old_messages_make_room_for_it(
    factory: MongoDBSessionManagerFactory, stored: Any, part: str, store: Any
) -> None:
    manager = factory.create_session_manager("s")
    manager.append_message({"role": "user", "content": [{"text": "x" * (9 * MIB)}]}, agent(manager))
    store(manager, "y" * (8 * MIB))
    assert [len(text) for text in conversation(stored)] == [9 * MIB]


@pytest.mark.parametrize("ask", alternating(ask, ask_async))
def test_messages_that_find_no_room_are_stored_once_there_is(
    factory: MongoDBSessionManagerFactory, stored: Any, ask: Callable[..., None]
) -> None:
    manager = factory.create_session_manager("s")
    live, other = agent(manager, "1", "2", "3"), agent(manager, agent_id="other")
    live("one")
    manager.add_feedback({"comment": "x" * (8 * MIB)})
    says = (
        r"^session 's': a message of agent 'agent' was not stored: .* largest parts are: feedback \(838\d{4} bytes\), "
    )
    with pytest.raises(StateTooLargeError, match=says) as raised:
        ask(live, [{"text": "y" * (9 * MIB)}, IMAGE])
    assert raised.value.pending
    assert conversation(stored) == ["one", "1"]
    manager.append_message({"role": "user", "content": [{"text": "one"}]}, other)
    assert conversation(stored, "other") == ["one"]
    with pytest.raises(StateTooLargeError, match="a message of agent 'agent'"):
        manager.flush()

    stored.update_one({"_id": "s"}, {"$pop": {"feedbacks": -1}})
    ask(live, "three")
    manager.close()
    with factory.create_session_manager("s") as reopened:
        restored = agent(reopened).messages
    assert restored[2]["content"] == [{"text": "y" * (9 * MIB)}, IMAGE]
    assert conversation(stored) == texts(live.messages)
    assert [len(text) for text in texts(live.messages)][:3] == [3, 1, 9 * MIB]


def test_messages_that_another_agent_could_not_store_are_no_error_once_they_are(
    factory: MongoDBSessionManagerFactory, stored: Any
) -> None:
    manager = factory.create_session_manager("s", save_on="invocation")
    live, other = agent(manager, "1", "2"), agent(manager, "1", agent_id="other")
    live("one")
    manager.update_metadata({"filler": "x" * (8 * MIB)})

    async def append() -> None:
        manager.append_message({"role": "user", "content": [{"text": "y" * (8 * MIB)}]}, live)

    asyncio.run(append())  # which nobody awaits
    other("one")
    manager.delete_metadata(["filler"])
    live("two")
    manager.flush()
    assert [text[:3] for text in conversation(stored)] == ["one", "1", "yyy", "two", "2"]


def test_a_graph_goes_on_storing_once_there_is_room(crowded: MongoDBSessionManager, stored: Any) -> None:
    """Also if its state is the same as the one that was refused."""
    crowded.initialize_multi_agent(Odd({}))
    for _ in range(2):
        with pytest.raises(StateTooLargeError, match="state of multi-agent 'odd'"):
            crowded.sync_multi_agent(Odd({"large": "y" * (11 * MIB)}))
    crowded.delete_metadata(["filler"])
    crowded.sync_multi_agent(Odd({"large": "y" * (11 * MIB)}))
    assert len(stored.find_one({"_id": "s"})["multi_agents"]["odd"]["state"]["large"]) == 11 * MIB


def test_the_repository(repository: MongoDBSessionRepository, stored: Any) -> None:
    repository.create_session(Session("s", "AGENT"))
    repository.create_agent("s", SessionAgent("agent", {"kept": 1}, {}))
    repository.create_message("s", "agent", SessionMessage({"role": "user", "content": [{"text": "one"}]}, 0))
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: repository.update_agent("s", SessionAgent("agent", {"kept": LARGE}, {})), "state of agent 'agent'"),
        (lambda: repository.create_agent("s", SessionAgent("new", {"kept": LARGE}, {})), "state of agent 'new'"),
        (lambda: repository.create_multi_agent("s", Odd(LARGE)), "state of multi-agent 'odd'"),
        (lambda: repository.add_feedback("s", {"comment": LARGE}), "feedback"),
        (lambda: repository.update_metadata("s", {"a": LARGE}), "metadata"),
    ]
    for refused, part in refusals:
        with pytest.raises(StateTooLargeError, match=f"^session 's': {part} was not stored: it {ALONE}"):
            refused()
    assert repository.read_agent("s", "agent").state == {"kept": 1}
    assert conversation(stored) == ["one"]
    repository.create_multi_agent("s", Odd({}))
    with pytest.raises(StateTooLargeError, match="state of multi-agent 'odd'"):
        repository.update_multi_agent("s", Odd(LARGE))
    assert repository.read_multi_agent("s", "odd") == {}


def test_a_session_whose_agents_cannot_be_used_names_its_largest_part(
    repository: MongoDBSessionRepository, stored: Any
) -> None:
    stored.insert_one({"_id": "s", "agents": "none", "metadata": {"large": "x" * (9 * MIB)}})
    with pytest.raises(StateTooLargeError, match=r"its largest parts are: metadata \(") as raised:
        repository.update_metadata("s", {"more": "x" * (8 * MIB)})
    assert (raised.value.code, raised.value.operation) == (10334, "update_one")
