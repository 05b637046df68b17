"""The live messages are restored, regardless of who edits `agent.messages`."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from bson import ObjectId, json_util
from hypothesis import given, settings
from hypothesis import strategies as st
from strands import Agent, tool
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
    SummarizingConversationManager,
)
from strands.agent.conversation_manager.compression.pin_message import pin_message
from strands.experimental.context_manager import Offload
from strands.hooks import AfterInvocationEvent, BeforeModelCallEvent
from strands.storage import InMemoryStorage
from strands.types.exceptions import ContextWindowOverflowException
from strands.types.session import SessionMessage

from fix_archive import idle, told
from mongodb_session_manager import (
    EncodingError,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    SessionConflictError,
    StateTooLargeError,
)
from mongodb_session_manager.demo import ScriptedModel
from support import CommandLog, agent, alternating, fail_point, sampled, texts

Documents = Any


def restored(factory: MongoDBSessionManagerFactory, session_id: str = "s", **options: Any) -> Agent:
    return agent(factory.create_session_manager(session_id), **options)


def tell_both(manager: Any, live: Agent, *texts: str) -> None:
    """Append the texts of a user and of the agent in turn, as a turn does, which takes longer."""
    for n, text in enumerate(texts):
        role = ("user", "assistant")[n % 2]
        message: Any = {"role": role, "content": [{"text": text}], "tracking_id": str(uuid.uuid4())}
        live.messages.append(message)
        manager.append_message(message, live)
    manager.sync_agent(live)


def turns(
    factory: MongoDBSessionManagerFactory, count: int = 3, max_embedded_messages: int = 128, **options: Any
) -> tuple[Any, Agent]:
    """Return a manager and its agent with the messages q0, a0, q1, a1, ...; further turns go on with them."""
    manager = factory.create_session_manager("s", max_embedded_messages=max_embedded_messages)
    live = agent(manager, *(f"a{n}" for n in range(count, count + 10)), **options)
    tell_both(manager, live, *(f"{kind}{n}" for n in range(count) for kind in "qa"))
    return manager, live


def view_of(stored: Documents) -> Any:
    return stored.find_one("s")["agents"]["agent"].get("view")


def test_nothing_is_stored_while_nothing_was_edited(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    manager, live = turns(factory, 1)
    live("q1")
    live("q2")
    manager.close()
    assert view_of(stored) is None
    assert restored(factory).messages == live.messages


def clear(messages: list[Any]) -> None:
    messages.clear()


def say(messages: list[Any]) -> None:
    messages.append({"role": "user", "content": [{"text": "never said"}]})


def drop_last_turn(messages: list[Any]) -> None:
    del messages[-2:]


def drop_first_turn(messages: list[Any]) -> None:
    del messages[:2]


def edit_text(messages: list[Any]) -> None:
    messages[1]["content"][0]["text"] = "edited"


def pin(messages: list[Any]) -> None:
    pin_message(messages, 0)


def reverse(messages: list[Any]) -> None:
    messages.reverse()


def repeat(messages: list[Any]) -> None:
    messages.extend(copy.deepcopy(messages[:2]))


def insert_a_version_of_the_last(messages: list[Any]) -> None:
    messages.insert(0, {**messages[-1], "content": [{"text": "another"}]})


def merge(messages: list[Any]) -> None:
    messages[2:4] = [{**messages[0], "content": [*messages[0]["content"], *messages[3]["content"]]}]


EDITS = [
    clear,
    say,
    drop_last_turn,
    drop_first_turn,
    edit_text,
    pin,
    reverse,
    repeat,
    insert_a_version_of_the_last,
    merge,
]


@pytest.mark.parametrize("edit", alternating(*EDITS))
@pytest.mark.parametrize("manager_of", alternating(NullConversationManager, SlidingWindowConversationManager))
def test_an_edit_is_restored(
    factory: MongoDBSessionManagerFactory, stored: Documents, edit: Callable[[list[Any]], None], manager_of: type
) -> None:
    """After a restart, and between two turns."""
    manager, live = turns(factory, conversation_manager=manager_of())
    edit(live.messages)
    manager.close()
    again = agent(factory.create_session_manager("s"), "later", "at last", conversation_manager=manager_of())
    assert again.messages == live.messages
    again("and now?")
    assert restored(factory, conversation_manager=manager_of()).messages == again.messages
    edit(again.messages)
    again("really?")
    assert restored(factory, conversation_manager=manager_of()).messages == again.messages
    assert texts(stored.find_one("s")["agents"]["agent"]["messages"])[:6] == ["q0", "a0", "q1", "a1", "q2", "a2"]


def test_a_message_that_was_edited_and_then_continued_is_also_kept_as_it_was_said(
    factory: MongoDBSessionManagerFactory,
) -> None:
    manager, live = turns(factory, 1)
    live.messages[1]["content"][0]["text"] = "edited"
    live.messages[1] = {**live.messages[1], "content": [*live.messages[1]["content"], {"text": " and more"}]}
    manager.append_message(live.messages[1], live)  # as Strands does if a hook continues a message
    assert told(manager.list_messages("agent")) == ["q0", "a0", "edited and more"]
    manager.close()
    assert restored(factory).messages == live.messages


# Edits by Strands.


@tool
def tell() -> str:
    """Tell a long story."""
    return "once upon a time " * 60


TELL = {"tool": "tell", "input": {}}


def overflow() -> Exception:
    return ContextWindowOverflowException("the input is too long")


def reply_to(*replies: Any) -> list[Any]:
    return [*replies, "later"]


def test_a_summary_with_pinned_messages_is_restored(factory: MongoDBSessionManagerFactory) -> None:
    def keeper() -> Any:
        return SummarizingConversationManager(summary_ratio=0.5, preserve_recent_messages=2, pin_first=1)

    replies = ["a0", "a1", "a2", overflow(), "the summary", "a3", "a4", overflow(), "another summary", "a5"]
    live = agent(factory.create_session_manager("s"), *replies, conversation_manager=keeper())
    for n in range(6):
        live(f"q{n}")
        again = restored(factory, conversation_manager=keeper())
        assert again.messages == live.messages
    assert "q0" in texts(live.messages)
    assert "another summary" in texts(live.messages)


def test_a_summary_alone_needs_no_view(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    keeper = SummarizingConversationManager(summary_ratio=0.5, preserve_recent_messages=2)
    replies = ["a0", "a1", overflow(), "the summary", "a2"]
    live = agent(factory.create_session_manager("s"), *replies, conversation_manager=keeper)
    for n in range(3):
        live(f"q{n}")
    assert "the summary" in texts(live.messages)
    assert view_of(stored) is None


def test_a_window_with_pinned_messages_is_restored_after_each_turn(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    def keeper() -> Any:
        return SlidingWindowConversationManager(4, pin_first=1)

    live = agent(factory.create_session_manager("s"), *"abcdefgh", conversation_manager=keeper())
    for n in range(6):
        live(f"q{n}")
        assert restored(factory, conversation_manager=keeper()).messages == live.messages
    assert texts(live.messages)[0] == "q0"
    again = agent(factory.create_session_manager("s"), "i", "j", conversation_manager=keeper())
    again("q6")
    again("q7")
    assert texts(again.messages)[0] == "q0"
    assert restored(factory, conversation_manager=keeper()).messages == again.messages
    assert "q3" not in str(view_of(stored))  # references, not copies


@pytest.mark.filterwarnings("ignore:Agent-level storage is set")
@pytest.mark.parametrize("options", [{}, {"storage": True}])
def test_what_context_strategies_have_cut_stays_cut(
    factory: MongoDBSessionManagerFactory, stored: Documents, options: dict[str, Any]
) -> None:
    def make(*replies: Any) -> Agent:
        manager = factory.create_session_manager("s")
        strategies = {
            "strategies": [
                Offload.truncate("tool_results", {"preview_tokens": 10}).when(threshold=20),
                Offload.drop("assistant_text").when(utilization=0.0, preserve_recent=1),
            ]
        }
        model = ScriptedModel(replies)
        model.update_config(context_window_limit=100_000)
        storage = {"storage": InMemoryStorage()} if options else {}
        return Agent(
            model=model,
            agent_id="agent",
            session_manager=manager,
            callback_handler=None,
            tools=[tell],
            context_manager=strategies,
            **storage,
        )

    live = make(TELL, "a story", TELL, "another", "the end", "really")
    for question in ("tell", "again", "so?", "and?"):
        live(question)
        assert make().messages == live.messages
    assert str(live.messages).count("once upon a time") < 60
    assert len(live.messages) < len(stored.find_one("s")["agents"]["agent"]["messages"])
    assert "once upon a time " * 40 not in str(view_of(stored))


def test_a_tool_result_that_was_shortened_after_an_overflow_stays_short(
    factory: MongoDBSessionManagerFactory, stored: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    live = agent(factory.create_session_manager("s"), TELL, "a story", overflow(), "long", "bye", tools=[tell])
    live("tell")
    live("how was it?")
    assert "[truncated:" in str(live.messages)
    again = restored(factory, tools=[tell])
    assert again.messages == live.messages
    assert "toolUse" not in caplog.text  # no call without a result
    assert str(stored.find_one("s")["agents"]["agent"]["messages"]).count("once upon a time") == 60
    again("and?")
    assert restored(factory, tools=[tell]).messages == again.messages


def test_a_regenerated_turn_is_restored_and_the_first_answer_is_kept(
    factory: MongoDBSessionManagerFactory,
) -> None:
    _, live = turns(factory, 2)
    del live.messages[-2:]
    live("q1 again")
    assert texts(live.messages) == ["q0", "a0", "q1 again", "a2"]
    assert texts(restored(factory).messages) == ["q0", "a0", "q1 again", "a2"]
    assert told(factory._portal.call(factory._async.list_messages, "s", "agent")) == [
        *("q0", "a0", "q1", "a1", "q1 again", "a2")
    ]


def test_a_state_that_was_set_after_the_last_turn_is_stored_by_close(factory: MongoDBSessionManagerFactory) -> None:
    manager, live = turns(factory, 1)
    live.state.set("mood", "good")
    manager.close()
    manager = factory.create_session_manager("s")
    again = agent(manager)
    assert again.state.get("mood") == "good"
    again.state.set("mood", "better")
    again.messages.pop()
    manager.close()  # no turn follows
    assert restored(factory).state.get("mood") == "better"
    assert texts(restored(factory).messages) == ["q0"]


def test_a_state_that_was_set_before_the_first_turn_is_stored_by_close(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager)
        live.state.set("mood", "good")
    assert restored(factory).state.get("mood") == "good"


def said_apart(text: str) -> Any:
    return {"role": "user", "content": [{"text": text}]}


def test_messages_that_an_application_appends_to_the_session_alone_are_restored(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    manager, live = turns(factory, 1)
    manager.append_message(said_apart("apart"), live)
    live("q1")
    manager.append_message(said_apart("last"), live)
    manager.close()
    assert view_of(stored) is None
    assert texts(live.messages) == ["q0", "a0", "q1", "a1"]
    assert texts(restored(factory).messages) == ["q0", "a0", "apart", "q1", "a1", "last"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_leaves_out_no_message_that_was_appended_to_the_session_alone(
    factory: MongoDBSessionManagerFactory, edit: Callable[[list[Any]], None]
) -> None:
    manager, live = turns(factory, 2)
    manager.append_message(said_apart("apart"), live)
    tell_both(manager, live, "q2", "a2")
    edit(live.messages)
    manager.sync_agent(live)
    live("q3")
    manager.close()
    manager = factory.create_session_manager("s")
    again = agent(manager)
    found = texts(again.messages)
    assert found.count("apart") == 1
    assert [text for text in found if text != "apart"] == texts(live.messages)
    del again.messages[found.index("apart")]
    manager.close()
    assert texts(restored(factory).messages) == texts(live.messages)


def test_a_message_appended_to_the_session_stands_where_it_was_said(factory: MongoDBSessionManagerFactory) -> None:
    manager, live = turns(factory, 1)
    manager.append_message(said_apart("apart"), live)
    live("q1")
    live.messages[1]["content"][0]["text"] = "edited"
    manager.sync_agent(live)
    live("q2")
    manager.close()
    assert texts(restored(factory).messages) == ["q0", "edited", "apart", "q1", "a1", "q2", "a2"]


def test_a_message_that_is_created_through_the_repository_of_a_manager_is_restored(
    factory: MongoDBSessionManagerFactory,
) -> None:
    manager, live = turns(factory, 1)
    created = SessionMessage.from_message(said_apart("apart"), 0)
    manager.session_repository.create_message("s", "agent", created)
    live("q1")
    manager.close()
    assert texts(restored(factory).messages) == ["q0", "a0", "apart", "q1", "a1"]


def test_a_message_that_becomes_live_after_it_was_appended_is_restored_as_it_is_live(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    manager, live = turns(factory, 1)
    message = said_apart("apart")
    manager.append_message(message, live)
    live.messages.append(message)
    live("q1")
    assert view_of(stored) is None
    live.messages.remove(message)
    manager.close()
    assert texts(restored(factory).messages) == texts(live.messages) == ["q0", "a0", "q1", "a1"]


def test_a_window_removes_a_message_that_was_appended_to_the_session_alone(
    factory: MongoDBSessionManagerFactory,
) -> None:
    manager, live = turns(factory, 1, conversation_manager=SlidingWindowConversationManager(window_size=4))
    manager.append_message(said_apart("apart"), live)
    for n in range(1, 6):
        live(f"q{n}")
    manager.close()
    found = texts(restored(factory, conversation_manager=SlidingWindowConversationManager(window_size=4)).messages)
    assert found[-4:] == texts(live.messages)
    assert "apart" not in found


@pytest.mark.anyio
async def test_closing_an_asynchronous_manager_stores_the_last_changes(factory: MongoDBSessionManagerFactory) -> None:
    async with factory.create_session_manager_async("s") as manager:
        live = agent(manager, "a0")
        await live.invoke_async("q0")
        live.state.set("mood", "good")
        live.messages.pop(0)
    async with factory.create_session_manager_async("s") as manager:
        again = agent(manager)
        assert texts(again.messages) == ["a0"]
        assert again.state.get("mood") == "good"


def test_closing_after_a_restore_sends_nothing(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    turns(factory)[0].close()
    manager = factory.create_session_manager("s")
    live = agent(manager)
    commands.clear()
    manager.close()
    assert commands.names == []
    assert len(live.messages) == 6


def test_an_edit_takes_no_further_command(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    manager, live = turns(factory)
    pin_message(live.messages, 0)
    commands.clear()
    live("next")
    assert commands.names == ["update"] * 2
    live("next")
    assert commands.names == ["update"] * 4
    manager.close()
    assert commands.names == ["update"] * 4


def test_restoring_a_view_takes_one_command(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    manager, live = turns(factory)
    live.messages[:] = [live.messages[4], live.messages[1]]
    manager.close()
    commands.clear()
    assert texts(restored(factory).messages) == ["q2", "a0"]
    assert commands.names == ["findAndModify"]


def test_archived_messages_of_a_view_take_one_more_command(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    manager, live = turns(factory, 12, max_embedded_messages=4, conversation_manager=NullConversationManager())
    idle(factory)
    manager.close()
    live = restored(factory, conversation_manager=NullConversationManager())
    manager = live._session_manager
    pin_message(live.messages, 0)
    live.messages[1:18] = [live.messages[9], live.messages[3]]
    manager.close()
    commands.clear()
    again = restored(factory, conversation_manager=NullConversationManager())
    assert again.messages == live.messages
    assert commands.names == ["findAndModify", "find"]


def test_archived_messages_of_a_view_that_are_missing_are_counted(
    factory: MongoDBSessionManagerFactory, stored: Any, caplog: pytest.LogCaptureFixture
) -> None:
    manager, live = turns(factory, 12, max_embedded_messages=4, conversation_manager=NullConversationManager())
    live.messages[0:18] = [live.messages[9], live.messages[3]]
    manager.close()
    idle(factory)
    assert stored.database["agent_sessions_archive"].delete_many({"_id.first": {"$lte": 9}}).deleted_count
    again = restored(factory, conversation_manager=NullConversationManager())
    assert 0 < len(again.messages) < len(live.messages)
    missing = len(live.messages) - len(again.messages)
    assert f"missing=<{missing}> | restoring an agent without messages that are missing in the archive" in caplog.text


def test_another_hook_edits_after_the_invocation(factory: MongoDBSessionManagerFactory) -> None:
    class Trims:
        def register_hooks(self, registry: Any, **kwargs: Any) -> None:
            registry.add_callback(AfterInvocationEvent, lambda event: event.agent.messages.__delitem__(slice(0, -2)))

    manager, live = turns(factory, 2, hooks=[Trims()])
    live("q2")
    assert texts(live.messages) == ["q2", "a2"]
    manager.close()
    assert texts(restored(factory).messages) == ["q2", "a2"]


def test_agents_of_one_session_have_views_of_their_own(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    one, two = (agent(manager, "a0", "a1", agent_id=name) for name in ("one.1", "two"))
    for live in (one, two):
        live("q0")
        live("q1")
    one.messages.pop(0)
    two.messages.clear()
    manager.close()
    manager = factory.create_session_manager("s")
    assert texts(agent(manager, agent_id="one.1").messages) == ["a0", "q1", "a1"]
    assert agent(manager, agent_id="two").messages == []


def test_a_view_is_removed_when_restoring_gives_the_live_messages_without_it(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    _, live = turns(factory)
    kept = live.messages[:2]
    del live.messages[:2]
    live("next")
    assert view_of(stored) is not None
    live.messages[:0] = kept
    live("and back")
    assert view_of(stored) is None
    assert restored(factory).messages == live.messages


def test_a_view_that_is_too_large_is_refused_by_name(
    factory: MongoDBSessionManagerFactory, stored: Documents, large: None
) -> None:
    manager, live = turns(factory, 1)
    live.messages += [{"role": "user", "content": [{"text": "x" * (9 << 20)}]} for _ in range(2)]
    with pytest.raises(StateTooLargeError, match="view of agent 'agent' was not stored"):
        tell_both(manager, live, "next", "a1")
    assert view_of(stored) is None
    tell_both(manager, live, "told once", "a2")
    assert told(factory._portal.call(factory._async.list_messages, "s", "agent"))[-2:] == ["told once", "a2"]
    del live.messages[2:4]
    live("smaller")
    manager.close()
    assert restored(factory).messages == live.messages


# Redaction.

SECRET = "my password is swordfish, keep it please"


def redact(factory: MongoDBSessionManagerFactory, message_id: int) -> None:
    read, update = factory._async.read_message, factory._async.update_message
    message = factory._portal.call(read, "s", "agent", message_id)
    message.redact_message = {"role": "user", "content": [{"text": "[redacted]"}]}
    factory._portal.call(update, "s", "agent", message)


def everything(stored: Documents) -> str:
    database = stored.database
    return str([list(database[name].find()) for name in database.list_collection_names()])


def edited_secret(factory: MongoDBSessionManagerFactory, in_document: int = 128) -> tuple[Any, Agent]:
    manager = factory.create_session_manager("s", max_embedded_messages=in_document)
    live = agent(manager, *(f"a{n}" for n in range(2, 12)), conversation_manager=NullConversationManager())
    tell_both(manager, live, SECRET, "a0", "q1", "a1")
    live.messages[0]["content"] = [{"text": "shortened: " + SECRET[:-3]}]
    live("q2")
    return manager, live


@pytest.mark.parametrize("in_document", [1, 128])
def test_redacting_a_message_reaches_the_view(
    factory: MongoDBSessionManagerFactory, stored: Documents, in_document: int
) -> None:
    manager, live = edited_secret(factory, in_document)
    manager.close()
    assert restored(factory, conversation_manager=NullConversationManager()).messages == live.messages
    assert "shortened" in str(view_of(stored))
    redact(factory, 0)
    assert "swordfish" not in everything(stored)
    again = restored(factory, conversation_manager=NullConversationManager())
    assert texts(again.messages) == ["[redacted]", "a0", "q1", "a1", "q2", "a2"]


@pytest.mark.parametrize("in_document", [1, 128])
@pytest.mark.parametrize("is_later", [False, True])
def test_a_message_that_somebody_else_redacts_does_not_come_back(
    factory: MongoDBSessionManagerFactory, stored: Documents, in_document: int, is_later: bool
) -> None:
    _, live = edited_secret(factory, in_document)
    redact(factory, 0)
    if is_later:
        live.messages[0]["content"] = [{"text": "shorter: " + SECRET[:-5]}]
    live.messages.insert(1, {"role": "assistant", "content": [{"text": "inserted"}]})
    live("q3")
    assert "swordfish" not in everything(stored)
    again = restored(factory, conversation_manager=NullConversationManager())
    assert texts(again.messages)[:3] == ["[redacted]", "inserted", "a0"]


def test_a_message_that_the_manager_replaces_is_restored_with_the_new_content(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    manager, live = edited_secret(factory)
    message = factory._portal.call(factory._async.read_message, "s", "agent", 0)
    message.redact_message = {"role": "user", "content": [{"text": "[redacted]"}]}
    manager._work.update_message("s", "agent", message)
    live("q3")
    assert "swordfish" not in everything(stored)
    again = restored(factory, conversation_manager=NullConversationManager())
    assert texts(again.messages)[:2] == ["[redacted]", "a0"]


def test_merged_messages_lose_what_was_redacted(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, *"abcdef", conversation_manager=NullConversationManager())
    live("q0")
    live(SECRET)
    merged = [*live.messages[0]["content"], {"text": "also said: " + SECRET[:-3]}]
    live.messages[:] = [{**live.messages[0], "content": merged}, live.messages[-1]]
    live("q2")
    assert "also said" in str(view_of(stored))
    redact(factory, 2)
    assert "swordfish" not in everything(stored)
    again = restored(factory, conversation_manager=NullConversationManager())
    assert texts(again.messages) == ["q0", "[redacted]", "b", "q2", "c"]


# Copies.


COPIES = [(edit, copy_of) for edit in EDITS for copy_of in ("fork", "export", "write back")]


@pytest.mark.parametrize(
    ("edit", "copy_of"),
    sampled(COPIES, (pin, "fork"), (merge, "fork"), (merge, "export"), (clear, "export"), (say, "write back")),
)
def test_copies_restore_the_live_messages(
    factory: MongoDBSessionManagerFactory, edit: Callable[[list[Any]], None], copy_of: str
) -> None:
    manager, live = turns(factory, 4, max_embedded_messages=2, conversation_manager=NullConversationManager())
    edit(live.messages)
    manager.close()
    idle(factory)
    if copy_of == "fork":
        factory.fork_session("s", "t")
    elif copy_of == "export":
        factory.import_session(factory.export_session("s"), session_id="t")
    else:
        factory.write_back("s")
    copied = "s" if copy_of == "write back" else "t"
    again = agent(factory.create_session_manager(copied), "b", conversation_manager=NullConversationManager())
    assert again.messages == live.messages
    again("later")
    assert restored(factory, copied, conversation_manager=NullConversationManager()).messages == again.messages


@pytest.mark.parametrize(
    ("kept", "restored_at"),
    [
        (
            [0, 2, 3, 6, 7],
            {
                7: ["q0", "q1", "a1", "q3", "a3"],
                6: ["q0", "q1", "a1", "q3"],
                2: ["q0", "q1"],
                1: ["q0", "a0"],  # not live: the original conversation
            },
        ),
        ([3, 5, 0], {3: ["a1"]}),
    ],
)
def test_a_fork_that_is_cut_restores_the_live_messages_until_there(
    factory: MongoDBSessionManagerFactory, kept: list[int], restored_at: dict[int, list[str]]
) -> None:
    manager, live = turns(factory, 4)
    live.messages[:] = [live.messages[n] for n in kept]
    manager.close()
    for at_message, expected in restored_at.items():
        factory.fork_session("s", fork := f"until {at_message}", at_message=at_message)
        again = agent(factory.create_session_manager(fork), "later")
        assert texts(again.messages) == expected
        again("more")
        assert texts(restored(factory, fork).messages) == [*expected, "more", "later"]


# Attachments.

IMAGE = b"image" * 2000


def picture() -> Any:
    return {"image": {"format": "png", "source": {"bytes": IMAGE}}}


@pytest.mark.parametrize("inline", alternating(0, 1 << 20))
@pytest.mark.parametrize("copy_of", alternating(None, "fork", "export", "write back"))
def test_an_edited_message_keeps_its_attachment(
    factory: MongoDBSessionManagerFactory, stored: Documents, inline: int, copy_of: str | None
) -> None:
    manager = factory.create_session_manager("s", max_inline_attachment_bytes=inline)
    live = agent(manager, *"abc")
    live([{"text": "what is it?"}, picture()])
    live([{"text": "and this?"}, picture()])
    pin_message(live.messages, 0)
    live.messages[2]["content"][0] = {"text": "edited"}
    live("thanks")
    manager.close()
    assert len(str(view_of(stored))) < 2000
    session_id = "s"
    if copy_of == "fork":
        factory.fork_session("s", session_id := "t")
    elif copy_of == "export":
        factory.import_session(factory.export_session("s"), session_id=(session_id := "t"))
    elif copy_of == "write back":
        factory.write_back("s")
    assert restored(factory, session_id).messages == live.messages


# Other writers.


def test_a_version_before_1_0_that_reuses_an_id_leaves_the_view_intact(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    manager, live = turns(factory)
    del live.messages[1:5]
    pin_message(live.messages, 0)
    manager.close()
    before = copy.deepcopy(live.messages)
    said = {"role": "user", "content": [{"text": "by an old version"}], "tracking_id": "old"}
    element = {"message": said, "message_id": 3, "redact_message": None, "created_at": "2026-01-01T00:00:00+00:00"}
    stored.update_one({"_id": "s"}, {"$push": {"agents.agent.messages": element}})
    again = restored(factory)
    assert again.messages == [*before, said]
    assert restored(factory).messages == [*before, said]


def test_a_lost_acknowledgement_stores_the_view_once(
    factory: MongoDBSessionManagerFactory, server: str, stored: Documents
) -> None:
    manager, live = turns(factory)
    pin_message(live.messages, 0)
    del live.messages[1:3]
    error = {"code": 6, "errmsg": "the acknowledgement is lost"}
    with fail_point(
        server, failCommands=["update"], writeConcernError=error, times=2, errorLabels=["RetryableWriteError"]
    ):
        live("next")
    manager.close()
    assert restored(factory).messages == live.messages
    assert told(factory._portal.call(factory._async.list_messages, "s", "agent"))[-2:] == ["next", "a3"]


def test_a_stale_agent_does_not_replace_the_view(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    turns(factory)[0].close()
    stale_manager, manager = (factory.create_session_manager("s") for _ in range(2))
    stale, live = agent(stale_manager), agent(manager, "a3")
    live("next")
    stale.messages.clear()
    with pytest.raises(SessionConflictError):
        stale_manager.close()
    assert restored(factory).messages == live.messages


def test_an_inserted_message_that_cannot_be_stored_is_refused(factory: MongoDBSessionManagerFactory) -> None:
    manager, live = turns(factory)
    live.messages.append({"role": "user", "content": [{"text": object()}]})
    with pytest.raises(EncodingError, match="content"):
        manager.sync_agent(live)
    live.messages.pop()
    live("next")
    manager.close()
    assert restored(factory).messages == live.messages


def test_an_edit_with_a_value_that_cannot_be_stored_leaves_the_message_as_it_is_stored(
    factory: MongoDBSessionManagerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    manager, live = turns(factory)
    before = copy.deepcopy(live.messages)
    live.messages[2]["content"].append({"text": object()})
    manager.sync_agent(live)
    manager.close()
    assert restored(factory).messages == before
    assert len([record for record in caplog.records if "an edit of a live message" in record.message]) == 1


class Array:
    """Compares like a NumPy array."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


