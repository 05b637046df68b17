"""How the original reads a session, and how 1.0.0 stored one."""

from __future__ import annotations

from typing import Any

from pymongo.collection import Collection
from strands.types.session import SessionAgent, SessionMessage

Stored = Collection[dict[str, Any]]


AGENT_FIELDS = ("model", "system_prompt", "prompt_metadata")


MESSAGE_FIELDS = ("event_loop_metrics", "guardrail_event", "latency_ms", "input_tokens", "output_tokens")
"""What the original removes before it calls the constructors, which take no unknown field."""


def restored_by_the_original(stored: Stored, agent_id: str = "agent") -> tuple[SessionAgent, list[SessionMessage]]:
    document = stored.find_one({"_id": "s"})
    assert document is not None
    found = document["agents"][agent_id]
    data = {name: value for name, value in found["agent_data"].items() if name not in AGENT_FIELDS}
    messages = [
        SessionMessage(**{name: value for name, value in message.items() if name not in MESSAGE_FIELDS})
        for message in found["messages"]
    ]
    return SessionAgent(**data), messages


def picture(size: int = 5000) -> list[dict[str, Any]]:
    return [{"text": "look"}, {"image": {"format": "png", "source": {"bytes": b"x" * size}}}]


def as_1_0_0(stored: Stored, session_id: str = "s") -> None:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    found = document["agents"]["agent"]
    if "config_set" in found:
        found["agent_data"]["config_set"] = found.pop("config_set")
    for message in found["messages"]:
        metrics = message.get("event_loop_metrics", {})
        if usage := metrics.pop("message_usage", None):
            message["usage"] = usage
        if not metrics:
            message.pop("event_loop_metrics", None)
    stored.replace_one({"_id": session_id}, document)
