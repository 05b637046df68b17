"""What arrives, byte for byte: the bodies of versions 0.5 to 0.9, except for the line with a password in SNS."""

from __future__ import annotations

import re
from typing import Any

from arrivals import Queue, Topic
from endpoint import Endpoint
from mongodb_session_manager import (
    create_feedback_sns_hook,
    create_metadata_sqs_hook,
    create_metadata_websocket_hook,
)

MOMENT = re.compile(r'"timestamp": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?\+00:00"')

FEEDBACK: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    "up": ({"rating": "up", "comment": "Great"}, {}, "on session s-1", "Session: s-1\n\nGreat", "positive"),
    "down": (
        {"rating": "down", "comment": "Two\n\nlines, é", "user": "ada"},
        {},
        "on session s-1",
        "Session: s-1\n\nTwo\n\nlines, é",
        "negative",
    ),
    "no comment": ({"rating": None}, {}, "on session s-1", "Session: s-1\n\n", "neutral"),
    "an empty comment": ({"rating": "up", "comment": ""}, {}, "on session s-1", "Session: s-1\n\n", "positive"),
    "null": ({"comment": None}, {}, "on session s-1", "Session: s-1\n\nNone", "neutral"),
    "a number": ({"comment": 5}, {}, "on session s-1", "Session: s-1\n\n5", "neutral"),
    "an object": ({"comment": {"a": 1}}, {}, "on session s-1", "Session: s-1\n\n{'a': 1}", "neutral"),
    "an unknown rating": ({"rating": "UP", "comment": "x"}, {}, "on session s-1", "Session: s-1\n\nx", "neutral"),
    "prefixes": (
        {"rating": "down", "comment": "x"},
        {
            "subject_prefix_bad": "[PROD]  {rating} {{x}} ",
            "body_prefix_bad": "{session_id:>5}|{rating:.3}\n---\n",
            "subject_prefix_good": "not this one",
        },
        "[PROD]  negative {x} on session s-1",
        "  s-1|neg\n---\nSession: s-1\n\nx",
        "negative",
    ),
    "prefixes that cannot be filled in": (
        {"rating": "down", "comment": "x"},
        {"subject_prefix_bad": "{who} ", "body_prefix_bad": "100% {"},
        "{who} on session s-1",
        "100% {Session: s-1\n\nx",
        "negative",
    ),
}


def test_feedback(factory: Any, moto: str, topic: Topic) -> None:
    hooks = [  # all at once, so that they share a client
        create_feedback_sns_hook(topic.arn, topic.arn, topic.arn, **prefixes, endpoint_url=moto)
        for _, prefixes, *_ in FEEDBACK.values()
    ]
    for hook, (feedback, *_) in zip(hooks, FEEDBACK.values(), strict=True):
        with factory.create_session_manager("s-1", feedback_hook=hook) as manager:
            manager.add_feedback(feedback)
    for message, (name, (_, _, subject, body, rating)) in zip(topic.arrived(), FEEDBACK.items(), strict=True):
        assert (message["Subject"], message["Message"]) == (subject, body), name
        assert message["MessageAttributes"] == {
            "session_id": {"Type": "String", "Value": "s-1"},
            "rating": {"Type": "String", "Value": rating},
        }, name


ODD = {"d": {1: 2, None: 4, 1.5: "é", False: 0}, "l": [1, (2, 3)], "f": 1.0, "n": None, "b": True, "big": 2**70}

# The fields that may leave, what is done, and what is sent as `operation` and `metadata`.
CHANGES: dict[str, tuple[list[str] | None, str, Any, str]] = {
    "an update": (None, "update", {"status": "busy", "a.b": 1}, '{"status": "busy", "a.b": 1}'),
    "fields in their order": (
        ["n", "status"],
        "update",
        {"status": "busy", "n": 1, "x": 2},
        '{"n": 1, "status": "busy"}',
    ),
    "a deletion": (None, "delete", ["a", "unknown"], '{"a": null, "unknown": null}'),
    "values": (
        None,
        "update",
        ODD,
        '{"d": {"1": 2, "null": 4, "1.5": "\\u00e9", "false": 0}, "l": [1, [2, 3]], "f": 1.0, "n": null, "b": true, '
        '"big": 1180591620717411303424}',
    ),
    "text": (None, "update", {"t": '€ "\ud83d" \x00 </s>'}, '{"t": "\\u20ac \\"\\ud83d\\" \\u0000 </s>"}'),
}


def test_metadata(factory: Any, stored: Any, moto: str, queue: Queue, endpoint: Endpoint) -> None:
    endpoint.answers(200)
    hooks = [  # all at once, so that they share two clients
        (
            create_metadata_sqs_hook(queue.url, each[0], endpoint_url=moto),
            create_metadata_websocket_hook(endpoint.url, each[0]),
        )
        for each in CHANGES.values()
    ]
    for pair, (_, action, changed, _) in zip(hooks, CHANGES.values(), strict=True):
        stored.delete_one({"_id": "s-1"})
        factory.create_session_manager("s-1").update_metadata({"connection_id": "c-1"})
        for hook in pair:
            with factory.create_session_manager("s-1", metadata_hook=hook) as manager:
                getattr(manager, f"{action}_metadata")(changed)
    arrived = zip(queue.arrived(), endpoint.requests, CHANGES.items(), strict=True)
    for message, (_, posted), (name, (_, action, _, metadata)) in arrived:
        rest = f'"operation": "{action}", "metadata": {metadata}, NOW}}'
        assert MOMENT.sub("NOW", message.body) == f'{{"session_id": "s-1", "event": "metadata_update", {rest}', name
        assert MOMENT.sub("NOW", posted.decode()) == f'{{"event": "metadata_update", "session_id": "s-1", {rest}', name
        assert message.attributes == {"session_id": "s-1", "event": "metadata_update"}, name


def test_the_password_of_a_stored_session_never_leaves(
    factory: Any, stored: Any, moto: str, topic: Topic, queue: Queue
) -> None:
    sns = create_feedback_sns_hook(topic.arn, topic.arn, topic.arn, body_prefix_neutral="{x}", endpoint_url=moto)
    factory.create_session_manager("s-1").close()
    stored.update_one({"_id": "s-1"}, {"$set": {"session_viewer_password": "s3cret"}})
    sqs = create_metadata_sqs_hook(queue.url, endpoint_url=moto)
    with factory.create_session_manager("s-1", feedback_hook=sns, metadata_hook=sqs) as manager:
        manager.add_feedback({"comment": "x"})
        manager.update_metadata({"a": 1})
    sent = str(topic.arrived()) + str(queue.arrived())
    assert "s-1" in sent
    assert "s3cret" not in sent
    assert stored.find_one({"_id": "s-1"})["session_viewer_password"] == "s3cret"
