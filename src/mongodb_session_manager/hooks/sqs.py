"""Metadata changes to Amazon SQS."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .._io.requested_fields import StoredFields
from .._notifications.notification import OnError
from ._base import AwsHook, checked_fields, checked_text, updated, with_parameters_of
from ._messages import SQS_LIMIT, attributes, fifo_parameters, metadata_body, selected, size_of

if TYPE_CHECKING:
    from ._aws import Config, Session

_QUEUE_HOST = re.compile(r"https?://sqs\.([a-z0-9-]+)\.amazonaws\.com")


class MetadataSQSHook(AwsHook):
    """A metadata hook that sends each update and delete to a queue, in the background.

    The body is JSON with the fields `session_id`, `event` (`"metadata_update"`), `operation` (`"update"` or
    `"delete"`), `metadata` (the changed values; deleted keys are `null`) and `timestamp`. If it exceeds 256 KiB,
    `metadata` is the list of the changed keys, and the field `truncated` is `true`. The message attributes are
    `session_id` and `event`. A change that includes none of `metadata_fields` sends nothing. In a FIFO queue, the
    session is the message group.

    Args:
        queue_url: The URL of the queue.
        metadata_fields: The fields to send; `None` sends all.
        region_name: The region; `None` uses the one in the URL, else the default of the AWS session.
        endpoint_url: The URL of the service; `None` uses the one of AWS.
        aws_session: The `aioboto3.Session` with the credentials; `None` uses the default credential chain.
        config: A botocore `Config`.
        on_error: Called with a `NotificationEvent` and the exception for each notification that is dropped, on the
            library's event loop. It must return at once.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    actions = frozenset({"update", "delete"})

    def __init__(
        self,
        queue_url: str,
        metadata_fields: Sequence[str] | None = None,
        *,
        region_name: str | None = None,
        endpoint_url: str | None = None,
        aws_session: Session | None = None,
        config: Config | None = None,
        on_error: OnError | None = None,
    ) -> None:
        super().__init__(endpoint_url=endpoint_url, aws_session=aws_session, config=config, on_error=on_error)
        self._queue_url = checked_text(queue_url, "queue_url")
        self._fields = checked_fields(metadata_fields)
        named = _QUEUE_HOST.match(queue_url)
        self._sqs = self._client("sqs", region_name or (named[1] if named else None))

    def _notify(self, action: str, session_id: str, argument: dict[str, Any], stored: StoredFields) -> None:
        if not (metadata := selected(updated(action, argument), self._fields)):
            return
        described = attributes(session_id=session_id, event="metadata_update")
        body = metadata_body(session_id, action, metadata, SQS_LIMIT - size_of(described))
        send = partial(
            self._sqs.call,
            "send_message",
            QueueUrl=self._queue_url,
            MessageBody=body,
            MessageAttributes=described,
            **fifo_parameters(self._queue_url, session_id, uuid.uuid4().hex),
        )
        self._submit("sqs.metadata_update", session_id, send, body)


@with_parameters_of(MetadataSQSHook)
def create_metadata_sqs_hook(*args: Any, **kwargs: Any) -> MetadataSQSHook:
    """Return a metadata hook that sends to SQS; for the arguments see `MetadataSQSHook`."""
    return MetadataSQSHook(*args, **kwargs)
