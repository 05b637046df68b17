"""One notification: what it is, how hard it is tried, who counts it, and what is told when it is given up."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ..errors import MongoDBSessionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotificationEvent:
    """What `on_error` is told of a notification that was given up.

    Attributes:
        name: Its name, like `"sqs.metadata_update"`.
        session_id: The session it tells of.
        submitted_at: When it was handed in, UTC.
        tries: How often its delivery was tried.
        message: What would have been sent, if its sender told.
    """

    name: str
    session_id: str
    submitted_at: datetime
    tries: int
    message: str | bytes | None = field(repr=False)


OnError = Callable[[NotificationEvent, BaseException], object]


def describe(error: BaseException) -> str:
    """Return what may be logged of any error: its type, because its text may quote a message or a credential."""
    return str(error) if isinstance(error, MongoDBSessionError) else type(error).__name__


@dataclass(frozen=True)
class Policy:
    """How hard a delivery is tried.

    Attributes:
        max_tries: How often at most.
        time_limit: Seconds for one try.
        is_worth_retrying: Whether an error may go away by itself.
        describe: What is logged of an error.
    """

    max_tries: int = 8
    time_limit: float = 10.0
    is_worth_retrying: Callable[[Exception], bool] = lambda error: True
    describe: Callable[[BaseException], str] = describe


@dataclass(eq=False)
class Source:
    """Whose notifications are counted together: those of one connection, or those of nobody in particular."""

    submitted: int = 0
    delivered: int = 0
    retried: int = 0
    failed: int = 0
    waiting: int = 0


@dataclass(eq=False, slots=True, kw_only=True)
class Notification:
    """One message on its way."""

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
        """How much it counts against `MAX_WAITING_BYTES`."""
        return 0 if self.message is None else len(self.message)

    @property
    def event(self) -> NotificationEvent:
        """What is told of it."""
        submitted_at = datetime.fromtimestamp(self.submitted_at, UTC)
        return NotificationEvent(self.name, self.session_id, submitted_at, self.tries, self.message)


def names_of(notifications: Iterable[Notification]) -> str:
    """Return the names of notifications for a log line, like `sns.feedback x 1, sqs.metadata_update x 12`."""
    counted = Counter(notification.name for notification in notifications)
    return ", ".join(f"{name} x {number}" for name, number in sorted(counted.items()))


def give_up(notification: Notification, error: BaseException) -> None:
    """Tell, once and everywhere, that a notification will not be delivered."""
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
