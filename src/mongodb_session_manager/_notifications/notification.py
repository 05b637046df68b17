"""A notification: its message, its retry policy, its counters and its error handler."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from ..errors import MongoDBSessionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotificationEvent:
    """A dropped notification, as passed to `on_error`.

    Attributes:
        name: The event name, like `"sqs.metadata_update"`.
        session_id: The session of the notification.
        submitted_at: The time of submission, UTC.
        tries: The number of tries.
        message: The payload, or `None` if its sender did not pass it.
    """

    name: str
    session_id: str
    submitted_at: datetime
    tries: int
    message: str | bytes | None = field(repr=False)


OnError = Callable[[NotificationEvent, BaseException], object]


def describe(error: BaseException) -> str:
    """Return the loggable part of an error: its type, because its text can quote a message or a credential."""
    return str(error) if isinstance(error, MongoDBSessionError) else type(error).__name__


class Policy(NamedTuple):
    """The retry policy: the tries, the seconds of one, which errors are worth another, and the text to log for one."""

    max_tries: int = 8
    time_limit: float = 10.0
    is_worth_retrying: Callable[[Exception], bool] = lambda error: True
    describe: Callable[[BaseException], str] = describe


class Source:
    def __init__(self) -> None:
        self.submitted = self.delivered = self.retried = self.failed = self.waiting = 0


@dataclass(eq=False, slots=True)
class Notification:
    name: str
    session_id: str
    deliver: Callable[[], Awaitable[object]]
    source: Source
    policy: Policy
    on_error: OnError | None
    message: str | bytes | None
    submitted_at: float = field(default_factory=time.time)
    tries: int = 0
    number: int = 0

    @property
    def size(self) -> int:
        return 0 if self.message is None else len(self.message)

    @property
    def event(self) -> NotificationEvent:
        submitted_at = datetime.fromtimestamp(self.submitted_at, UTC)
        return NotificationEvent(self.name, self.session_id, submitted_at, self.tries, self.message)


def names_of(notifications: Iterable[Notification]) -> str:
    """Return the names of notifications for a log line, like `sns.feedback x 1, sqs.metadata_update x 12`."""
    counted = Counter(notification.name for notification in notifications)
    return ", ".join(f"{name} x {number}" for name, number in sorted(counted.items()))


def give_up(notification: Notification, error: BaseException) -> None:
    logger.error(
        "event=<%r>, session_id=<%r>, tries=<%d>, error=<%s> | notification not delivered",
        notification.name,
        notification.session_id,
        notification.tries,
        notification.policy.describe(error),
    )
    if notification.on_error is not None:
        try:
            notification.on_error(notification.event, error)
        except Exception as failure:
            logger.error("event=<%r>, error=<%s> | on_error failed", notification.name, type(failure).__name__)
