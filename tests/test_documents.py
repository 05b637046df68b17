"""What a session document is: keys, dates, and Strands' dataclasses to documents and back. No server."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import bson
import pytest
from bson import ObjectId
from hypothesis import given, settings
from hypothesis import strategies as st
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import InvalidArgumentError
from mongodb_session_manager._format.codec import CODEC_OPTIONS
from mongodb_session_manager._format.dates import now, to_date, to_iso
from mongodb_session_manager._format.documents import (
    agent_from,
    agent_state,
    message_body,
    message_from,
    new_agent,
    new_session,
    session_from,
    stored_message,
)
from mongodb_session_manager._format.ids import agent_id_of, agent_key, checked_id, numbered

MOMENT = datetime(2025, 3, 4, 5, 6, 7, 89000, tzinfo=UTC)
ISO = "2025-03-04T05:06:07.089000+00:00"
LATER = datetime(2025, 3, 4, 6, 0, 0, tzinfo=UTC)
LATER_ISO = "2025-03-04T06:00:00+00:00"


def through_bson(document: Any) -> Any:
    return bson.decode(bson.encode({"v": document}, codec_options=CODEC_OPTIONS), CODEC_OPTIONS)["v"]


# Ids.


@pytest.mark.parametrize("name", ["session_id", "agent_id"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"$ne": None}, "must be a str, not dict"),
        ("", "must not be empty"),
        ("a\0b", "must not contain a NUL character"),
        (7, "must be a str, not int"),
        (None, "must be a str, not NoneType"),
        (b"s", "must be a str, not bytes"),
        ("\ud83d", "must be valid Unicode without lone surrogates"),
    ],
)
def test_an_id_that_cannot_be_one_is_refused_by_name(value: object, reason: str, name: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        checked_id(value, name)
    assert str(refused.value) == f"{name} {reason}"


@pytest.mark.parametrize("value", ["s", " ", "a.b", "$x", "日本", "😀", "x" * 200])
def test_any_other_text_is_an_id(value: str) -> None:
    assert checked_id(value, "session_id") == value


@pytest.mark.parametrize(
    ("agent_id", "key"),
    [
        ("agent", "agent"),
        ("a.b", "a%2Eb"),
        ("$x", "%24x"),
        ("50%", "50%25"),
        ("%2E", "%252E"),
        ("a.b$c%d", "a%2Eb%24c%25d"),
        ("日本", "日本"),
        ("x" * 200, "x" * 200),
    ],
)
def test_agent_key(agent_id: str, key: str) -> None:
    assert agent_key(agent_id) == key
    assert agent_id_of(key) == agent_id


@pytest.mark.parametrize("agent_id", [{"$ne": None}, "", "a\0b", None, 7, "\ud83d"])
def test_agent_key_refuses_what_is_no_id(agent_id: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^agent_id must"):
        agent_key(agent_id)


ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1) | st.text(
    "%.$245Ee", min_size=1
)


@settings(deadline=None, derandomize=True)
@given(ids)
def test_agent_id_of_is_the_inverse_of_agent_key(agent_id: str) -> None:
    key = agent_key(agent_id)
    assert "." not in key
    assert "$" not in key
    assert agent_id_of(key) == agent_id


@settings(deadline=None, derandomize=True)
@given(ids, ids)
def test_two_agents_have_two_keys(one: str, other: str) -> None:
    assert (agent_key(one) == agent_key(other)) == (one == other)


# Dates.


@pytest.mark.parametrize(
    ("value", "date"),
    [
        ("2025-03-04T05:06:07.089000+00:00", MOMENT),
        ("2025-03-04T05:06:07.089Z", MOMENT),
        ("2025-03-04T05:06:07.089", MOMENT),
        ("2025-03-04T10:36:07.089+05:30", MOMENT),
        (datetime(2025, 3, 4, 5, 6, 7, 89000), MOMENT),
        (MOMENT, MOMENT),
        (datetime(2025, 3, 4, 3, 6, 7, 89000, tzinfo=timezone(timedelta(hours=-2))), MOMENT),
    ],
)
def test_dates_are_utc(value: str | datetime, date: datetime) -> None:
    assert to_date(value) == date
    assert to_date(value).tzinfo is UTC
    assert to_iso(value) == "2025-03-04T05:06:07.089000+00:00"


def test_a_date_has_the_precision_with_which_it_is_stored() -> None:
    precise = to_date("2025-03-04T05:06:07.089123+00:00")
    assert precise == MOMENT
    assert through_bson(precise) == precise


def test_no_date_is_the_present() -> None:
    before = now()
    date = to_date(None)
    assert before <= date <= now()
    assert date.tzinfo is UTC
    assert date.microsecond % 1000 == 0


def test_now_is_as_mongodb_stores_it() -> None:
    moment = now()
    assert through_bson(moment) == moment
    assert moment.tzinfo is UTC


# Sessions.


def test_a_new_session() -> None:
    session: Any = new_session("s", "chat", MOMENT)
    assert type(session.pop("incarnation")) is ObjectId
    assert session == {
        "_id": "s",
        "session_id": "s",
        "application_name": "chat",
        "session_type": "AGENT",
        "created_at": MOMENT,
        "updated_at": MOMENT,
        "metadata": {},
        "feedbacks": [],
        "guardrail_events": [],
        "agents": {},
    }
    assert type(new_session("s", None, MOMENT)["session_type"]) is str
    assert new_session("s", None, MOMENT)["incarnation"] != new_session("s", None, MOMENT)["incarnation"]


def test_a_session_as_strands_sees_it() -> None:
    assert session_from({**new_session("s", None, MOMENT), "updated_at": LATER}) == Session(
        session_id="s", session_type=SessionType.AGENT, created_at=ISO, updated_at=LATER_ISO
    )


def test_a_session_of_old_with_string_dates_and_without_a_type() -> None:
    assert session_from({"_id": "s", "created_at": "2025-03-04T05:06:07.089Z", "updated_at": LATER}) == Session(
        session_id="s", session_type=SessionType.AGENT, created_at=ISO, updated_at=LATER_ISO
    )


# Agents.


def session_agent(**fields: Any) -> SessionAgent:
    return SessionAgent(
        **{
            "agent_id": "a.b",
            "state": {"count": 1, "a.b": "$x"},
            "conversation_manager_state": {"removed_message_count": 0},
            "_internal_state": {"interrupt_state": {}},
            "created_at": ISO,
            "updated_at": LATER_ISO,
            **fields,
        }
    )


def test_a_new_agent() -> None:
    assert new_agent(session_agent()) == {
        "agent_data": {
            "agent_id": "a.b",
            "created_at": MOMENT,
            "state": {"count": 1, "a.b": "$x"},
            "conversation_manager_state": {"removed_message_count": 0},
            "_internal_state": {"interrupt_state": {}},
            "updated_at": LATER,
        },
        "created_at": MOMENT,
        "updated_at": LATER,
        "next_message_id": 0,
        "messages": [],
    }


def test_what_follows_an_agent_leaves_its_id_and_creation_alone() -> None:
    assert agent_state(session_agent(state={"members": {1, 2}})) == {
        "state": {"members": {"__msm__": "set", "v": [1, 2]}},
        "conversation_manager_state": {"removed_message_count": 0},
        "_internal_state": {"interrupt_state": {}},
        "updated_at": LATER,
    }


@pytest.mark.parametrize(
    "state", [{}, {"$ref": "r", "$id": 1}, {1: "one"}, {"nul\0": "\ud83d"}, {"huge": 2**70, "members": {"a"}}]
)
def test_an_agent_comes_back(state: dict[Any, Any]) -> None:
    agent = session_agent(state=state, _internal_state=state)
    assert agent_from("a.b", through_bson(new_agent(agent))) == agent


def test_an_agent_of_old() -> None:
    stored = {
        "agent_data": {
            "agent_id": "agent",
            "state": {"key": {"__bytes_encoded__": True, "data": base64.b64encode(b"\0\1").decode()}},
            "conversation_manager_state": {"removed_message_count": 2},
            "created_at": ISO,
            "updated_at": ISO,
            "model": "m",
            "prompt_metadata": {"version": 3},
        },
        "created_at": "2025-03-04T05:06:07.089",
        "updated_at": LATER,
        "messages": [],
    }
    assert agent_from("agent", stored) == SessionAgent(
        agent_id="agent",
        state={"key": b"\0\1"},
        conversation_manager_state={"removed_message_count": 2},
        _internal_state={},
        created_at=ISO,
        updated_at=LATER_ISO,
    )


def test_an_agent_of_old_whose_dates_are_in_its_data() -> None:
    agent = agent_from("agent", {"agent_data": {"created_at": ISO, "updated_at": LATER_ISO}})
    assert agent == SessionAgent("agent", {}, {}, {}, ISO, LATER_ISO)


def test_an_agent_of_old_that_holds_nothing() -> None:
    agent = agent_from("agent", {})
    assert (agent.agent_id, agent.state, agent.conversation_manager_state) == ("agent", {}, {})
    assert datetime.fromisoformat(agent.created_at).utcoffset() == timedelta(0)


# Messages.


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"text": text}], "tracking_id": "t"}


def session_message(**fields: Any) -> SessionMessage:
    return SessionMessage(**{"message": said("hello"), "message_id": 3, "created_at": ISO, "updated_at": ISO, **fields})


def test_a_stored_message() -> None:
    assert stored_message(session_message(), 5) == {
        "message": {"role": "user", "content": [{"text": "hello"}], "tracking_id": "t"},
        "message_id": 5,
        "redact_message": None,
        "created_at": MOMENT,
        "updated_at": MOMENT,
    }


@pytest.mark.parametrize(
    "block",
    [
        {"text": "hello"},
        {"text": "a split emoji \ud83d"},
        {"image": {"format": "png", "source": {"bytes": b"\x89PNG\0"}}},
        {"toolUse": {"toolUseId": "1", "name": "f", "input": {"$ref": "r", "$id": 1, "a.b": 2**70, "nul\0": []}}},
        {"toolResult": {"toolUseId": "1", "status": "success", "content": [{"json": {"when": (1, 2)}}]}},
    ],
)
def test_a_message_comes_back(block: dict[str, Any]) -> None:
    message = session_message(message={"role": "user", "content": [block], "tracking_id": "t"}, updated_at=LATER_ISO)
    assert message_from(through_bson(stored_message(message, 3)), 0) == message


def test_a_redaction_keeps_nothing_of_the_original() -> None:
    message = session_message(message=said("my card is 4111"), redact_message=said("[redacted]"))
    stored = stored_message(message, 3)
    assert stored == {
        "message": {"role": "user", "content": [{"text": "[redacted]"}], "tracking_id": "t"},
        "message_id": 3,
        "redact_message": {"role": "user", "content": [{"text": "[redacted]"}], "tracking_id": "t"},
        "created_at": MOMENT,
        "updated_at": MOMENT,
    }
    assert b"card is 4111" not in bson.encode(dict(stored))
    assert message_body(message) == {
        "message": {"role": "user", "content": [{"text": "[redacted]"}], "tracking_id": "t"},
        "redact_message": {"role": "user", "content": [{"text": "[redacted]"}], "tracking_id": "t"},
        "updated_at": MOMENT,
    }


def test_a_redacted_message_comes_back_redacted() -> None:
    message = session_message(message=said("my card is 4111"), redact_message=said("[redacted]"))
    restored = message_from(through_bson(stored_message(message, 3)), 0)
    assert restored == session_message(message=said("[redacted]"), redact_message=said("[redacted]"))
    assert restored.to_message() == said("[redacted]")


def test_a_replacement_says_that_there_is_no_redaction() -> None:
    assert message_body(session_message()) == {"message": said("hello"), "redact_message": None, "updated_at": MOMENT}


def test_what_happens_to_a_message_later_does_not_reach_its_document() -> None:
    message = said("hello")
    stored = stored_message(session_message(message=message), 3)
    message["content"][0]["text"] = "changed"
    message["content"].append({"text": "more"})
    assert stored["message"] == said("hello")


def test_a_message_of_old() -> None:
    image = {"__bytes_encoded__": True, "data": base64.b64encode(b"\x89PNG").decode()}
    stored = {
        "message": {"role": "user", "content": [{"image": {"format": "png", "source": {"bytes": image}}}]},
        "message_id": 4,
        "redact_message": said("[redacted]"),
        "created_at": "2025-03-04T05:06:07.089Z",
        "updated_at": LATER,
        "event_loop_metrics": {"accumulated_usage": {}},
        "guardrail_event": {"action": "BLOCKED"},
        "rating": 5,
    }
    assert message_from(stored, 9) == SessionMessage(
        message={"role": "user", "content": [{"image": {"format": "png", "source": {"bytes": b"\x89PNG"}}}]},
        message_id=4,
        redact_message=said("[redacted]"),
        created_at=ISO,
        updated_at=LATER_ISO,
    )


def test_a_message_of_old_without_an_id_has_its_position() -> None:
    message = message_from({"message": said("hello")}, 7)
    assert message.message_id == 7
    assert message.message == said("hello")
    assert message.redact_message is None


@pytest.mark.parametrize(
    ("ids", "archived", "following", "expected"),
    [
        ([], 0, None, ([], 0)),
        ([0, 1], 0, None, ([0, 1], 2)),
        ([4, 9], 0, None, ([4, 9], 10)),
        ([9, 4], 0, 5, ([9, 10], 11)),
        ([None, None, None], 0, None, ([0, 1, 2], 3)),
        ([bson.Int64(2), None], 0, None, ([2, 3], 4)),
        ([0, True, 2.0], 0, 3, ([0, 1, 2], 3)),
        ([64, 65], 64, 66, ([64, 65], 66)),
        ([64, 65, 0, 1], 64, 66, ([64, 65, 66, 67], 68)),
        ([0, 1], 64, 128, ([128, 129], 130)),
        ([], 64, 64, ([], 64)),
        ([], 64, 70, ([], 70)),
        ([70, 75], 64, 76, ([70, 75], 76)),
    ],
)
def test_the_ids_of_messages_increase_and_stay_where_they_can(
    ids: list[Any], archived: int, following: Any, expected: tuple[list[int], int]
) -> None:
    sequence, then = numbered(ids, archived, following)
    assert (sequence, then) == expected
    assert {type(number) for number in (*sequence, then)} == {int}
