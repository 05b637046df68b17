"""Guardrails: what is redacted is gone from the database, and what happened is on record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pymongo
import pytest
from pymongo.collection import Collection
from strands import Agent, tool
from strands.types.exceptions import SessionException

from mongodb_session_manager import GUARDRAIL_STOP_REASONS, MongoDBSessionManagerFactory
from mongodb_session_manager._managers.capture import guardrail_event, summarize_policies
from mongodb_session_manager.demo import Redaction, ScriptedModel
from support import CommandLog, Session, agent, alternating, fail_point, message_ids, texts

Stored = Collection[dict[str, Any]]
Driver = pymongo.MongoClient[dict[str, Any]]

SECRET = "my card is 4111-1111"


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=alternating(False, True), ids=["manager", "async manager"])
def session(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Session:
    return Session(factory, runner, request.param)


def called(live: Agent, text: str) -> None:
    live(text)


def invoked(live: Agent, text: str) -> None:
    asyncio.run(live.invoke_async(text))


def streamed(live: Agent, text: str) -> None:
    async def stream() -> None:
        async for _ in live.stream_async(text):
            pass

    asyncio.run(stream())


TURNS = pytest.mark.parametrize("turn", alternating(called, invoked, streamed))
SAVE_ON = pytest.mark.parametrize("save_on", alternating("message", "invocation"))


def in_database(driver: Driver, database: str, text: str = "card is 4111") -> bool:
    """Tell whether a text is anywhere in the bytes of any document of a database."""
    names = driver[database].list_collection_names()
    assert "agent_sessions" in names
    return any(text.encode() in batch for name in names for batch in driver[database][name].find_raw_batches())


def without_time(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event without its timestamp, which must be a date in UTC."""
    timestamp = event["timestamp"]
    assert isinstance(timestamp, datetime)
    assert timestamp.utcoffset() == timedelta(0)
    return {key: value for key, value in event.items() if key != "timestamp"}


def message(text: str, role: str = "assistant") -> Any:
    return {"role": role, "content": [{"text": text}]}


# Strands' own redaction.


@TURNS
@SAVE_ON
def test_what_strands_redacts_is_gone_and_on_record(
    session: Session, turn: Callable[..., None], save_on: str, stored: Stored, driver: Driver, database: str
) -> None:
    session.open(save_on=save_on)
    live = agent(session.manager, "Hello.", Redaction("[removed]", answer="Let us not."), "Bye.")
    turn(live, "hi")
    turn(live, SECRET)
    turn(live, "bye")
    session.flush()
    assert not in_database(driver, database)
    document = stored.find_one({"_id": "s"})
    messages = document["agents"]["agent"]["messages"]
    assert message_ids(document) == [0, 1, 2, 3, 4, 5]
    assert texts(messages) == ["hi", "Hello.", "[removed]", "Let us not.", "bye", "Bye."]
    assert without_time(messages[2]["guardrail_event"]) == {"action": "BLOCKED"}
    assert ["guardrail_event" in entry for entry in messages] == [False, False, True, False, False, False]
    assert messages[2]["redact_message"]["content"] == [{"text": "[removed]"}]
    assert [without_time(event) for event in document["guardrail_events"]] == [
        {"action": "BLOCKED", "message_id": 2, "agent_id": "agent"}
    ]
    assert document["guardrail_events"][0]["timestamp"] == messages[2]["guardrail_event"]["timestamp"]
    assert stored.count_documents({"guardrail_events.timestamp": {"$type": "date"}}) == 1
    session.close()
    assert texts(agent(session.open().manager).messages)[2:4] == ["[removed]", "Let us not."]


@TURNS
def test_the_first_message_of_a_session_is_redacted(
    session: Session, turn: Callable[..., None], stored: Stored, driver: Driver, database: str
) -> None:
    for number, save_on in enumerate(("message", "invocation")):
        live = agent(session.open(save_on=save_on).manager, Redaction("[removed]"), agent_id=f"a.{number}")
        turn(live, SECRET)
        session.flush()
    assert not in_database(driver, database)
    document = stored.find_one({"_id": "s"})
    assert [(event["agent_id"], event["message_id"]) for event in document["guardrail_events"]] == [
        ("a.0", 0),
        ("a.1", 0),
    ]
    for key in ("a%2E0", "a%2E1"):
        messages = document["agents"][key]["messages"]
        assert texts(messages) == ["[removed]", "I cannot help with that."]
        assert without_time(messages[0]["guardrail_event"]) == {"action": "BLOCKED"}


