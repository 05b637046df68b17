"""What Strands' session logic reads from a unit of work, and what it leaves recorded. No server."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from strands.session import RepositorySessionManager
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import (
    AgentNotFoundError,
    DatabaseUnavailableError,
    InvalidArgumentError,
    MessageNotFoundError,
    MongoDBSessionError,
    SessionClosedError,
    SessionConflictError,
)
from mongodb_session_manager._format.changes import (
    AppendMessage,
    Change,
    CreateAgent,
    ObserveConfig,
    ReplaceMessage,
    SetMessageFields,
    UpdateAgent,
)
from mongodb_session_manager._managers.capture import CapturedConfig
from mongodb_session_manager._managers.unit_of_work import UnitOfWork
from support import agent, texts

MOMENT = datetime(2025, 3, 4, 5, 6, 7, 89000, tzinfo=UTC)
ISO = "2025-03-04T05:06:07.089000+00:00"


def said(text: str, role: str = "user") -> Any:
    """A message whose tracking id is its text."""
    return {"role": role, "content": [{"text": text}], "tracking_id": text}


def stored_agent(*said_texts: str, removed: int = 0, **data: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "agent_data": {
            "state": {"kept": True},
            "conversation_manager_state": {
                "__name__": "SlidingWindowConversationManager",
                "removed_message_count": removed,
            },
            "_internal_state": {},
            **data,
        },
        "created_at": MOMENT,
        "updated_at": MOMENT,
        "next_message_id": len(said_texts),
        "messages": [
            {
                "message": said(text, roles[position % 2]),
                "message_id": position,
                "redact_message": None,
                "created_at": MOMENT,
                "updated_at": MOMENT,
            }
            for position, text in enumerate(said_texts)
        ],
    }


def opened(**agents: dict[str, Any]) -> UnitOfWork:
    """A session as `open_session` returns it."""
    document = {
        "_id": "s",
        "session_id": "s",
        "application_name": "chat",
        "session_type": "AGENT",
        "created_at": MOMENT,
        "updated_at": MOMENT,
        "agents": agents,
    }
    return UnitOfWork("s", document)


def message(text: str, message_id: int = 0) -> SessionMessage:
    return SessionMessage(said(text), message_id, None, ISO, ISO)


def continued(text: str, *more: str) -> SessionMessage:
    """A message to which Strands has appended further blocks."""
    longer = message(text)
    longer.message["content"] = [{"text": text}, *({"text": each} for each in more)]
    return longer


def state(agent_id: str = "agent", **values: Any) -> SessionAgent:
    return SessionAgent(agent_id, values, {}, {}, ISO, ISO)


def kinds(changes: Sequence[Change]) -> list[str]:
    return [type(change).__name__ for change in changes]


def appended(unit: UnitOfWork) -> list[tuple[str, int, str]]:
    """Agent, id and text of every message that is recorded as new."""
    return [
        (change.agent_id, change.message["message_id"], *texts([change.message]))
        for change in unit.pending()
        if isinstance(change, AppendMessage)
    ]


# Reading.


def test_it_reads_what_was_loaded() -> None:
    unit = opened(agent=stored_agent("one", "two", "three"))
    assert unit.application_name == "chat"
    assert unit.read_session("s") == Session("s", SessionType.AGENT, ISO, ISO)
    assert unit.read_agent("s", "agent") == SessionAgent(
        "agent",
        {"kept": True},
        {"__name__": "SlidingWindowConversationManager", "removed_message_count": 0},
        {},
        ISO,
        ISO,
    )
    assert unit.read_message("s", "agent", 1) == SessionMessage(said("two", "assistant"), 1, None, ISO, ISO)
    assert unit.read_message("s", "agent", 3) is None
    assert unit.pending() == ()


def test_it_lists_messages_oldest_first() -> None:
    unit = opened(agent=stored_agent("one", "two", "three"))
    listed = [texts([found.message]) for found in unit.list_messages("s", "agent")]
    assert listed == [["one"], ["two"], ["three"]]
    assert [found.message_id for found in unit.list_messages("s", "agent", offset=1)] == [1, 2]
    assert [found.message_id for found in unit.list_messages("s", "agent", limit=1, offset=1)] == [1]
    assert unit.list_messages("s", "agent", offset=3) == []


def test_agents_are_found_by_their_id() -> None:
    unit = opened(**{"a%2Eb": stored_agent("dotted"), "%24x": stored_agent("dollar"), "50%25": stored_agent("percent")})
    found = [unit.list_messages("s", agent_id)[0].message for agent_id in ("a.b", "$x", "50%")]
    assert texts(found) == ["dotted", "dollar", "percent"]


def test_an_agent_of_which_nothing_was_loaded_is_none() -> None:
    assert opened().read_agent("s", "agent") is None


@pytest.mark.parametrize("agent_id", ["", "a\0b", None, 7, {"$ne": None}, "\ud83d"])
def test_an_agent_id_that_cannot_be_one_is_refused(agent_id: Any) -> None:
    unit = opened()
    with pytest.raises(InvalidArgumentError, match=r"^agent_id must"):
        unit.read_agent("s", agent_id)
    with pytest.raises(InvalidArgumentError, match=r"^agent_id must"):
        unit.create_agent("s", state(agent_id))
    assert unit.pending() == ()


def test_an_unknown_agent_is_an_error() -> None:
    unit = opened(agent=stored_agent("one"))
    for call in (
        lambda: unit.update_agent("s", state("other")),
        lambda: unit.create_message("s", "other", message("x")),
        lambda: unit.update_message("s", "other", message("x")),
        lambda: unit.read_message("s", "other", 0),
        lambda: unit.list_messages("s", "other"),
    ):
        with pytest.raises(AgentNotFoundError, match="'other'"):
            call()
    assert unit.pending() == ()


def test_released_messages_are_not_read_as_no_messages() -> None:
    unit = opened(agent=stored_agent("one"), other=stored_agent("two"))
    unit.release(agent(None))
    with pytest.raises(MongoDBSessionError, match="handed to the restored agent"):
        unit.list_messages("s", "agent")
    assert len(unit.list_messages("s", "other")) == 1


def test_a_released_agent_goes_on() -> None:
    unit = opened(agent=stored_agent("one", "two"))
    unit.release(agent(None))
    unit.create_message("s", "agent", message("three"))
    unit.create_message("s", "agent", continued("three", "four"))
    assert kinds(unit.pending()) == ["AppendMessage", "ReplaceMessage"]
    assert [change.message_id for change in unit.pending() if isinstance(change, ReplaceMessage)] == [2]


# Recording.


def test_a_new_agent_and_its_messages() -> None:
    unit = opened()
    unit.create_agent("s", state(k=1))
    unit.create_message("s", "agent", message("one"))
    unit.create_message("s", "agent", message("two"))
    created, *_ = unit.pending()
    assert created == CreateAgent(
        "agent",
        {
            "agent_data": {
                "agent_id": "agent",
                "created_at": MOMENT,
                "state": {"k": 1},
                "conversation_manager_state": {},
                "_internal_state": {},
                "updated_at": MOMENT,
            },
            "created_at": MOMENT,
            "updated_at": MOMENT,
            "next_message_id": 0,
            "messages": [],
        },
    )
    assert appended(unit) == [("agent", 0, "one"), ("agent", 1, "two")]


def test_ids_are_given_here_and_told_to_strands() -> None:
    unit = opened(agent=stored_agent("one", "two"))
    given = message("three", message_id=0)
    unit.create_message("s", "agent", given)
    assert given.message_id == 2
    assert appended(unit) == [("agent", 2, "three")]


def test_each_agent_counts_for_itself() -> None:
    unit = opened(one=stored_agent("a"), two=stored_agent("b", "c"))
    for text in ("d", "e"):
        unit.create_message("s", "one", message(f"one {text}"))
        unit.create_message("s", "two", message(f"two {text}"))
    assert appended(unit) == [("one", 1, "one d"), ("two", 2, "two d"), ("one", 2, "one e"), ("two", 3, "two e")]


def test_strands_behind_a_window_that_has_removed_everything() -> None:
    unit = opened(agent=stored_agent("one", "two", removed=2))
    manager = RepositorySessionManager("s", unit)
    restored = agent(manager, "four")
    assert restored.messages == []
    restored("three")
    assert appended(unit) == [("agent", 2, "three"), ("agent", 3, "four")]


def test_strands_restores_and_continues() -> None:
    unit = opened(agent=stored_agent("one", "two"))
    restored = agent(RepositorySessionManager("s", unit), "four")
    assert texts(restored.messages) == ["one", "two"]
    assert restored.state.get() == {"kept": True}
    restored("three")
    assert appended(unit) == [("agent", 2, "three"), ("agent", 3, "four")]


def test_a_state_is_recorded_for_the_messages_it_follows() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.update_agent("s", state(k=1))
    unit.create_message("s", "agent", message("two"))
    unit.update_agent("s", state(k=2))
    before, _, after = unit.pending()
    assert isinstance(before, UpdateAgent)
    assert isinstance(after, UpdateAgent)
    assert (before.expected, before.fields["state"]) == (1, {"k": 1})
    assert (after.expected, after.fields["state"]) == (2, {"k": 2})


def test_the_last_message_with_more_content_replaces() -> None:
    unit = opened(agent=stored_agent("one", "two"))
    again = continued("two", "and more")
    unit.create_message("s", "agent", again)
    (change,) = unit.pending()
    assert isinstance(change, ReplaceMessage)
    assert (change.agent_id, change.message_id) == ("agent", 1)
    assert change.fields["message"] == again.message
    assert change.fields["redact_message"] is None
    assert again.message_id == 1
    unit.create_message("s", "agent", message("three"))
    assert appended(unit) == [("agent", 2, "three")]


def test_a_pending_message_with_more_content_replaces_as_often_as_it_grows() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.create_message("s", "agent", message("two"))
    unit.create_message("s", "agent", continued("two", "more"))
    unit.create_message("s", "agent", continued("two", "more", "and more"))
    assert kinds(unit.pending()) == ["AppendMessage", "ReplaceMessage", "ReplaceMessage"]
    assert appended(unit) == [("agent", 1, "two")]


def test_a_redacted_message_with_more_content_replaces() -> None:
    unit = opened(agent=stored_agent("one"))
    redacted = message("two", 1)
    unit.create_message("s", "agent", redacted)
    redacted.redact_message = {"role": "user", "content": [{"text": "[redacted]"}], "tracking_id": "two"}
    unit.update_message("s", "agent", redacted)
    longer = message("two")
    longer.message = {"role": "user", "content": [{"text": "[redacted]"}, {"text": "more"}], "tracking_id": "two"}
    unit.create_message("s", "agent", longer)
    assert kinds(unit.pending()) == ["AppendMessage", "ReplaceMessage", "ReplaceMessage"]


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(["one"], id="the same message as before the last"),
        pytest.param(["one", "more"], id="more content than before the last"),
        pytest.param(["two"], id="the same message as the last"),
        pytest.param(["other", "content", "tracking_id=two"], id="the id of the last with other content"),
    ],
)
def test_a_tracking_id_that_was_used_before_appends(again: list[str]) -> None:
    unit = opened(agent=stored_agent("one", "two"))
    reused = continued(*again)
    if again[-1].startswith("tracking_id="):
        reused.message["content"].pop()
        reused.message["tracking_id"] = again[-1].removeprefix("tracking_id=")
    unit.create_message("s", "agent", reused)
    assert [(change.agent_id, change.message["message_id"]) for change in unit.pending()] == [("agent", 2)]
    assert reused.message_id == 2


def test_the_same_tracking_id_of_another_agent_appends() -> None:
    unit = opened(one=stored_agent("a"), two=stored_agent())
    unit.create_message("s", "two", message("a"))
    assert appended(unit) == [("two", 0, "a")]


def test_messages_without_a_tracking_id_are_appended() -> None:
    unit = opened(agent=stored_agent())
    for _ in range(2):
        unit.create_message("s", "agent", SessionMessage({"role": "user", "content": [{"text": "same"}]}, 0))
    assert appended(unit) == [("agent", 0, "same"), ("agent", 1, "same")]


def test_a_redaction_is_recorded_without_the_original() -> None:
    unit = opened(agent=stored_agent("my card is 4111"))
    redacted = message("my card is 4111")
    redacted.redact_message = {"role": "user", "content": [{"text": "[redacted]"}]}
    unit.update_message("s", "agent", redacted)
    (change,) = unit.pending()
    assert isinstance(change, ReplaceMessage)
    assert change.message_id == 0
    assert change.fields["message"] == {"role": "user", "content": [{"text": "[redacted]"}]}
    assert change.fields["redact_message"] == {"role": "user", "content": [{"text": "[redacted]"}]}
    assert "card is 4111" not in repr(change)


@pytest.mark.parametrize("message_id", [-1, 1, 7])
def test_a_message_that_is_not_there_cannot_be_replaced(message_id: int) -> None:
    unit = opened(agent=stored_agent("one"))
    with pytest.raises(MessageNotFoundError, match=f"'agent' has no message {message_id}"):
        unit.update_message("s", "agent", message("x", message_id))
    assert unit.pending() == ()


def test_what_happens_to_a_message_or_state_later_is_not_recorded() -> None:
    unit = opened()
    given, values = message("one"), {"list": [1]}
    unit.create_agent("s", state(values=values))
    unit.create_message("s", "agent", given)
    unit.update_agent("s", state(values=values))
    given.message["content"][0]["text"] = "changed"
    given.message["content"].append({"text": "more"})
    values["list"].append(2)
    created, first, updated = unit.pending()
    assert isinstance(created, CreateAgent)
    assert isinstance(first, AppendMessage)
    assert isinstance(updated, UpdateAgent)
    assert created.document["agent_data"]["state"] == {"values": {"list": [1]}}
    assert first.message["message"] == said("one")
    assert updated.fields["state"] == {"values": {"list": [1]}}


def test_metrics_go_to_the_last_message_an_invocation_appended() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.create_message("s", "agent", message("two"))
    unit.create_message("s", "agent", message("three"))
    unit.record_metrics("agent", {"cycle_metrics": {"cycle_count": 1}})
    assert unit.pending()[2:] == (
        SetMessageFields("agent", 2, {"event_loop_metrics": {"cycle_metrics": {"cycle_count": 1}}}),
    )


def test_an_invocation_that_appended_nothing_has_no_metrics() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.record_metrics("agent", {"n": 1})
    unit.create_message("s", "agent", message("two"))
    unit.record_metrics("agent", None)
    unit.record_metrics("agent", {"n": 2})
    assert kinds(unit.pending()) == ["AppendMessage"]


def test_a_configuration_is_recorded_when_it_changes() -> None:
    unit = opened(agent=stored_agent("one", model="m", system_prompt="p"))
    unit.record_config("agent", CapturedConfig("m", "p"))
    assert unit.pending() == ()
    unit.record_config("agent", CapturedConfig("m", "q"))
    unit.record_config("agent", CapturedConfig("m", "q"))
    (change,) = unit.pending()
    assert isinstance(change, ObserveConfig)
    assert (change.expected, change.fields) == (1, {"system_prompt": "q"})


# Settling.


def test_changes_stay_until_they_are_settled() -> None:
    unit = opened(agent=stored_agent())
    unit.create_message("s", "agent", message("one"))
    sent = unit.pending()
    unit.create_message("s", "agent", message("two"))
    assert unit.pending()[:1] == sent
    unit.settle(len(sent), {})
    assert appended(unit) == [("agent", 1, "two")]
    unit.settle(1, {})
    assert unit.pending() == ()


def test_what_was_pending_is_not_changed_by_what_is_recorded_later() -> None:
    unit = opened(agent=stored_agent())
    unit.create_message("s", "agent", message("one"))
    sent = unit.pending()
    unit.create_message("s", "agent", message("two"))
    assert kinds(sent) == ["AppendMessage"]


def test_a_refusal_stays_for_the_agent_and_for_it_only() -> None:
    unit = opened(agent=stored_agent("one"), other=stored_agent("two"))
    unit.create_message("s", "agent", message("three"))
    unit.settle(1, {"agent": SessionConflictError("somebody was there")})
    for call in (
        lambda: unit.create_message("s", "agent", message("four")),
        lambda: unit.create_message("s", "agent", message("one")),
        lambda: unit.update_message("s", "agent", message("one")),
        lambda: unit.update_agent("s", state()),
        lambda: unit.record_config("agent", CapturedConfig("m", None)),
        lambda: unit.raise_refusal("agent"),
        unit.raise_refusal,
    ):
        with pytest.raises(SessionConflictError, match=r"^somebody was there$"):
            call()
    unit.raise_refusal("other")
    unit.create_message("s", "other", message("five"))
    assert appended(unit) == [("other", 1, "five")]


def test_what_a_refused_agent_had_recorded_meanwhile_is_refused_too() -> None:
    """It would follow, or overwrite, the message of whoever was there first."""
    unit = opened(agent=stored_agent("one"), other=stored_agent("two"))
    unit.create_message("s", "agent", message("ours"))
    sent = unit.pending()
    unit.create_message("s", "agent", message("answer"))
    unit.create_message("s", "other", message("five"))
    unit.update_message("s", "agent", message("ours", 1))
    unit.settle(len(sent), {"agent": SessionConflictError("somebody was there")})
    assert appended(unit) == [("other", 1, "five")]
    assert kinds(unit.pending()) == ["AppendMessage"]


def test_a_refusal_is_told_once_at_the_end() -> None:
    unit = opened(agent=stored_agent("one"), other=stored_agent("two"))
    unit.settle(0, {"agent": SessionConflictError("first"), "other": SessionConflictError("second")})
    with pytest.raises(SessionConflictError, match=r"^first$"):
        unit.raise_refusal("agent")
    with pytest.raises(SessionConflictError, match=r"^second$"):
        unit.raise_unreported_refusal()
    unit.raise_unreported_refusal()


def test_nothing_refused_raises_nothing() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.raise_refusal()
    unit.raise_refusal("agent")
    unit.raise_refusal("nobody")
    unit.raise_unreported_refusal()


def test_every_telling_of_a_refusal_is_an_error_of_its_own() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.settle(0, {"agent": DatabaseUnavailableError("away")})
    told = []
    for _ in range(2):
        with pytest.raises(DatabaseUnavailableError) as refused:
            unit.raise_refusal("agent")
        told.append(refused.value)
    assert told[0] is not told[1]


def test_a_closed_session_records_nothing() -> None:
    unit = opened(agent=stored_agent("one"))
    unit.create_message("s", "agent", message("two"))
    unit.close()
    for call in (
        lambda: unit.create_message("s", "agent", message("three")),
        lambda: unit.create_message("s", "agent", message("one")),
        lambda: unit.update_message("s", "agent", message("one")),
        lambda: unit.update_agent("s", state()),
        lambda: unit.create_agent("s", state("other")),
    ):
        with pytest.raises(SessionClosedError, match="'s' is closed"):
            call()
    assert appended(unit) == [("agent", 1, "two")]
    assert unit.read_agent("s", "agent") is not None


def test_an_id_of_a_message_that_could_not_be_recorded_is_given_again() -> None:
    unit = opened(agent=stored_agent("one"))
    bad: Any = {"role": "user", "content": [{"text": object()}], "tracking_id": "bad"}
    with pytest.raises(MongoDBSessionError):
        unit.create_message("s", "agent", SessionMessage(bad, 0))
    unit.create_message("s", "agent", message("bad"))
    assert appended(unit) == [("agent", 1, "bad")]
