"""Feedback to Amazon SNS."""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .._io.requested_fields import StoredFields
from .._notifications.notification import OnError
from ._base import AwsHook, checked_text, with_parameters_of
from ._messages import (
    SNS_LIMIT,
    Template,
    attributes,
    feedback_body,
    fifo_parameters,
    rating_of,
    size_of,
    subject,
    timestamp,
)

if TYPE_CHECKING:
    from ._aws import AwsClient, Config, Session

_PLACEHOLDERS = ("session_id", "rating", "timestamp")
_OFF = "none"


class _Route(NamedTuple):
    """The topic of a rating and the templates of its messages."""

    topic: str
    client: AwsClient | None
    subject_prefix: Template
    body_prefix: Template


class FeedbackSNSHook(AwsHook):
    """A feedback hook that publishes each new feedback to the topic of its rating, in the background.

    The subject is `{prefix}on session {id}`, truncated to 100 ASCII characters. The body is `{prefix}Session: {id}`, a
    blank line and the comment, truncated to 256 KiB. The attributes are `session_id` and `rating` (`positive`,
    `negative` or `neutral`). In a FIFO topic, the session is the message group.

    Args:
        topic_arn_good: The topic for the rating `"up"`; `"none"` publishes nothing.
        topic_arn_bad: The topic for the rating `"down"`.
        topic_arn_neutral: The topic for any other rating, and for feedback without a rating.
        subject_prefix_good: A template with the placeholders `{session_id}`, `{rating}` and `{timestamp}`.
        subject_prefix_bad: The same for the rating `"down"`.
        subject_prefix_neutral: The same for any other rating.
        body_prefix_good: The same for the body and the rating `"up"`.
        body_prefix_bad: The same for the body and the rating `"down"`.
        body_prefix_neutral: The same for the body and any other rating.
        region_name: The region; `None` uses the one in the ARN.
        endpoint_url: The URL of the service; `None` uses the one of AWS.
        aws_session: The `aioboto3.Session` with the credentials; `None` uses the default credential chain.
        config: A botocore `Config`.
        on_error: Called with a `NotificationEvent` and the exception for each notification that is dropped, on the
            library's event loop. It must return at once.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    actions = frozenset({"add"})

    def __init__(
        self,
        topic_arn_good: str,
        topic_arn_bad: str,
        topic_arn_neutral: str,
        subject_prefix_good: str | None = None,
        subject_prefix_bad: str | None = None,
        subject_prefix_neutral: str | None = None,
        body_prefix_good: str | None = None,
        body_prefix_bad: str | None = None,
        body_prefix_neutral: str | None = None,
        *,
        region_name: str | None = None,
        endpoint_url: str | None = None,
        aws_session: Session | None = None,
        config: Config | None = None,
        on_error: OnError | None = None,
    ) -> None:
        super().__init__(endpoint_url=endpoint_url, aws_session=aws_session, config=config, on_error=on_error)

        def route(kind: str, topic: str, subject_prefix: str | None, body_prefix: str | None) -> _Route:
            checked_text(topic, f"topic_arn_{kind}")
            return _Route(
                topic,
                None if topic == _OFF else self._client("sns", region_name or _region(topic)),
                Template(subject_prefix, f"subject_prefix_{kind}", _PLACEHOLDERS),
                Template(body_prefix, f"body_prefix_{kind}", _PLACEHOLDERS),
            )

        self._routes = {
            "positive": route("good", topic_arn_good, subject_prefix_good, body_prefix_good),
            "negative": route("bad", topic_arn_bad, subject_prefix_bad, body_prefix_bad),
            "neutral": route("neutral", topic_arn_neutral, subject_prefix_neutral, body_prefix_neutral),
        }

    def _notify(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        feedback = argument["feedback"]
        rating = rating_of(feedback)
        topic, client, subject_prefix, body_prefix = self._routes[rating]
        if client is None:
            return
        values = {"session_id": session_id, "rating": rating, "timestamp": timestamp()}
        described = attributes(session_id=session_id, rating=rating)
        title = subject(f"{subject_prefix.render(**values)}on session {session_id}")
        room = SNS_LIMIT - size_of(described) - len(title)
        comment = str(feedback.get("comment", ""))
        body = feedback_body(body_prefix.render(**values), session_id, comment, room)
        publish = partial(
            client.call,
            "publish",
            TopicArn=topic,
            Subject=title,
            Message=body,
            MessageAttributes=described,
            **fifo_parameters(topic, session_id, uuid.uuid4().hex),
        )
        self._submit("sns.feedback", session_id, publish, body)


def _region(topic_arn: str) -> str | None:
    parts = topic_arn.split(":")
    return parts[3] or None if len(parts) > 5 else None


@with_parameters_of(FeedbackSNSHook)
def create_feedback_sns_hook(*args: Any, **kwargs: Any) -> FeedbackSNSHook:
    """Return a feedback hook that publishes to SNS; for the arguments see `FeedbackSNSHook`."""
    return FeedbackSNSHook(*args, **kwargs)
