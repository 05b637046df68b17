"""Sessions as the original (0.5 to 0.9) has stored them."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

CREATED = datetime(2024, 11, 5, 9, 30, 0, 123000, tzinfo=UTC)


PNG = b"\x89PNG\r\n\x1a\n\0"


SECRET = "my card is 4111 1111 1111 1111"


METRICS = {
    "accumulated_usage": {
        "inputTokens": 12,
        "outputTokens": 7,
        "totalTokens": 19,
        "cacheReadInputTokens": 0,
        "cacheWriteInputTokens": 0,
    },
    "accumulated_metrics": {"latencyMs": 840, "timeToFirstByteMs": 120},
    "cycle_metrics": {"cycle_count": 1, "total_duration": 0.9, "average_cycle_time": 0.9},
    "tool_usage": {},
}


def old_message(message_id: int, role: str, *content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    moment = CREATED + timedelta(seconds=message_id)
    return {
        "message": {"role": role, "content": list(content)},
        "message_id": message_id,
        "redact_message": None,
        "created_at": moment,
        "updated_at": moment,
        **fields,
    }


def old_agent(agent_id: str, *messages: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "agent_data": {
            "agent_id": agent_id,
            "state": state or {},
            "conversation_manager_state": {
                "__name__": "SlidingWindowConversationManager",
                "removed_message_count": 0,
            },
            "_internal_state": {"interrupt_state": {"interrupts": {}, "context": {}, "activated": False}},
            "created_at": CREATED,
            "updated_at": CREATED,
            "model": "anthropic.claude-3-haiku",
            "system_prompt": "Be brief.",
            "prompt_metadata": {"version": 3},
            "temperature": 0.5,
        },
        "created_at": CREATED,
        "updated_at": CREATED,
        "colour": "red",
        "messages": list(messages),
    }


def conversation() -> list[dict[str, Any]]:
    image = {"__bytes_encoded__": True, "data": base64.b64encode(PNG).decode()}
    return [
        old_message(0, "user", {"text": "What is this?"}, {"image": {"format": "png", "source": {"bytes": image}}}),
        old_message(
            1,
            "assistant",
            {"toolUse": {"toolUseId": "t1", "name": "look", "input": {"area.of": "$all"}}},
            event_loop_metrics=METRICS,
            rating={"stars": 5},
        ),
        old_message(
            2,
            "user",
            {"toolResult": {"toolUseId": "t1", "status": "success", "content": [{"text": "a cat"}]}},
        ),
        old_message(3, "assistant", {"text": "A cat."}, event_loop_metrics=METRICS),
        old_message(
            4,
            "user",
            {"text": SECRET},
            redact_message={"role": "user", "content": [{"text": "[redacted]"}]},
            guardrail_event={
                "action": "BLOCKED",
                "timestamp": CREATED,
                "policies_triggered": {"sensitiveInformationPolicy": ["CREDIT_CARD/BLOCKED"]},
            },
        ),
        old_message(5, "assistant", {"text": "I cannot help with that."}),
    ]


def old_session(**agents: dict[str, Any]) -> dict[str, Any]:
    return {
        "_id": "s",
        "session_id": "s",
        "application_name": "chat",
        "session_type": "AGENT",
        "created_at": CREATED,
        "updated_at": CREATED,
        "metadata": {"customer": {"tier": "gold"}},
        "feedbacks": [{"rating": "up", "comment": "", "created_at": CREATED}],
        "guardrail_events": [{"message_id": 4, "agent_id": "agent", "action": "BLOCKED", "timestamp": CREATED}],
        "agents": agents,
        "session_viewer_password": "correct horse",
        "tags": ["a", {"b": None}],
    }
