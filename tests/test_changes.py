"""What is recorded becomes one statement that says the same, and a statement that matched nothing is judged rightly."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from pymongo.collection import Collection
from strands.types.session import SessionAgent, SessionMessage

from mongodb_session_manager import (
    AgentNotFoundError,
    MessageNotFoundError,
    MongoDBSessionRepository,
    SessionConflictError,
)
from mongodb_session_manager._format.changes import (
    AgentWrite,
    AppendMessage,
    Change,
    CreateAgent,
    ReplaceMessage,
    SetMessageFields,
    UpdateAgent,
    fold,
)
from mongodb_session_manager._format.comparison import StoredView, reconcile
from mongodb_session_manager._format.content import block_ids, with_removed_content
from mongodb_session_manager._format.documents import agent_state, message_body, new_agent, new_session, stored_message
from mongodb_session_manager._format.expressions import array_at
from mongodb_session_manager._format.ids import agent_key
from mongodb_session_manager._format.statements import Update, compile_update
from mongodb_session_manager._format.view import view_without
from support import apply

INCARNATION = ObjectId()
T0 = datetime(2025, 1, 1, tzinfo=UTC)
T1, T2, T3 = (T0 + timedelta(seconds=seconds) for seconds in (1, 2, 3))


def said(text: str, tracking_id: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "user", "content": [{"text": text}]}
    return message if tracking_id is None else {**message, "tracking_id": tracking_id}


def element(message_id: int, text: str, moment: datetime = T1, **fields: Any) -> Any:
    """An element of `messages`, whose tracking id is its text."""
    return {
        "message": said(text, text),
        "message_id": message_id,
        "redact_message": None,
        "created_at": moment,
        "updated_at": moment,
        **fields,
    }


def append(message_id: int, text: str, moment: datetime = T1, agent_id: str = "agent") -> AppendMessage:
    return AppendMessage(agent_id, element(message_id, text, moment))


def new(agent_id: str = "agent", moment: datetime = T0) -> CreateAgent:
    document = {
        "agent_data": {"agent_id": agent_id, "state": {}, "created_at": moment, "updated_at": moment},
        "created_at": moment,
        "updated_at": moment,
        "next_message_id": 0,
        "messages": [],
    }
    return CreateAgent(agent_id, document)


def state(expected: int | None, value: Any, moment: datetime = T2, agent_id: str = "agent") -> UpdateAgent:
    return UpdateAgent(agent_id, expected, {"state": value}, moment)


def compiled(*changes: Change) -> Update:
    return compile_update("s", fold(changes).values())


# Folding and compiling.


def test_append() -> None:
    assert compiled(append(4, "one", T1), append(5, "two", T2)) == Update(
        {"_id": "s", "agents.agent.next_message_id": 4},
        {
            "$set": {"agents.agent.next_message_id": 6, "agents.agent.updated_at": T2, "updated_at": T2},
            "$push": {"agents.agent.messages": {"$each": [element(4, "one", T1), element(5, "two", T2)]}},
        },
        None,
    )


def test_create_alone() -> None:
    assert compiled(new()) == Update(
        {"_id": "s", "agents.agent": None},
        {"$set": {"agents.agent": new().document, "updated_at": T0}},
        None,
    )


def test_create_append_state_and_metrics_in_one() -> None:
    metrics = {"event_loop_metrics": {"accumulated_usage": {"inputTokens": 1}}}
    changes = [new(), append(0, "one", T1), state(1, {"k": 1}), append(1, "two", T3)]
    assert compiled(*changes, SetMessageFields("agent", 1, metrics)) == Update(
        {"_id": "s", "agents.agent": None},
        {
            "$set": {
                "agents.agent": {
                    "agent_data": {"agent_id": "agent", "state": {"k": 1}, "created_at": T0, "updated_at": T0},
                    "created_at": T0,
                    "updated_at": T3,
                    "next_message_id": 2,
                    "messages": [element(0, "one", T1), {**element(1, "two", T3), **metrics}],
                },
                "updated_at": T3,
            }
        },
        None,
    )


def test_state_only() -> None:
    assert compiled(state(3, {"k": 1}, T1), state(3, {"k": 2}, T2)) == Update(
        {"_id": "s", "agents.agent.next_message_id": 3},
        {"$set": {"agents.agent.agent_data.state": {"k": 2}, "agents.agent.updated_at": T2, "updated_at": T2}},
        None,
    )


def test_state_whatever_is_stored() -> None:
    assert compiled(state(None, {"k": 1})) == Update(
        {"_id": "s", "agents.agent": {"$exists": True}},
        {"$set": {"agents.agent.agent_data.state": {"k": 1}, "agents.agent.updated_at": T2, "updated_at": T2}},
        None,
    )


def test_append_and_state() -> None:
    assert compiled(append(4, "one", T1), state(5, {"k": 1}, T2)) == Update(
        {"_id": "s", "agents.agent.next_message_id": 4},
        {
            "$set": {
                "agents.agent.next_message_id": 5,
                "agents.agent.agent_data.state": {"k": 1},
                "agents.agent.updated_at": T2,
                "updated_at": T2,
            },
            "$push": {"agents.agent.messages": {"$each": [element(4, "one", T1)]}},
        },
        None,
    )


def replacing(path: str, contents: dict[int, dict[str, Any]], appended: Sequence[Any] = ()) -> dict[str, Any]:
    """The expressions for an agent's messages and revision once some have another content."""
    branches = [
        {
            "case": {"$eq": ["$$message.message_id", message_id]},
            "then": {"$mergeObjects": ["$$message", {name: {"$literal": value} for name, value in fields.items()}]},
        }
        for message_id, fields in contents.items()
    ]
    replaced = {
        "$map": {
            "input": {"$ifNull": [f"${path}.messages", []]},
            "as": "message",
            "in": {"$switch": {"branches": branches, "default": "$$message"}},
        }
    }
    return {
        f"{path}.messages": {"$concatArrays": [replaced, {"$literal": list(appended)}]},
        f"{path}.revision": {"$add": [{"$ifNull": [f"${path}.revision", 0]}, 1]},
    }


