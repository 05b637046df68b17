"""The bodies of the requests and responses of `sessions_router`, as OpenAPI documents them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt

NewId = Annotated[str, Field(max_length=1000)]
"""The id of a new session, which must fit into a path."""


class SessionEntry(BaseModel):
    """A session, without its messages."""

    session_id: str
    application_name: str | None
    owner: str | None
    title: str | None
    tags: list[str]
    created_at: datetime
    updated_at: datetime = Field(description="The time of the last write.")
    agents: list[str] = Field(description="The ids of the agents.")
    message_counts: dict[str, int] = Field(description="The number of all messages, by agent id.")
    usage: dict[str, float] = Field(description="The totals of all agents.")
    metadata: dict[str, Any]


class SessionList(BaseModel):
    """A page of a list of sessions."""

    sessions: list[SessionEntry]
    next_cursor: str | None = Field(description="The `cursor` of the next page; null on the last page.")


class MessageEntry(BaseModel):
    """A message of a conversation."""

    message_id: int
    role: str
    content: list[Any] = Field(description="Content blocks of Strands. The `bytes` of an attachment are base64 text.")
    redacted: bool = Field(description="Whether a guardrail has replaced the content.")
    created_at: datetime
    updated_at: datetime


class MessageList(BaseModel):
    """A page of the messages of an agent, newest first."""

    agent_id: str | None = Field(description="The agent; null for a session without agents.")
    messages: list[MessageEntry]
    next_before: int | None = Field(description="The `before` of the next page; null on the last page.")


class Metadata(BaseModel):
    """Metadata by key. In an update, `a.b` sets `b` within `a`, and other keys stay."""

    model_config = ConfigDict(extra="forbid")

    metadata: dict[str, Any]


class FeedbackList(BaseModel):
    """All feedback of a session, oldest first."""

    feedbacks: list[dict[str, Any]]


class Feedback(BaseModel):
    """Feedback, stamped with the current time as `created_at`. Any further fields are allowed."""

    model_config = ConfigDict(extra="allow")

    rating: str | bool | int | float | None = Field(None, description="Usually `up` or `down`.")
    comment: str | None = None


class Usage(BaseModel):
    """Running totals: tokens, latency in milliseconds, invocations and tool calls."""

    agents: dict[str, dict[str, float]]
    total: dict[str, float]


class SessionChanges(BaseModel):
    """New labels of a session. Omitted fields stay; null removes a label."""

    model_config = ConfigDict(extra="forbid")

    title: str | None = None
    tags: list[str] | None = None


class Rewind(BaseModel):
    """The messages that a session keeps."""

    model_config = ConfigDict(extra="forbid")

    at_message: StrictInt | dict[str, StrictInt] = Field(
        description="The id of the last message that stays, -1 for none; for several agents, ids by agent id."
    )
    keep_as: NewId | None = Field(None, description="The id of a new session with all messages as they were.")


class Fork(BaseModel):
    """A copy of a session, or of its beginning."""

    model_config = ConfigDict(extra="forbid")

    new_id: NewId
    at_message: StrictInt | dict[str, StrictInt] | None = Field(
        None, description="The id of the last message that is copied; for several agents, ids by agent id."
    )


class Forked(BaseModel):
    """The new session."""

    session_id: str
