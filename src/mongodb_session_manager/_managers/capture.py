"""Metrics, model and system prompt of an agent, and guardrail events. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from strands import Agent
from strands.agent.conversation_manager import (
    ConversationManager,
    SlidingWindowConversationManager,
    SummarizingConversationManager,
)
from strands.types.agent import LocalAgent

from .._format.documents import Document


class CapturedConfig(NamedTuple):
    """The model's id, `None` if it is unknown, and the system prompt as text."""

    model: str | None
    system_prompt: str | None


def capture_config(agent: LocalAgent) -> CapturedConfig:
    config = agent.model.get_config() if hasattr(agent.model, "get_config") else None
    model_id = config.get("model_id") if isinstance(config, Mapping) else None
    return CapturedConfig(None if model_id is None else str(model_id), agent.system_prompt)


_KNOWN_RESTORES = [
    kind.restore_from_session
    for kind in (ConversationManager, SlidingWindowConversationManager, SummarizingConversationManager)
]


def capture_base(agent: Agent) -> tuple[list[Any], int] | None:
    """Return the parameters of a restore without a view.

    Returns:
        The messages that the agent's conversation manager prepends, and the number of oldest stored messages that it
        leaves out; `None` for a conversation manager that overrides how Strands restores.
    """
    manager = agent.conversation_manager
    if type(manager).restore_from_session not in _KNOWN_RESTORES:
        return None
    summary = isinstance(manager, SummarizingConversationManager) and manager.get_state()["summary_message"]
    return [summary] if summary else [], manager.removed_message_count


def capture_metrics(agent: LocalAgent) -> Document | None:
    """Return the event-loop metrics of an agent since it was constructed; `None` if this type of agent has none.

    Durations of cycles and tools are seconds, latencies milliseconds.
    """
    try:
        metrics = agent.event_loop_metrics
    except NotImplementedError:  # a bidirectional agent
        return None
    usage: Mapping[str, Any] = metrics.accumulated_usage
    latency: Mapping[str, Any] = metrics.accumulated_metrics
    durations = metrics.cycle_durations
    names = ("inputTokens", "outputTokens", "totalTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
    return {
        "accumulated_usage": {name: usage.get(name, 0) for name in names},
        "accumulated_metrics": {name: latency.get(name, 0) for name in ("latencyMs", "timeToFirstByteMs")},
        "cycle_metrics": {
            "cycle_count": metrics.cycle_count,
            "total_duration": sum(durations),
            "average_cycle_time": sum(durations) / len(durations) if durations else 0.0,
        },
        "tool_usage": {
            name: {
                "call_count": tool.call_count,
                "success_count": tool.success_count,
                "error_count": tool.error_count,
                "total_time": tool.total_time,
                "average_time": tool.total_time / tool.call_count if tool.call_count else 0.0,
                "success_rate": tool.success_count / tool.call_count if tool.call_count else 0.0,
            }
            for name, tool in metrics.tool_metrics.items()
        },
    }


GUARDRAIL_ACTION_BLOCKED = "BLOCKED"
"""The default action of a guardrail event."""

GUARDRAIL_STOP_REASONS = frozenset({"guardrail_intervened", "content_filtered"})
"""Reasons for which a model stops because a guardrail stepped in."""

# The lists of each policy, and the fields that describe an entry. The matched text must not be one of them.
_POLICIES: dict[str, dict[str, tuple[str, ...]]] = {
    "contentPolicy": {"filters": ("type", "confidence")},
    "topicPolicy": {"topics": ("name", "action")},
    "wordPolicy": {"customWords": (), "managedWordLists": ("type",)},
    "sensitiveInformationPolicy": {"piiEntities": ("type", "action"), "regexes": ("name", "action")},
    "contextualGroundingPolicy": {"filters": ("type", "score", "threshold")},
}
_CUSTOM_WORD = "CUSTOM"
_SAFE_FIELDS = frozenset({"action", "confidence", "detected", "filterStrength", "name", "score", "threshold", "type"})
"""Fields of a guardrail trace that describe a finding; any other field can quote the conversation."""

_FIELD = re.compile(r"[A-Za-z0-9_-]{1,40}")


def summarize_policies(trace: Any) -> dict[str, list[str]]:
    """Return the policies that a guardrail trace of Amazon Bedrock reports as triggered, with the findings.

    Args:
        trace: The trace, or a part of it that has assessments. Shapes:
            https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_GuardrailAssessment.html

    Returns:
        By policy name: `"HATE/HIGH"` (type, confidence) for `contentPolicy`, `"Investments/BLOCKED"` (name, action)
        for `topicPolicy`, `"CUSTOM"` or `"PROFANITY"` (the list) for `wordPolicy`, `"EMAIL/ANONYMIZED"` (type or name
        of the expression, action) for `sensitiveInformationPolicy`, `"GROUNDING/0.2/0.7"` (type, score, threshold) for
        `contextualGroundingPolicy`. Each entry is listed once, with `"UNKNOWN"` for a missing field. Matched words
        and entries that did not trigger (action `"NONE"`) are left out.
    """
    found: dict[str, list[str]] = {}
    _collect_policies(trace, found)
    return {policy: found[policy] for policy in _POLICIES if policy in found}


def _collect_policies(part: Any, found: dict[str, list[str]]) -> None:
    if isinstance(part, list):
        for item in part:
            _collect_policies(item, found)
    elif isinstance(part, Mapping):
        for name, value in part.items():
            if name not in _POLICIES:
                _collect_policies(value, found)
            elif isinstance(value, Mapping):
                for kind, fields in _POLICIES[name].items():
                    entries = value.get(kind)
                    for entry in entries if isinstance(entries, list) else ():
                        if isinstance(entry, Mapping) and entry and entry.get("action") != "NONE":
                            summary = "/".join(str(entry.get(field, "UNKNOWN")) for field in fields) or _CUSTOM_WORD
                            if summary not in found.setdefault(name, []):
                                found[name].append(summary)


def without_quotes(trace: Any) -> Any:
    """Return a guardrail trace without quotes from the conversation, which must not survive a redaction.

    Text is kept only in the fields that describe a finding.
    """
    if isinstance(trace, Mapping):
        return {
            key: value if key in _SAFE_FIELDS and isinstance(value, str) else without_quotes(value)
            for key, value in trace.items()
            if isinstance(key, str) and _FIELD.fullmatch(key)
        }
    if isinstance(trace, list | tuple):
        return [without_quotes(item) for item in trace]
    return trace if trace is None or isinstance(trace, bool | int | float) else "[redacted]"


def guardrail_event(action: str, stop_reason: str | None, trace: Any, moment: Any) -> Document:
    event: Document = {"action": action, "timestamp": moment}
    if stop_reason:
        event["stop_reason"] = stop_reason
    if trace:
        if policies := summarize_policies(trace):
            event["policies_triggered"] = policies
        event["trace"] = without_quotes(trace)
    return event


def count_tool_calls(message: Mapping[str, Any]) -> int:
    return sum("toolUse" in block for block in message["content"])