def removing(path: str, *message_ids: int) -> dict[str, Any]:
    """The expressions for the attachments that are to be removed, and for the view without the old content."""
    more = [
        {
            "$reduce": {
                "input": chosen(path, message_id),
                "initialValue": [],
                "in": {"$concatArrays": ["$$value", array_at("$$this.attachments")]},
            }
        }
        for message_id in message_ids
    ]
    listed = {"$concatArrays": [array_at("$removed_attachments"), "$$more"]}
    unless_empty = {"$cond": [{"$eq": ["$$more", []]}, "$removed_attachments", listed]}
    removed = {"removed_attachments": {"$let": {"vars": {"more": {"$concatArrays": more}}, "in": unless_empty}}}
    return {f"{path}.view": view_without(f"${path}", message_ids), **removed}


def chosen(path: str, message_id: int) -> dict[str, Any]:
    """The expression for the messages with an id."""
    is_meant = {"$eq": ["$$message.message_id", message_id]}
    return {"$filter": {"input": array_at(f"${path}.messages"), "as": "message", "cond": is_meant}}


def literal(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: {"$literal": value} for name, value in fields.items()}


NEW = {"attachments": ["new"]}
"""What a replacement has that may remove attachments; without it, it is one of a message that is known to have none."""


def test_a_message_without_attachments_is_replaced_by_a_plain_update() -> None:
    fields = {"message": said("longer"), "updated_at": T2}
    assert compiled(ReplaceMessage("agent", 7, fields)) == Update(
        {"_id": "s", "agents.agent.messages.message_id": {"$all": [7]}},
        {
            "$set": {
                "agents.agent.updated_at": T2,
                "updated_at": T2,
                "agents.agent.messages.$[m0].message": said("longer"),
                "agents.agent.messages.$[m0].updated_at": T2,
            },
            "$inc": {"agents.agent.revision": 1},
        },
        [{"m0.message_id": 7}],
    )


def test_replace() -> None:
    fields = {"message": said("[redacted]"), "redact_message": said("[redacted]"), "updated_at": T2, **NEW}
    assert compiled(ReplaceMessage("agent", 7, fields)) == Update(
        {"_id": "s", "agents.agent.messages.message_id": {"$all": [7]}},
        [
            {
                "$set": literal({"agents.agent.updated_at": T2, "updated_at": T2})
                | replacing("agents.agent", {7: fields})
                | removing("agents.agent", 7)
                | {"removed_content": with_removed_content([block_ids(chosen("agents.agent", 7))])}
            }
        ],
        None,
    )


