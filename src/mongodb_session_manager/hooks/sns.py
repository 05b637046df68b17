"""Feedback to Amazon SNS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._io.asked_fields import StoredFields
from .._notifications.notification import OnError
from ._base import AwsHook, calling, checked_text, identity, with_parameters_of
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
    from ._aws import Config, Session

_PLACEHOLDERS = ("session_id", "rating", "timestamp")
_OFF = "none"


class FeedbackSNSHook(AwsHook):
    """A feedback hook that publishes each new feedback to the topic of its rating, in the background.

    Subject `{prefix}on session {id}`, body `{prefix}Session: {id}`, a blank line and the comment, attributes
    `session_id` and `rating` (`positive`, `negative`, `neutral`). Subjects are cut to 100 characters of ASCII, bodies
    to 256 KiB. To a FIFO topic, the session is the message group.

    Args:
        topic_arn_good: For the rating `"up"`; `"none"` publishes nothing.
        topic_arn_bad: For `"down"`.
        topic_arn_neutral: For every other rating, and none.
        subject_prefix_good: May use `{session_id}`, `{rating}` and `{timestamp}`, like each prefix.
        subject_prefix_bad: The same for bad feedback.
        subject_prefix_neutral: The same for neutral feedback.
        body_prefix_good: The same for the body.
        body_prefix_bad: The same for the body of bad feedback.
        body_prefix_neutral: The same for the body of neutral feedback.
        region_name: `None` takes the one named in the ARN.
        endpoint_url: Where SNS is, if not where AWS has it.
        aws_session: An `aioboto3.Session` to take credentials from; `None` takes the usual chain.
        config: A botocore `Config`.
        on_error: Called with a `NotificationEvent` and the exception for each notification that is given up, on the
            library's event loop; it must return at once.

    Raises:
        ConfigurationError: An argument cannot be used.
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

        def route(kind: str, topic: str, subject_prefix: str | None, body_prefix: str | None) -> Any:
            checked_text(topic, f"topic_arn_{kind}")
            subject_template = Template(subject_prefix, f"subject_prefix_{kind}", _PLACEHOLDERS)
            body_template = Template(body_prefix, f"body_prefix_{kind}", _PLACEHOLDERS)
            service = None if topic == _OFF else self._service("sns", region_name or _region(topic))
            return topic, service, subject_template, body_template

        self._routes = {
            "positive": route("good", topic_arn_good, subject_prefix_good, body_prefix_good),
            "negative": route("bad", topic_arn_bad, subject_prefix_bad, body_prefix_bad),
            "neutral": route("neutral", topic_arn_neutral, subject_prefix_neutral, body_prefix_neutral),
        }

    def _notify(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        feedback = argument["feedback"]
        rating = rating_of(feedback)
        topic, service, subject_prefix, body_prefix = self._routes[rating]
        if service is None:
            return
        values = {"session_id": session_id, "rating": rating, "timestamp": timestamp()}
        described = attributes(session_id=session_id, rating=rating)
        title = subject(f"{subject_prefix.render(**values)}on session {session_id}")
        room = SNS_LIMIT - size_of(described) - len(title)
        comment = str(feedback.get("comment", ""))
        body = feedback_body(body_prefix.render(**values), session_id, comment, room)
        publish = calling(
            service,
            "publish",
            TopicArn=topic,
            Subject=title,
            Message=body,
            MessageAttributes=described,
            **fifo_parameters(topic, session_id, identity()),
        )
        self._submit("sns.feedback", session_id, publish, body)


def _region(topic_arn: str) -> str | None:
    parts = topic_arn.split(":")
    return parts[3] or None if len(parts) > 5 else None


@with_parameters_of(FeedbackSNSHook)
def create_feedback_sns_hook(*args: Any, **kwargs: Any) -> FeedbackSNSHook:
    """Return a feedback hook that publishes to SNS; the arguments are those of `FeedbackSNSHook`."""
    return FeedbackSNSHook(*args, **kwargs)
