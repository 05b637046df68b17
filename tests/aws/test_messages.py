"""What notifications say, without AWS: templates, subjects, bodies that fit, JSON of everything a document holds."""

from __future__ import annotations

import json
import logging
import uuid
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from bson import Decimal128, ObjectId

from mongodb_session_manager.hooks._messages import (
    Template,
    dumped,
    feedback_body,
    fifo_parameters,
    metadata_body,
    rating_of,
    selected,
    subject,
)

NAMES = ("session_id", "rating", "timestamp")


def test_a_template_is_filled_in(caplog: pytest.LogCaptureFixture) -> None:
    template = Template("[{rating}] {{{session_id}}} ", "subject_prefix_bad", NAMES)
    assert template.render(session_id="s", rating="negative", timestamp="t") == "[negative] {s} "
    assert not caplog.records


@pytest.mark.parametrize("text", ["{user} ", "100% {", "} ", "{} ", "{0} ", "{session_id!r}", "{rating.__class__}"])
def test_a_template_that_cannot_be_filled_in_is_used_as_it_is(text: str, caplog: pytest.LogCaptureFixture) -> None:
    template = Template(text, "body_prefix_good", NAMES)
    assert template.render(session_id="s", rating="positive", timestamp="t") == text
    template.render(session_id="s", rating="positive", timestamp="t")
    assert [(record.levelno, "body_prefix_good" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("on session s", "on session s"),
        ("Alert:\r\n\tbad\x00 on session s", "Alert: bad on session s"),
        ("Alert:  bad \n on session s", "Alert:  bad on session s"),
        ("⚠️ Café on session ñ-東", "Cafe on session n-?"),
        ("a" * 200, "a" * 97 + "..."),
        ("a" * 100, "a" * 100),
    ],
)
def test_subjects(text: str, expected: str) -> None:
    assert subject(text) == expected


@pytest.mark.parametrize(
    ("rating", "expected"),
    [("up", "positive"), ("down", "negative"), ("UP", "neutral"), (None, "neutral"), (5, "neutral"), ([], "neutral")],
)
def test_ratings(rating: Any, expected: str) -> None:
    assert rating_of({"rating": rating}) == expected


def test_a_body_without_a_comment() -> None:
    assert feedback_body("Look: ", "s", None, 1000) == "Look: Session: s\n\n"


def test_a_comment_is_cut_between_characters_to_what_fits() -> None:
    body = feedback_body("", "s", "é" * 1000, 101)
    assert body == "Session: s\n\n" + "é" * 38 + " [truncated]"
    assert len(body.encode()) <= 101


def test_what_xml_cannot_say_is_replaced() -> None:
    assert feedback_body("", "s", "a\x00b\ud83dc", 1000) == "Session: s\n\na\ufffdb\ufffdc"


def test_everything_a_document_holds_has_a_json_form() -> None:
    identity = uuid.UUID(int=7)
    value = {
        "naive": datetime(2026, 1, 2, 3, 4, 5),
        "aware": datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2))),
        "id": ObjectId("65a1b2c3d4e5f60718293a4b"),
        "decimal": Decimal128("1.10"),
        "plain decimal": Decimal("2.50"),
        "bytes": b"\x00\xff",
        "uuid": identity,
        "nested": [{"list": (1, 2.5, None, True)}],
        "no numbers": [float("nan"), float("inf"), float("-inf")],
        "surrogate": "\ud83d",
    }
    assert json.loads(dumped(value)) == {
        "naive": "2026-01-02T03:04:05+00:00",
        "aware": "2026-01-02T01:04:05+00:00",
        "id": "65a1b2c3d4e5f60718293a4b",
        "decimal": "1.10",
        "plain decimal": "2.50",
        "bytes": "AP8=",
        "uuid": "00000000-0000-0000-0000-000000000007",
        "nested": [{"list": [1, 2.5, None, True]}],
        "no numbers": ["NaN", "Infinity", "-Infinity"],
        "surrogate": "\ud83d",
    }


def test_a_metadata_body_holds_the_documented_fields() -> None:
    message = json.loads(metadata_body("s", "update", {"a": 1}, 1000))
    assert datetime.fromisoformat(message.pop("timestamp")).tzinfo == UTC
    assert message == {"session_id": "s", "event": "metadata_update", "operation": "update", "metadata": {"a": 1}}


@pytest.mark.parametrize("limit", [300, 500, 2000, 10_000])
def test_metadata_that_does_not_fit_is_cut_to_its_keys(limit: int) -> None:
    metadata = {f"key {number} é": "x" * 5000 for number in range(100)}
    body = metadata_body("s", "update", metadata, limit)
    message = json.loads(body)
    assert len(body) <= limit
    assert message["truncated"] is True
    assert message["metadata"] == list(metadata)[: len(message["metadata"])]
    assert message["metadata"]
    assert len(message["metadata"]) == 100 or len(body) > limit - 30


@pytest.mark.parametrize(
    ("changed", "fields", "expected"),
    [
        ({"a": 1, "b": 2}, None, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, ["b", "c"], {"b": 2}),
        ({"a.x": 1, "ab": 2}, ["a"], {"a.x": 1}),
        ({"a": {"x": 1, "secret": 2}}, ["a.x"], {"a.x": 1}),
        ({"a": {"secret": 2}}, ["a.x"], {}),
        ({"a": None}, ["a.x"], {"a.x": None}),
        ({"a": 5}, ["a.x"], {}),
        ({"a": 1}, [], {}),
        ({"hidden": 1, "hidden.x": 2, "hiddenx": 3}, None, {"hiddenx": 3}),
        ({"hidden": 1}, ["hidden"], {}),
        ({"a": {"x": 1}}, ["a.x", "a"], {"a": {"x": 1}}),
    ],
)
def test_what_may_leave(changed: dict[str, Any], fields: list[str] | None, expected: dict[str, Any]) -> None:
    assert selected(changed, fields, hidden=["hidden"]) == expected


def test_groups_of_fifo_destinations() -> None:
    assert fifo_parameters("https://x/queue", "s", "i") == {}
    assert fifo_parameters("arn:x.fifo", "user-1/é", "i")["MessageGroupId"].isalnum()
    assert fifo_parameters("arn:x.fifo", "user-1/x", "i") == {
        "MessageGroupId": "user-1/x",
        "MessageDeduplicationId": "i",
    }
    assert len(fifo_parameters("arn:x.fifo", "s" * 129, "i")["MessageGroupId"]) == 64