@tool
def account() -> str:
    """Return the account of the user."""
    return SECRET


@SAVE_ON
def test_a_redacted_tool_result_is_gone(
    session: Session, save_on: str, stored: Stored, driver: Driver, database: str
) -> None:
    session.open(save_on=save_on)
    live = agent(session.manager, {"tool": "account"}, Redaction("[removed]"), tools=[account])
    live("What is my account?")
    session.flush()
    assert not in_database(driver, database)
    document = stored.find_one({"_id": "s"})
    assert [event["message_id"] for event in document["guardrail_events"]] == [2]
    (block,) = document["agents"]["agent"]["messages"][2]["message"]["content"]
    assert block["toolResult"]["content"] == [{"text": "[removed]"}]


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_a_redaction_costs_at_most_one_command(
    session: Session, commands: CommandLog, save_on: str, stored: Stored
) -> None:
    without = 2 if save_on == "message" else 1
    session.open(save_on=save_on)
    live = agent(session.manager, "Hello.", Redaction("[removed]"))
    live("hi")
    commands.clear()
    live(SECRET)
    session.manager.sync_agent(live)
    session.flush()
    # None of its own if the next message overtakes it on the way to the I/O loop.
    assert set(commands.names) <= {"update", "findAndModify"}
    assert len(commands.names) in (without, without + 1)
    assert len(stored.find_one({"_id": "s"})["guardrail_events"]) == 1


@pytest.mark.anyio
async def test_concurrent_redactions_of_several_agents(
    factory: MongoDBSessionManagerFactory, stored: Stored, driver: Driver, database: str
) -> None:
    manager = await factory.create_session_manager_async("s")
    agents = [agent(manager, "Hello.", Redaction("[removed]"), agent_id=f"agent{number}") for number in range(10)]

    async def talk(live: Agent) -> None:
        await live.invoke_async("hi")
        await live.invoke_async(SECRET)

    await asyncio.gather(*(talk(live) for live in agents))
    assert not await asyncio.to_thread(in_database, driver, database)
    document = await asyncio.to_thread(stored.find_one, {"_id": "s"})
    events = sorted((event["agent_id"], event["message_id"]) for event in document["guardrail_events"])
    assert events == [(f"agent{number}", 2) for number in range(10)]


# Explicit redaction, with what Bedrock says.

TRACE = {
    "trace": {
        "guardrail": {
            "modelOutput": [f"You said {SECRET}."],
            "inputAssessment": {
                "gr-1": {
                    "sensitiveInformationPolicy": {
                        "piiEntities": [
                            {"type": "CREDIT_DEBIT_CARD_NUMBER", "match": SECRET, "action": "BLOCKED", "detected": True}
                        ]
                    },
                    "wordPolicy": {"customWords": [{"match": SECRET, "action": "BLOCKED"}]},
                    "invocationMetrics": {"guardrailProcessingLatency": 120},
                }
            },
        }
    }
}
POLICIES = {
    "wordPolicy": ["CUSTOM"],
    "sensitiveInformationPolicy": ["CREDIT_DEBIT_CARD_NUMBER/BLOCKED"],
}
CLEAN_TRACE = {
    "trace": {
        "guardrail": {
            "modelOutput": ["[redacted]"],
            "inputAssessment": {
                "gr-1": {
                    "sensitiveInformationPolicy": {
                        "piiEntities": [
                            {
                                "type": "CREDIT_DEBIT_CARD_NUMBER",
                                "match": "[redacted]",
                                "action": "BLOCKED",
                                "detected": True,
                            }
                        ]
                    },
                    "wordPolicy": {"customWords": [{"match": "[redacted]", "action": "BLOCKED"}]},
                    "invocationMetrics": {"guardrailProcessingLatency": 120},
                }
            },
        }
    }
}
EXPLICIT = {"action": "GUARDRAIL_INTERVENED", "stop_reason": "guardrail_intervened", "guardrail_trace": TRACE}