def test_replace_several_in_any_order_and_metrics_of_one() -> None:
    assert compiled(
        ReplaceMessage("agent", 7, {"message": said("first"), "updated_at": T1, **NEW}),
        ReplaceMessage("agent", 2, {"message": said("other"), "updated_at": T2, **NEW}),
        ReplaceMessage("agent", 7, {"message": said("last"), "updated_at": T3, **NEW}),
        SetMessageFields("agent", 7, {"event_loop_metrics": {"n": 1}}),
    ) == Update(
        {"_id": "s", "agents.agent.messages.message_id": {"$all": [2, 7]}},
        [
            {
                "$set": literal({"agents.agent.updated_at": T3, "updated_at": T3})
                | replacing(
                    "agents.agent",
                    {
                        7: {"message": said("last"), "updated_at": T3, **NEW, "event_loop_metrics": {"n": 1}},
                        2: {"message": said("other"), "updated_at": T2, **NEW},
                    },
                )
                | removing("agents.agent", 7, 2)
            }
        ],
        None,
    )


def test_metrics_alone_touch_no_date() -> None:
    assert compiled(SetMessageFields("agent", 7, {"event_loop_metrics": {"n": 1}})) == Update(
        {"_id": "s", "agents.agent.messages.message_id": {"$all": [7]}},
        {
            "$set": {"agents.agent.messages.$[m0].event_loop_metrics": {"n": 1}},
            "$inc": {"agents.agent.revision": 1},
        },
        [{"m0.message_id": 7}],
    )


def test_a_replacement_of_a_pending_message_is_pushed_in_its_place() -> None:
    body = {"message": said("[redacted]", "one"), "redact_message": said("[redacted]", "one"), "updated_at": T2}
    assert compiled(append(4, "one", T1), ReplaceMessage("agent", 4, body)) == Update(
        {"_id": "s", "agents.agent.next_message_id": 4},
        [
            {
                "$set": literal({"agents.agent.next_message_id": 5, "agents.agent.updated_at": T2, "updated_at": T2})
                | {
                    "agents.agent.messages": {
                        "$concatArrays": [
                            {"$ifNull": ["$agents.agent.messages", []]},
                            {"$literal": [{**element(4, "one", T1), **body}]},
                        ]
                    },
                    "removed_content": with_removed_content([["one"]]),
                }
            }
        ],
        None,
    )


def test_metrics_of_a_pending_message_are_pushed_with_it() -> None:
    metrics = {"event_loop_metrics": {"n": 1}}
    assert compiled(append(4, "one"), SetMessageFields("agent", 4, metrics)) == Update(
        {"_id": "s", "agents.agent.next_message_id": 4},
        {
            "$set": {"agents.agent.next_message_id": 5, "agents.agent.updated_at": T1, "updated_at": T1},
            "$push": {"agents.agent.messages": {"$each": [{**element(4, "one"), **metrics}]}},
        },
        None,
    )


def test_several_agents_in_one_statement() -> None:
    assert compiled(
        append(4, "one", T1, agent_id="a.b"),
        new("$x", T0),
        append(0, "hi", T3, agent_id="$x"),
        state(2, {"k": 1}, T2, agent_id="50%"),
        SetMessageFields("日本", 1, {"event_loop_metrics": {"n": 1}}),
    ) == Update(
        {
            "_id": "s",
            "agents.a%2Eb.next_message_id": 4,
            "agents.%24x": None,
            "agents.50%25.next_message_id": 2,
            "agents.日本.messages.message_id": {"$all": [1]},
        },
        {
            "$set": {
                "agents.a%2Eb.next_message_id": 5,
                "agents.a%2Eb.updated_at": T1,
                "agents.%24x": {
                    "agent_data": {"agent_id": "$x", "state": {}, "created_at": T0, "updated_at": T0},
                    "created_at": T0,
                    "updated_at": T3,
                    "next_message_id": 1,
                    "messages": [element(0, "hi", T3)],
                },
                "agents.50%25.agent_data.state": {"k": 1},
                "agents.50%25.updated_at": T2,
                "agents.日本.messages.$[m0].event_loop_metrics": {"n": 1},
                "updated_at": T3,
            },
            "$push": {"agents.a%2Eb.messages": {"$each": [element(4, "one", T1)]}},
            "$inc": {"agents.日本.revision": 1},
        },
        [{"m0.message_id": 1}],
    )