def test_an_edit_that_cannot_be_compared_leaves_the_message_as_it_is_stored(
    factory: MongoDBSessionManagerFactory,
) -> None:
    manager, live = turns(factory)
    before = copy.deepcopy(live.messages)
    live.messages[2]["content"][0]["text"] = Array()
    manager.close()
    assert restored(factory).messages == before


@pytest.mark.parametrize("depth", [None, 3000])
def test_an_edit_that_has_no_end_leaves_the_message_as_it_is_stored(
    factory: MongoDBSessionManagerFactory, depth: int | None
) -> None:
    manager, live = turns(factory)
    before = copy.deepcopy(live.messages)
    nested: Any = {"text": "around and around"}
    if depth is None:
        nested["again"] = nested
    for _ in range(depth or 0):
        nested = {"text": nested}
    live.messages[2]["content"].append(nested)
    manager.close()
    assert restored(factory).messages == before


def test_editing_a_restored_message_that_was_live_twice_changes_one(factory: MongoDBSessionManagerFactory) -> None:
    manager, live = turns(factory, 1)
    live.messages.append(copy.deepcopy(live.messages[0]))
    manager.close()
    again = restored(factory)
    pin_message(again.messages, 0)
    assert "metadata" not in again.messages[2]


def test_a_broken_tool_call_that_was_repaired_is_restored_as_it_is_live(
    factory: MongoDBSessionManagerFactory, stored: Documents
) -> None:
    live = agent(factory.create_session_manager("s"), TELL, "a story", tools=[tell])
    live("tell")
    stored.update_one({"_id": "s"}, {"$pop": {"agents.agent.messages": -1}})  # the prompt
    stored.update_one({"_id": "s"}, {"$pop": {"agents.agent.messages": -1}})  # the call
    again = agent(factory.create_session_manager("s"), "later", tools=[tell])
    assert texts(again.messages) == ["a story"]
    again._session_manager.close()
    assert view_of(stored) is None  # opening and closing store nothing
    again = agent(factory.create_session_manager("s"), "later", tools=[tell])
    again("and?")
    assert restored(factory, tools=[tell]).messages == again.messages


