"""What is copied out of an agent beside its conversation: its metrics, its model and its system prompt. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from strands.types.agent import LocalAgent

from ._documents import Document


class AgentConfig(NamedTuple):
    """What an agent runs with.

    Attributes:
        model: The model's id, `None` if the model does not tell.
        system_prompt: The system prompt as text.
    """

    model: str | None
    system_prompt: str | None


def capture_config(agent: LocalAgent) -> AgentConfig:
    """Return the model id and the system prompt of an agent."""
    config = agent.model.get_config() if hasattr(agent.model, "get_config") else None
    model_id = config.get("model_id") if isinstance(config, Mapping) else None
    return AgentConfig(None if model_id is None else str(model_id), agent.system_prompt)


def capture_metrics(agent: LocalAgent) -> Document | None:
    """Return the event-loop metrics an agent has gathered since it was built; `None` if its kind gathers none.

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