def test_replace_and_append_together_are_a_pipeline() -> None:
    replaced = {"message": said("new"), "updated_at": T1, **NEW}
    assert compiled(ReplaceMessage("agent", 1, replaced), append(2, "two", T2), state(3, {"$k": 1}, T3)) == Update(
        {
            "_id": "s",
            "agents.agent.next_message_id": 2,
            "agents.agent.messages.message_id": {"$all": [1]},
        },
        [
            {
                "$set": {
                    "agents.agent.next_message_id": {"$literal": 3},
                    "agents.agent.agent_data.state": {"$literal": {"$k": 1}},
                    "agents.agent.updated_at": {"$literal": T3},
                    "updated_at": {"$literal": T3},
                }
                | replacing("agents.agent", {1: replaced}, [element(2, "two", T2)])
                | removing("agents.agent", 1)
            }
        ],
        None,
    )


def test_one_agent_appends_while_another_gets_metrics_without_a_pipeline() -> None:
    update = compiled(append(4, "one"), SetMessageFields("other", 1, {"event_loop_metrics": {"n": 1}}))
    assert update.update == {
        "$set": {
            "agents.agent.next_message_id": 5,
            "agents.agent.updated_at": T1,
            "updated_at": T1,
            "agents.other.messages.$[m0].event_loop_metrics": {"n": 1},
        },
        "$push": {"agents.agent.messages": {"$each": [element(4, "one")]}},
        "$inc": {"agents.other.revision": 1},
    }


def test_folding_changes_nothing_of_what_was_recorded() -> None:
    recorded = [new(), append(0, "one"), append(1, "two")]
    more = [state(2, {"k": 1}), SetMessageFields("agent", 1, {"event_loop_metrics": {"n": 1}})]
    compiled(*recorded, *more)
    assert recorded == [new(), append(0, "one"), append(1, "two")]
    assert more == [state(2, {"k": 1}), SetMessageFields("agent", 1, {"event_loop_metrics": {"n": 1}})]
    replaced = [ReplaceMessage("agent", 0, {"message": said("a"), "updated_at": T1})]
    compiled(*replaced, SetMessageFields("agent", 0, {"event_loop_metrics": {"n": 1}}))
    assert replaced == [ReplaceMessage("agent", 0, {"message": said("a"), "updated_at": T1})]


# Reconciling.


def write(*changes: Change) -> AgentWrite:
    (folded,) = fold(changes).values()
    return folded


def view(next_message_id: int, *messages: Any) -> StoredView:
    return StoredView(next_message_id, {message["message_id"]: message for message in messages})


def test_nothing_is_left_of_a_write_whose_acknowledgement_was_lost() -> None:
    stored = view(2, element(0, "before"), element(1, "ours"))
    assert reconcile(write(append(1, "ours")), stored) is None


def test_nothing_is_left_of_it_when_somebody_wrote_since() -> None:
    stored = view(3, element(1, "ours"), element(2, "theirs"))
    assert reconcile(write(append(1, "ours"), state(2, {"k": 1})), stored) is None


def test_nothing_is_left_of_a_new_agent_whose_acknowledgement_was_lost() -> None:
    assert reconcile(write(new(), append(0, "ours")), view(1, element(0, "ours"))) is None


def test_state_that_came_with_stored_messages_is_said_again() -> None:
    rest = reconcile(write(append(1, "ours"), state(2, {"k": 1})), view(2, element(1, "ours")))
    assert rest is not None
    assert compile_update("s", [rest]) == Update(
        {"_id": "s", "agents.agent.next_message_id": 2},
        {"$set": {"agents.agent.agent_data.state": {"k": 1}, "agents.agent.updated_at": T2, "updated_at": T2}},
        None,
    )


def test_what_follows_a_stored_prefix_is_left() -> None:
    ours = write(append(1, "one"), append(2, "two", T2), append(3, "three", T3))
    rest = reconcile(ours, view(3, element(1, "one"), element(2, "two", T2)))
    assert rest is not None
    assert compile_update("s", [rest]) == Update(
        {"_id": "s", "agents.agent.next_message_id": 3},
        {
            "$set": {"agents.agent.next_message_id": 4, "agents.agent.updated_at": T3, "updated_at": T3},
            "$push": {"agents.agent.messages": {"$each": [element(3, "three", T3)]}},
        },
        None,
    )