# Unusable views.


MISFITS: list[tuple[Any, list[str]]] = [
    ({"after": 4, "items": [{"runs": [[2, 3], [50, 60]]}]}, ["q1", "a1", "q2", "a2"]),
    ({"after": 90, "items": [{"runs": [[2, 3]]}]}, ["q1", "a1"]),
    ({"after": 90, "items": [{"runs": [[70, 80]]}]}, ["q0", "a0", "q1", "a1", "q2", "a2"]),
    ({"after": 6, "items": []}, []),
    *(
        (malformed, ["q0", "a0", "q1", "a1", "q2", "a2"])
        for malformed in (
            *(5, [], {}, "x", {"after": "x", "items": []}, {"after": 1}, {"after": 1, "items": [3]}),
            {"after": 1, "items": [{"runs": 3}]},
            {"after": 1, "items": [{"runs": [[2, 1]]}]},
            {"after": 1, "items": [{"runs": [["a", {}]], "uses": 4}]},
            {"after": 1, "items": [{"of": [0], "at": [None], "uses": [0], "message": {}, "content": [[1, 0]]}]},
        )
    ),
]


def test_a_view_that_does_not_fit_restores_as_much_as_there_is(
    factory: MongoDBSessionManagerFactory, stored: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    turns(factory)[0].close()
    session: Any = stored.find_one({"_id": "s"})
    for view, expected in MISFITS:
        session_id = uuid.uuid4().hex  # a malformed value is logged once for each session
        session |= {"_id": session_id, "session_id": session_id, "incarnation": ObjectId()}
        session["agents"]["agent"]["view"] = view
        stored.insert_one(session)
        caplog.clear()
        manager = factory.create_session_manager(session_id)
        again = agent(manager)
        assert (view, texts(again.messages)) == (view, expected)
        assert (view, bool(caplog.records)) == (view, view != {"after": 6, "items": []})
        tell_both(manager, again, "more", "later")
        assert (view, restored(factory, session_id).messages) == (view, again.messages)


def test_a_view_that_cannot_be_restored_is_not_imported(factory: MongoDBSessionManagerFactory) -> None:
    turns(factory)[0].close()
    lines = [json.loads(line) for line in factory.export_session("s")]
    del lines[-1]["end"]["sha256"]
    views: list[Any] = [
        3,
        {"after": -1, "items": []},
        {"after": 1, "items": [{"runs": [[0, 2**31 - 1]]}]},
        {"after": 1, "items": [{"of": [], "at": [], "uses": [], "message": {"role": "user"}}]},
    ]
    for view in views:
        lines[2]["fields"]["view"] = json.loads(json_util.dumps(view))
        with pytest.raises(InvalidArgumentError, match="view"):
            factory.import_session([json.dumps(line) + "\n" for line in lines], session_id="t")


# Random edits.

POSITIONS = st.integers(0, 40)
EDITS_OF_ONE = {
    "delete": lambda messages, at: messages.pop(at),
    "move": lambda messages, at: messages.append(messages.pop(at)),
    "copy": lambda messages, at: messages.insert(0, copy.deepcopy(messages[at])),
    "text": lambda messages, at: messages[at]["content"].append({"text": f"more {at}"}),
    "pin": lambda messages, at: pin_message(messages, at),
    "insert": lambda messages, at: messages.insert(at, {"role": "user", "content": [{"text": f"inserted {at}"}]}),
    "first": lambda messages, at: messages.__delitem__(slice(0, at)),
    "last": lambda messages, at: messages.__delitem__(slice(at, None)),
    "clear": lambda messages, at: messages.clear(),
}
edits = st.tuples(st.sampled_from(sorted(EDITS_OF_ONE)), POSITIONS)
steps = st.one_of(
    st.just("turn"),
    st.just("turn"),
    st.just("restart"),
    edits,
    st.tuples(st.just("within"), st.lists(edits, max_size=2)),
)


def edit_at(messages: list[Any], name: str, position: int) -> None:
    if messages:
        EDITS_OF_ONE[name](messages, position % len(messages))


class Within:
    """Edits the messages of an agent before the model is called."""

    def __init__(self) -> None:
        self.edits: list[Any] = []

    def register_hooks(self, registry: Any, **kwargs: Any) -> None:
        registry.add_callback(BeforeModelCallEvent, self._edit)

    def _edit(self, event: BeforeModelCallEvent) -> None:
        for name, position in self.edits:
            earlier = event.agent.messages[:-1]
            edit_at(earlier, name, position)
            event.agent.messages[:-1] = earlier
        self.edits = []


@settings(max_examples=settings.default.max_examples // 2)
@given(
    script=st.lists(steps, min_size=3, max_size=10),
    window=st.sampled_from([None, 4]),
    in_document=st.sampled_from([1, 3, 128]),
)
def test_whatever_is_edited_is_restored_and_nothing_that_was_said_is_lost(
    factory: MongoDBSessionManagerFactory, script: list[Any], window: int | None, in_document: int
) -> None:
    session_id = uuid.uuid4().hex
    said: list[Any] = []
    within = Within()

    def start() -> tuple[Any, Agent]:
        size = {} if window is None else {"window_size": window}
        keeper = NullConversationManager() if window is None else SlidingWindowConversationManager(**size)
        manager = factory.create_session_manager(session_id, max_embedded_messages=in_document)
        return manager, agent(manager, *"abcdefghijklmno", conversation_manager=keeper, hooks=[within])

    manager, live = start()
    for number, step in enumerate([*script, "restart"]):
        if step == "turn":
            live(f"q{number}")
            said += [f"q{number}", None]
        elif step == "restart":
            manager.close()
            left = copy.deepcopy(live.messages)
            manager, live = start()
            assert live.messages == left
        elif step[0] == "within":
            within.edits = list(step[1])
            live(f"q{number}")
            said += [f"q{number}", None]
        else:
            edit_at(live.messages, *step)
    manager.close()
    stored = told(factory._portal.call(factory._async.list_messages, session_id, "agent"))
    assert stored[::2] == said[::2]
    assert len(stored) == len(said)