def test_explicit_redaction(
    session: Session, stored: Stored, driver: Driver, database: str, commands: CommandLog
) -> None:
    session.open()
    live = agent(session.manager, f"You said {SECRET}.")
    live("hi")
    assert in_database(driver, database)
    commands.clear()
    session.manager.redact_latest_message(message("[removed]"), live, **EXPLICIT)
    session.flush()
    assert commands.names == ["findAndModify"]
    assert not in_database(driver, database)
    document = stored.find_one({"_id": "s"})
    messages = document["agents"]["agent"]["messages"]
    assert texts(messages) == ["hi", "[removed]"]
    event = {
        "action": "GUARDRAIL_INTERVENED",
        "stop_reason": "guardrail_intervened",
        "policies_triggered": POLICIES,
    }
    assert without_time(messages[1]["guardrail_event"]) == {**event, "trace": CLEAN_TRACE}
    assert [without_time(entry) for entry in document["guardrail_events"]] == [
        {**event, "message_id": 1, "agent_id": "agent"}
    ]
    assert messages[1]["event_loop_metrics"]["message_usage"]["outputTokens"] == 6
    assert "accumulated_usage" in messages[1]["event_loop_metrics"]


def test_the_trace_that_is_passed_is_left_alone(session: Session) -> None:
    session.open()
    live = agent(session.manager, "Hello.")
    live("hi")
    session.manager.redact_latest_message(message("[removed]"), live, **EXPLICIT)
    assert TRACE["trace"]["guardrail"]["modelOutput"] == [f"You said {SECRET}."]


def test_an_explicit_redaction_on_a_running_loop_is_stored_by_the_next_flush(
    factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, stored: Stored, driver: Driver, database: str
) -> None:
    async def turn() -> None:
        manager = await factory.create_session_manager_async("s")
        live = agent(manager, f"You said {SECRET}.")
        await live.invoke_async("hi")
        manager.redact_latest_message(message("[removed]"), live, action="NONE", stop_reason="content_filtered")
        await manager.flush()

    runner.run(turn())
    assert not in_database(driver, database)
    (event,) = stored.find_one({"_id": "s"})["guardrail_events"]
    assert without_time(event) == {
        "action": "NONE",
        "stop_reason": "content_filtered",
        "message_id": 1,
        "agent_id": "agent",
    }


@SAVE_ON
def test_a_message_of_a_resumed_session_is_redacted(
    session: Session, save_on: str, stored: Stored, driver: Driver, database: str
) -> None:
    agent(session.open().manager, f"You said {SECRET}.")("hi")
    session.close()
    assert in_database(driver, database)
    live = agent(session.open(save_on=save_on).manager, "Bye.")
    session.manager.redact_latest_message(message("[removed]"), live, **EXPLICIT)
    live("bye")
    session.flush()
    assert not in_database(driver, database)
    document = stored.find_one({"_id": "s"})
    assert texts(document["agents"]["agent"]["messages"]) == ["hi", "[removed]", "bye", "Bye."]
    assert [(event["message_id"], event["policies_triggered"]) for event in document["guardrail_events"]] == [
        (1, POLICIES)
    ]


LEAKS: dict[str, Any] = {
    "outputs": {"outputs": [{"text": f"You said {SECRET}."}]},
    "reasoning": {
        "assessments": [
            {
                "automatedReasoningPolicy": {
                    "findings": [{"invalid": {"translation": {"premises": [{"naturalLanguage": SECRET}]}}}]
                }
            }
        ]
    },
    "text": f"blocked: {SECRET}",
    "key": {"words": {SECRET: 1}},
    "tuple": {"quotes": (SECRET, [SECRET])},
    "match in a tuple": {"assessments": ({"match": "card is 4111"},)},
    "bytes": {"content": SECRET.encode()},
}


@pytest.mark.parametrize("trace", LEAKS.values(), ids=LEAKS)
def test_no_trace_holds_what_was_redacted(
    factory: MongoDBSessionManagerFactory, stored: Stored, driver: Driver, database: str, trace: Any
) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, SECRET)
    live("hi")
    manager.redact_latest_message(message("[removed]"), live, guardrail_trace=trace)
    assert not in_database(driver, database)
    assert len(stored.find_one({"_id": "s"})["guardrail_events"]) == 1