def test_somebody_elses_message_is_a_conflict() -> None:
    with pytest.raises(SessionConflictError, match=r"'agent'.*another writer stored message 1"):
        reconcile(write(append(1, "ours")), view(2, element(1, "theirs")))


def test_a_message_without_a_tracking_id_is_ours_if_it_is_the_same() -> None:
    ours = {**element(1, "ours"), "message": said("hello")}
    change = AppendMessage("agent", ours)
    assert reconcile(write(change), view(2, ours)) is None
    with pytest.raises(SessionConflictError):
        reconcile(write(change), view(2, {**ours, "created_at": T3}))
    with pytest.raises(SessionConflictError):
        reconcile(write(change), view(2, {**ours, "message": said("goodbye")}))


def test_messages_removed_behind_us_are_a_conflict() -> None:
    with pytest.raises(SessionConflictError):
        reconcile(write(append(4, "ours")), view(2, element(0, "a"), element(1, "b")))


def test_state_of_a_stale_agent_is_a_conflict() -> None:
    with pytest.raises(SessionConflictError):
        reconcile(write(state(1, {"k": 1})), view(2, element(0, "a"), element(1, "theirs")))


def test_an_agent_that_is_missing() -> None:
    for change in (append(0, "a"), state(None, {}), ReplaceMessage("agent", 0, {"message": {}, "updated_at": T1})):
        with pytest.raises(AgentNotFoundError, match="'agent'"):
            reconcile(write(change), None)


def test_an_agent_to_be_created_that_is_missing_is_created() -> None:
    ours = write(new(), append(0, "ours"))
    assert reconcile(ours, None) == ours


def test_an_agent_that_somebody_else_created_is_left_alone() -> None:
    assert reconcile(write(new()), view(0)) is None
    assert reconcile(write(new()), view(2, element(0, "a"), element(1, "b"))) is None


def test_messages_go_to_an_agent_that_somebody_else_created_empty() -> None:
    rest = reconcile(write(new(), append(0, "ours")), view(0))
    assert rest is not None
    assert compile_update("s", [rest]) == Update(
        {"_id": "s", "agents.agent.next_message_id": 0},
        {
            "$set": {"agents.agent.next_message_id": 1, "agents.agent.updated_at": T1, "updated_at": T1},
            "$push": {"agents.agent.messages": {"$each": [element(0, "ours")]}},
        },
        None,
    )


def test_messages_for_an_agent_that_somebody_else_created_and_used_are_a_conflict() -> None:
    with pytest.raises(SessionConflictError):
        reconcile(write(new(), append(0, "ours")), view(1, element(0, "theirs")))


def test_a_message_to_be_replaced_that_is_missing() -> None:
    change = ReplaceMessage("agent", 5, {"message": said("new"), "updated_at": T1})
    with pytest.raises(MessageNotFoundError, match="'agent' has no message 5"):
        reconcile(write(change), view(5, element(4, "a")))


def test_a_replacement_is_left_whatever_was_appended_meanwhile() -> None:
    ours = write(ReplaceMessage("agent", 0, {"message": said("new"), "updated_at": T1}))
    rest = reconcile(ours, view(9, element(0, "a"), element(8, "theirs")))
    assert rest is not None
    assert rest.replaced == {0: {"message": said("new"), "updated_at": T1}}


def test_a_replacement_recorded_after_a_lost_acknowledgement_is_left() -> None:
    redacted = {"message": said("[redacted]", "ours"), "redact_message": said("[redacted]", "ours"), "updated_at": T2}
    ours = write(append(1, "ours"), ReplaceMessage("agent", 1, redacted))
    rest = reconcile(ours, view(2, element(0, "before"), element(1, "ours")))
    assert rest is not None, "the stored message still holds what was redacted"
    assert rest.appended == []
    assert {**rest.replaced[1], **redacted} == rest.replaced[1]


def test_a_replacement_is_left_when_the_messages_are_stored_and_somebody_wrote_since() -> None:
    redacted = {"message": said("[redacted]"), "redact_message": said("[redacted]"), "updated_at": T2}
    ours = write(append(1, "ours"), ReplaceMessage("agent", 0, redacted))
    rest = reconcile(ours, view(3, element(0, "before"), element(1, "ours"), element(2, "theirs")))
    assert rest is not None, "the stored message still holds what was redacted"
    assert rest.replaced == {0: redacted}


