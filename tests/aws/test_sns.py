"""Feedback to SNS, read where it arrived: in a queue that subscribes to the topic."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from arrivals import Topic, Topics
from mongodb_session_manager import ConfigurationError, EncodingError, FeedbackSNSHook, create_feedback_sns_hook
from support import eventually


@pytest.fixture
def good(topics: Topics) -> Topic:
    return topics.empty("good")


@pytest.fixture
def bad(topics: Topics) -> Topic:
    return topics.empty("bad")


@pytest.fixture
def neutral(topics: Topics) -> Topic:
    return topics.empty("neutral")


def test_each_rating_has_its_topic(factory: Any, moto: str, good: Topic, bad: Topic, neutral: Topic) -> None:
    hook = create_feedback_sns_hook(good.arn, bad.arn, neutral.arn, endpoint_url=moto)
    with factory.create_session_manager("s-1", feedback_hook=hook) as manager:
        assert manager.add_feedback({"rating": "up", "comment": "Great"}) is None
        manager.add_feedback({"rating": "down", "comment": "Wrong"})
        manager.add_feedback({"rating": None})
        manager.add_feedback({"comment": "So so"})
        assert [feedback.get("comment") for feedback in manager.get_feedbacks()] == ["Great", "Wrong", None, "So so"]
    shown = [
        [(told["Subject"], told["Message"], told["MessageAttributes"]["rating"]["Value"]) for told in topic.arrived()]
        for topic in (good, bad, neutral)
    ]
    assert shown == [
        [("on session s-1", "Session: s-1\n\nGreat", "positive")],
        [("on session s-1", "Session: s-1\n\nWrong", "negative")],
        [("on session s-1", "Session: s-1\n\n", "neutral"), ("on session s-1", "Session: s-1\n\nSo so", "neutral")],
    ]


@pytest.mark.anyio
async def test_nothing_but_the_documented_leaves(factory: Any, moto: str, good: Topic) -> None:
    hook = create_feedback_sns_hook(
        good.arn,
        "none",
        "none",
        subject_prefix_good="[{rating}]\n",
        body_prefix_good="{session_id}, {rating}\n",
        endpoint_url=moto,
    )
    async with await factory.create_session_manager_async("s", feedback_hook=hook) as manager:
        await manager.add_feedback({"rating": "up", "comment": "Fine", "email": "ada@example.org", "password": "x"})
    [told] = good.arrived()
    assert (told["Subject"], told["Message"]) == ("[positive] on session s", "s, positive\nSession: s\n\nFine")
    assert told["MessageAttributes"] == {
        "session_id": {"Type": "String", "Value": "s"},
        "rating": {"Type": "String", "Value": "positive"},
    }


@pytest.mark.own_factory
def test_a_topic_can_be_switched_off(factory: Any, moto: str, bad: Topic) -> None:
    hook = create_feedback_sns_hook("none", bad.arn, "none", endpoint_url=moto)
    with factory.create_session_manager("s", feedback_hook=hook) as manager:
        for rating in ("up", "down", "sideways"):
            manager.add_feedback({"rating": rating})
    assert len(bad.arrived()) == 1
    assert factory.get_notification_stats()["submitted"] == 1


@pytest.mark.own_factory
def test_what_is_too_long_is_cut_and_arrives(factory: Any, moto: str, good: Topic) -> None:
    hook = create_feedback_sns_hook(good.arn, "none", "none", "⚠️ " * 80 + "x" * 200, endpoint_url=moto)
    with factory.create_session_manager("é" * 60, feedback_hook=hook) as manager:
        manager.add_feedback({"rating": "up", "comment": "ü" * 300_000})
        assert len(manager.get_feedbacks()[0]["comment"]) == 300_000
    [told] = good.arrived()
    assert told["Subject"] == "x" * 97 + "..."
    assert told["Message"].endswith("ü [truncated]")
    assert 260_000 < len(told["Message"].encode()) <= 256 * 1024
    assert factory.get_notification_stats()["failed"] == 0


def test_a_fifo_topic_keeps_the_order_of_a_session(factory: Any, moto: str, topics: Topics) -> None:
    topic = topics.new(".fifo")
    hook = create_feedback_sns_hook(topic.arn, "none", "none", endpoint_url=moto)
    with factory.create_session_manager("s 1", feedback_hook=hook) as manager:
        for number in range(5):
            manager.add_feedback({"rating": "up", "comment": str(number)})
    told = topic.queue.arrived()
    assert [message.json["Message"][-1] for message in told] == list("01234")
    assert {len(message.system["MessageGroupId"]) for message in told} == {64}
    assert len({message.system["MessageDeduplicationId"] for message in told}) == 5


def test_the_region_is_that_of_the_topic(factory: Any, moto: str) -> None:
    hook = FeedbackSNSHook("arn:aws:sns:us-west-2:1:a", "arn:aws:sns:eu-south-1:1:b", "none", endpoint_url=moto)
    regions = {rating: route.client and route.client.key.region_name for rating, route in hook._routes.items()}
    assert regions == {"positive": "us-west-2", "negative": "eu-south-1", "neutral": None}


def test_a_template_that_cannot_be_filled_in_warns_when_the_hook_is_made(caplog: pytest.LogCaptureFixture) -> None:
    create_feedback_sns_hook("none", "none", "none", subject_prefix_bad="{who} ")
    assert [(record.levelno, "subject_prefix_bad" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


@pytest.mark.parametrize("topics_given", [("", "none", "none"), (None, "none", "none"), ("none", 5, "none")])
def test_topics_are_checked(topics_given: Any) -> None:
    with pytest.raises(ConfigurationError, match="topic_arn"):
        create_feedback_sns_hook(*topics_given)


@pytest.mark.own_factory
def test_a_hook_whose_operation_fails_tells_nobody(factory: Any, moto: str, good: Topic) -> None:
    hook = create_feedback_sns_hook(good.arn, "none", "none", endpoint_url=moto)
    with factory.create_session_manager("s", feedback_hook=hook) as manager, pytest.raises(EncodingError):
        manager.add_feedback({"rating": "up", "comment": object()})
    assert factory.get_notification_stats()["submitted"] == 0


def test_a_topic_that_does_not_exist_is_not_tried_again(
    factory: Any, moto: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    hook = create_feedback_sns_hook(
        "arn:aws:sns:eu-west-1:123456789012:nowhere",
        "none",
        "none",
        endpoint_url=moto,
        on_error=lambda event, error: told.append((event.name, event.tries, type(error).__name__)),
    )
    with factory.create_session_manager("s", feedback_hook=hook) as manager:
        manager.add_feedback({"rating": "up", "comment": "my secret"})
    eventually(lambda: told)
    assert told == [("sns.feedback", 1, "NotFoundException")]
    assert "NotFound" in caplog.text
    assert "my secret" not in caplog.text