def test_two_redactions_are_two_events(session: Session, stored: Stored) -> None:
    session.open()
    live = agent(session.manager, Redaction("[removed]"), Redaction("[removed]"))
    live("one")
    live("two")
    session.flush()
    events = stored.find_one({"_id": "s"})["guardrail_events"]
    assert [event["message_id"] for event in events] == [0, 2]


def test_without_a_message_there_is_nothing_to_redact(session: Session, stored: Stored) -> None:
    session.open()
    live = agent(session.manager)
    with pytest.raises(SessionException, match="No message to redact"):
        session.manager.redact_latest_message(message("[removed]"), live)
    session.flush()
    document = stored.find_one({"_id": "s"})
    assert document["guardrail_events"] == []
    assert document["agents"]["agent"]["messages"] == []


def test_a_redaction_is_no_conflict_for_another_agent(session: Session, stored: Stored) -> None:
    first = session.open().manager
    other = agent(session.open().manager, "one", "two", agent_id="other")
    redacted = agent(first, Redaction("[removed]"))
    other("a")
    redacted(SECRET)
    other("b")
    session.flush()
    document = stored.find_one({"_id": "s"})
    assert message_ids(document, "other") == [0, 1, 2, 3]
    assert len(document["guardrail_events"]) == 1


# A lost acknowledgement.


@pytest.fixture(params=["embedded", "standalone"])
def lossy(request: pytest.FixtureRequest) -> str:
    """A server that takes fail points."""
    uri: str = request.getfixturevalue(request.param)
    return uri


LOST = {
    "failCommands": ["update", "findAndModify"],
    "errorLabels": ["RetryableWriteError"],
    "writeConcernError": {"code": 6, "errmsg": "the write is done, its acknowledgement is lost"},
}


@pytest.mark.own_database
@SAVE_ON
def test_a_lost_acknowledgement_is_one_event(lossy: str, database: str, commands: CommandLog, save_on: str) -> None:
    """The driver itself retries nothing here, so that every retry is the library's."""
    with (
        pymongo.MongoClient(lossy, tz_aware=True) as driver,
        MongoDBSessionManagerFactory(
            lossy, database, retryWrites=False, appname=database, event_listeners=[commands]
        ) as factory,
    ):
        for turns in range(2):
            manager = factory.create_session_manager(f"s{turns}", save_on=save_on)
            live = agent(manager, *["Hello."] * turns)
            for _ in range(turns):
                live("hi")
            failing = fail_point(lossy, appName=database, **LOST)

            def redact(_: Any, failing: Any = failing) -> Redaction:
                failing.__enter__()  # from here on, the next write
                return Redaction("[removed]")

            assert isinstance(live.model, ScriptedModel)
            live.model.replies.append(redact)
            live(SECRET)
            failing.__exit__(None, None, None)
            document = driver[database]["agent_sessions"].find_one({"_id": f"s{turns}"})
            assert [without_time(event) for event in document["guardrail_events"]] == [
                {"action": "BLOCKED", "message_id": 2 * turns, "agent_id": "agent"}
            ]
            assert message_ids(document) == [*range(2 * turns + 2)]
            assert texts(document["agents"]["agent"]["messages"])[2 * turns] == "[removed]"
            assert not in_database(driver, database)

            commands.clear()
            with fail_point(lossy, appName=database, **LOST):
                manager.redact_latest_message(message("[gone]"), live, **EXPLICIT)
            assert commands.names == ["findAndModify", "findAndModify"]
            document = driver[database]["agent_sessions"].find_one({"_id": f"s{turns}"})
            assert [event["message_id"] for event in document["guardrail_events"]] == [2 * turns, 2 * turns + 1]
            assert document["agents"]["agent"]["usage"]["invocations"] == turns + 1
        driver.drop_database(database)


# The summary of a trace of Bedrock.


def test_stop_reasons() -> None:
    assert frozenset({"guardrail_intervened", "content_filtered"}) == GUARDRAIL_STOP_REASONS
    assert isinstance(GUARDRAIL_STOP_REASONS, frozenset)