# On a real server.

# Keys and values that mean something to MongoDB where they are not quoted.
values = st.recursive(
    st.none() | st.integers(-(2**70), 2**70) | st.sampled_from(["", "$x", "$$ROOT", "$agents.a", "日本", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["k", "a.b", "$set", "$literal", "$ref", "$id", "", "\0", "日本"]), inner)
    ),
    max_leaves=4,
)
AGENTS = ["agent", "a.b", "50%"]


def earlier_session() -> dict[str, Any]:
    """A session with an agent that another application has written to, too."""
    session: Any = new_session("s", None, T0)
    session |= {"viewer": "v", "incarnation": INCARNATION}
    session["agents"]["a%2Eb"] = {
        "agent_data": {"agent_id": "a.b", "state": {"old": True}, "prompt_metadata": {"version": 3}},
        "created_at": T0,
        "updated_at": T0,
        "next_message_id": 2,
        "messages": [{**element(0, "zero", T0), "rating": 5}, {**element(1, "one", T0), "seen": {"by": ["a"]}}],
        "colour": "red",
    }
    return session


@st.composite
def histories(draw: st.DrawFn) -> list[Change]:
    """Changes in an order in which a unit of work records them, each later than the one before."""
    next_ids = {"a.b": 2}
    moments = itertools.count(1)
    changes: list[Change] = []

    def message(agent_id: str, message_id: int, tracking_id: str, moment: str) -> SessionMessage:
        block = {"toolUse": {"toolUseId": "1", "name": "f", "input": {"v": draw(values)}}}
        body: Any = {"role": "assistant", "content": [block], "tracking_id": tracking_id}
        redacted: Any = said("[redacted]", tracking_id) if draw(st.integers(0, 4)) == 0 else None
        return SessionMessage(body, message_id, redacted, moment, moment)

    for step in range(draw(st.integers(1, 10))):
        agent_id = draw(st.sampled_from(AGENTS))
        date = T0 + timedelta(milliseconds=next(moments))
        moment = date.isoformat()
        if agent_id not in next_ids:
            next_ids[agent_id] = 0
            document = new_agent(SessionAgent(agent_id, {"v": draw(values)}, {}, {}, moment, moment))
            changes.append(CreateAgent(agent_id, document))
            continue
        following = next_ids[agent_id]
        kind = draw(st.sampled_from(["append", "append", "state", "model", "replace", "metrics"]))
        if kind == "append":
            changes.append(
                AppendMessage(agent_id, stored_message(message(agent_id, following, f"t{step}", moment), following))
            )
            next_ids[agent_id] += 1
        elif kind == "state":
            fields = agent_state(SessionAgent(agent_id, {"v": draw(values)}, {}, {}, moment, moment))
            changes.append(UpdateAgent(agent_id, following, fields, date))
        elif kind == "model":
            changes.append(UpdateAgent(agent_id, following, {"model": f"m{step}"}, date))
        elif following:
            message_id = draw(st.integers(0, following - 1))
            if kind == "metrics":
                changes.append(SetMessageFields(agent_id, message_id, {"event_loop_metrics": {"n": step}}))
            else:
                # A replacement keeps the tracking id of what it replaces.
                tracking_id = {
                    stored["message_id"]: stored["message"]["tracking_id"]
                    for stored in [element(0, "zero"), element(1, "one")] * (agent_id == "a.b")
                    + [
                        change.message
                        for change in changes
                        if isinstance(change, AppendMessage) and change.agent_id == agent_id
                    ]
                }[message_id]
                changes.append(
                    ReplaceMessage(
                        agent_id, message_id, message_body(message(agent_id, message_id, tracking_id, moment))
                    )
                )
    return changes


@st.composite
def cut_histories(draw: st.DrawFn) -> tuple[list[Change], list[list[Change]]]:
    """A history, whole and in pieces."""
    changes = draw(histories())
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(changes) - 1)), max_size=3)) | {0, len(changes)})
    return changes, [changes[start:end] for start, end in itertools.pairwise(cuts)]


def stored_after(stored: Collection[dict[str, Any]], statements: Iterable[Sequence[Change]]) -> Any:
    stored.replace_one({"_id": "s"}, earlier_session(), upsert=True)
    for changes in statements:
        update = compiled(*changes)
        result = stored.update_one(*update[:2], array_filters=update.array_filters)
        assert result.matched_count == 1
    return stored.find_one({"_id": "s"})