CONTENT = {
    "contentPolicy": {
        "filters": [
            {"type": "HATE", "confidence": "HIGH", "filterStrength": "HIGH", "action": "BLOCKED", "detected": True},
            {"type": "INSULTS", "confidence": "LOW", "filterStrength": "HIGH", "action": "NONE", "detected": True},
            {"type": "PROMPT_ATTACK", "confidence": "MEDIUM", "filterStrength": "HIGH", "action": "BLOCKED"},
        ]
    }
}
TOPIC = {
    "topicPolicy": {
        "topics": [
            {"name": "Investments", "type": "DENY", "action": "BLOCKED", "detected": True},
            {"name": "Medicine", "type": "DENY", "action": "NONE", "detected": False},
        ]
    }
}
WORDS = {
    "wordPolicy": {
        "customWords": [
            {"match": "competitor", "action": "BLOCKED", "detected": True},
            {"match": "other", "action": "NONE", "detected": True},
        ],
        "managedWordLists": [{"match": "damn", "type": "PROFANITY", "action": "BLOCKED", "detected": True}],
    }
}
SENSITIVE = {
    "sensitiveInformationPolicy": {
        "piiEntities": [
            {"type": "EMAIL", "match": "ada@example.org", "action": "ANONYMIZED", "detected": True},
            {"type": "EMAIL", "match": "bob@example.org", "action": "ANONYMIZED", "detected": True},
            {"type": "NAME", "match": "Ada", "action": "NONE", "detected": True},
            {"type": "PHONE", "match": "+47 22 33 44 55", "action": "BLOCKED", "detected": True},
        ],
        "regexes": [
            {"name": "booking", "regex": "[A-Z]{6}", "match": "QWERTY", "action": "BLOCKED", "detected": True},
        ],
    }
}
GROUNDING = {
    "contextualGroundingPolicy": {
        "filters": [
            {"type": "GROUNDING", "threshold": 0.75, "score": 0.12, "action": "BLOCKED", "detected": True},
            {"type": "RELEVANCE", "threshold": 0.5, "score": 0.99, "action": "NONE", "detected": False},
        ]
    }
}
METRICS = {
    "invocationMetrics": {
        "guardrailProcessingLatency": 337,
        "usage": {"topicPolicyUnits": 1, "contentPolicyUnits": 1},
        "guardrailCoverage": {"textCharacters": {"guarded": 39, "total": 39}},
    }
}