def without_revisions(session: Any) -> Any:
    """Leave out what counts the statements that replaced something, and what they have redacted for a moment."""
    session.pop("removed_content", None)
    for agent in session["agents"].values():
        agent.pop("revision", None)
    return session


@given(cut_histories())
def test_changes_that_are_folded_or_sent_again_say_what_they_said_one_by_one(
    shared_repository: MongoDBSessionRepository,
    stored: Collection[dict[str, Any]],
    history: tuple[list[Change], list[list[Change]]],
) -> None:
    changes, pieces = history
    # Each change is later than the one before, so that dates are equal too.
    one_by_one = without_revisions(stored_after(stored, ([change] for change in changes)))
    assert without_revisions(stored_after(stored, pieces)) == one_by_one
    assert without_revisions(stored_after(stored, [changes] if changes else [])) == one_by_one
    # After a flush of unknown outcome, the next one sends the same changes and those recorded since.
    stored.replace_one({"_id": "s"}, earlier_session())
    sent: list[Change] = []
    for piece in pieces:
        sent += piece
        assert apply(shared_repository, "s", sent) == {}
    assert apply(shared_repository, "s", sent) == {}
    # When the session and its agents changed last may be told by the first or by the last of these commands.
    left = without_revisions(stored.find_one({"_id": "s"}))
    assert without_dates(left) == without_dates(one_by_one)


def without_dates(session: Any) -> Any:
    agents = {key: {**agent, "updated_at": None} for key, agent in session["agents"].items()}
    return {**session, "updated_at": None, "agents": agents}


@pytest.fixture
def repository(repository: MongoDBSessionRepository, stored: Collection[dict[str, Any]]) -> MongoDBSessionRepository:
    stored.insert_one(earlier_session())
    return repository


def messages(stored: Collection[dict[str, Any]], agent_id: str = "a.b") -> list[Any]:
    document = stored.find_one({"_id": "s"})
    assert document is not None
    return document["agents"][agent_key(agent_id)]["messages"]


def test_a_redaction_after_a_lost_acknowledgement_is_stored(
    repository: MongoDBSessionRepository, stored: Collection[dict[str, Any]]
) -> None:
    first = append(2, "secret", agent_id="a.b")
    assert apply(repository, "s", [first]) == {}  # and the answer is lost
    redacted = said("[redacted]", "secret")
    body = {"message": redacted, "redact_message": redacted, "updated_at": T2}
    assert apply(repository, "s", [first, ReplaceMessage("a.b", 2, body)]) == {}
    assert messages(stored)[2:] == [{**element(2, ""), **body}]


def test_metrics_after_a_lost_acknowledgement_are_stored(
    repository: MongoDBSessionRepository, stored: Collection[dict[str, Any]]
) -> None:
    first = append(2, "answer", agent_id="a.b")
    assert apply(repository, "s", [first]) == {}  # and the answer is lost
    metrics = {"event_loop_metrics": {"n": 1}}
    assert apply(repository, "s", [first, SetMessageFields("a.b", 2, metrics)]) == {}
    assert messages(stored)[2:] == [{**element(2, "answer"), **metrics}]


def test_a_message_without_a_tracking_id_is_stored_once(
    repository: MongoDBSessionRepository, stored: Collection[dict[str, Any]]
) -> None:
    precise = "2025-03-04T05:06:07.089123+00:00"
    body: Any = {"role": "user", "content": [{"text": "hi"}]}
    change = AppendMessage("a.b", stored_message(SessionMessage(body, 2, None, precise, precise), 2))
    assert apply(repository, "s", [change]) == {}
    assert apply(repository, "s", [change]) == {}
    assert [message["message_id"] for message in messages(stored)] == [0, 1, 2]


def test_one_agent_is_refused_and_the_other_stored(
    repository: MongoDBSessionRepository, stored: Collection[dict[str, Any]]
) -> None:
    refused = apply(
        repository, "s", [append(1, "stale", agent_id="a.b"), new("agent"), append(0, "hi", agent_id="agent")]
    )
    assert list(refused) == ["a.b"]
    assert type(refused["a.b"]) is SessionConflictError
    assert messages(stored) == earlier_session()["agents"]["a%2Eb"]["messages"]
    assert messages(stored, "agent") == [element(0, "hi")]