SUMMARIES: dict[str, tuple[Any, dict[str, list[str]]]] = {
    "content": (CONTENT, {"contentPolicy": ["HATE/HIGH", "PROMPT_ATTACK/MEDIUM"]}),
    "topic": (TOPIC, {"topicPolicy": ["Investments/BLOCKED"]}),
    "words": (WORDS, {"wordPolicy": ["CUSTOM", "PROFANITY"]}),
    "sensitive": (
        SENSITIVE,
        {"sensitiveInformationPolicy": ["EMAIL/ANONYMIZED", "PHONE/BLOCKED", "booking/BLOCKED"]},
    ),
    "grounding": (GROUNDING, {"contextualGroundingPolicy": ["GROUNDING/0.12/0.75"]}),
    "a whole trace of Converse": (
        {
            "guardrail": {
                "actionReason": "Guardrail blocked.",
                "modelOutput": ["..."],
                "inputAssessment": {"gr-1": {**TOPIC, **METRICS}},
                "outputAssessments": {"gr-1": [{**CONTENT, **GROUNDING, **METRICS}]},
            }
        },
        {
            "contentPolicy": ["HATE/HIGH", "PROMPT_ATTACK/MEDIUM"],
            "topicPolicy": ["Investments/BLOCKED"],
            "contextualGroundingPolicy": ["GROUNDING/0.12/0.75"],
        },
    ),
    "nested": (
        {"trace": {"guardrail": {"inputAssessment": {"gr-1": TOPIC}}}},
        {"topicPolicy": ["Investments/BLOCKED"]},
    ),
    "several guardrails": (
        {
            "inputAssessment": {
                "gr-1": {"topicPolicy": {"topics": [{"name": "One", "type": "DENY", "action": "BLOCKED"}]}},
                "gr-2": {"topicPolicy": {"topics": [{"name": "Two", "type": "DENY", "action": "BLOCKED"}]}},
            },
            "outputAssessments": {
                "gr-1": [{"topicPolicy": {"topics": [{"name": "One", "type": "DENY", "action": "BLOCKED"}]}}, WORDS],
                "gr-3": [{"topicPolicy": {"topics": [{"name": "Three", "type": "DENY", "action": "BLOCKED"}]}}],
            },
        },
        {
            "topicPolicy": ["One/BLOCKED", "Two/BLOCKED", "Three/BLOCKED"],
            "wordPolicy": ["CUSTOM", "PROFANITY"],
        },
    ),
    "the answer of ApplyGuardrail": (
        {"action": "GUARDRAIL_INTERVENED", "outputs": [{"text": "No."}], "assessments": [SENSITIVE, METRICS]},
        {"sensitiveInformationPolicy": ["EMAIL/ANONYMIZED", "PHONE/BLOCKED", "booking/BLOCKED"]},
    ),
    "nothing triggered": (
        {"inputAssessment": {"gr-1": {"topicPolicy": {"topics": [{"name": "X", "type": "DENY", "action": "NONE"}]}}}},
        {},
    ),
    "empty policies": ({"topicPolicy": {"topics": []}, "contentPolicy": {}, "wordPolicy": None}, {}),
    "no entries": ({"contentPolicy": {"filters": [{}, "odd", None]}}, {}),
    "missing fields": (
        {
            "contentPolicy": {"filters": [{"type": "HATE"}]},
            "topicPolicy": {"topics": [{"type": "DENY", "action": "BLOCKED"}]},
            "sensitiveInformationPolicy": {"regexes": [{"name": "card"}]},
            "contextualGroundingPolicy": {"filters": [{"type": "GROUNDING", "score": 0.2}]},
        },
        {
            "contentPolicy": ["HATE/UNKNOWN"],
            "topicPolicy": ["UNKNOWN/BLOCKED"],
            "sensitiveInformationPolicy": ["card/UNKNOWN"],
            "contextualGroundingPolicy": ["GROUNDING/0.2/UNKNOWN"],
        },
    ),
    "as the original's documentation shows a trace": (
        {
            "inputAssessment": {
                "topicPolicy": {"topics": [{"name": "Money", "type": "DENY", "action": "BLOCKED"}]},
                "wordPolicy": {
                    "managedWordLists": [{"match": "damn", "type": "PROFANITY"}],
                    "customWords": [{"match": "competitor"}, {"match": "other"}],
                },
            },
            "outputAssessments": [
                {
                    "sensitiveInformationPolicy": {
                        "regexes": [{"name": "card", "regex": "[0-9]+", "match": "4111", "action": "BLOCKED"}],
                        "piiEntities": [{"type": "EMAIL", "match": "ada@b.c", "action": "ANONYMIZED"}],
                    },
                    "contextualGroundingPolicy": {
                        "filters": [{"type": "GROUNDING", "score": 0.2, "threshold": 0.7, "action": "BLOCKED"}]
                    },
                }
            ],
        },
        {
            "topicPolicy": ["Money/BLOCKED"],
            "wordPolicy": ["CUSTOM", "PROFANITY"],
            "sensitiveInformationPolicy": ["EMAIL/ANONYMIZED", "card/BLOCKED"],
            "contextualGroundingPolicy": ["GROUNDING/0.2/0.7"],
        },
    ),
    "metrics only": (METRICS, {}),
    "none": (None, {}),
    "text": ("guardrail_intervened", {}),
    "list": (
        [TOPIC, [WORDS]],
        {"topicPolicy": ["Investments/BLOCKED"], "wordPolicy": ["CUSTOM", "PROFANITY"]},
    ),
}


@pytest.mark.parametrize(("trace", "summary"), SUMMARIES.values(), ids=SUMMARIES)
def test_summaries(trace: Any, summary: dict[str, list[str]]) -> None:
    assert summarize_policies(trace) == summary


def test_an_empty_reason_or_trace_is_not_stored() -> None:
    assert guardrail_event("BLOCKED", "", {}, "now") == {"action": "BLOCKED", "timestamp": "now"}


def test_a_summary_holds_no_word_of_the_conversation() -> None:
    summary = repr(summarize_policies([CONTENT, TOPIC, WORDS, SENSITIVE, GROUNDING]))
    for quoted in ("competitor", "damn", "ada@example.org", "+47", "QWERTY"):
        assert quoted not in summary
