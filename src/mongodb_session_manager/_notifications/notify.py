"""`notify_later`, the dispatcher of the process, and the statistics per factory."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypedDict

from .._io.loop import ExitOrder, Lock, close_at_exit, io_portal
from ..errors import ConfigurationError, EventLoopError, NotificationError
from .dispatcher import Dispatcher
from .notification import Notification, OnError, Policy, Source, give_up, names_of

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT = 5.0
"""Default seconds that closing a manager or a factory waits for its notifications."""

RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]


class NotificationStats(TypedDict):
    """Counts of the notifications of a factory's sessions in this process.

    `submitted` = `delivered` + `failed` + `waiting`.

    Attributes:
        submitted: Notifications submitted.
        delivered: Delivered, or without a receiver because the WebSocket connection is gone.
        retried: Tries after the first.
        failed: Given up; each was logged and passed to `on_error`.
        waiting: Pending.
        oldest_wait: The age of the oldest pending notification in seconds.
    """

    submitted: int
    delivered: int
    retried: int
    failed: int
    waiting: int
    oldest_wait: float


_lock = Lock()
_dispatcher: Dispatcher | None = None
_sources: weakref.WeakKeyDictionary[object, Source] = weakref.WeakKeyDictionary()
_unattributed = Source()

# A context variable, because a hook gets data and not the manager: `notify_later` has no other way to know whose hook
# calls it, and one hook can serve several factories.
_current: ContextVar[Source | None] = ContextVar("mongodb_session_manager_notification_source", default=None)


def notify_later(
    event_name: str,
    session_id: str,
    deliver: Callable[[], Awaitable[object]],
    *,
    on_error: OnError | None = None,
    retry_on: RetryOn = Exception,
    max_tries: int = 8,
    time_limit: float = 10.0,
    message: str | bytes | None = None,
) -> None:
    """Queue a delivery that runs in the background, and return at once. Call it in a hook, on any thread or event loop.

    Deliveries run on the library's own event loop, in the order of submission per session. A failed delivery is retried
    after pauses that double. A delivery that is dropped is logged by its name, counted
    (`factory.get_notification_stats()`) and passed to `on_error`. A delivery is dropped at once if the queue is full:
    10,000 notifications or 64 MiB of messages. Closing a manager or a factory, and the exit of the interpreter, wait up
    to 5 seconds for pending deliveries.

    Args:
        event_name: The name of the event in logs.
        session_id: The session of the event.
        deliver: Called without arguments for each try, and awaited. It must not block the event loop.
        on_error: Called with a `NotificationEvent` and the exception, on the library's event loop or on the calling
            thread. It must return at once.
        retry_on: The exceptions to retry after, or a function that returns whether to retry after an exception.
        max_tries: The maximum number of tries.
        time_limit: Seconds for one try.
        message: The payload, for `on_error`. Its length counts against the 64 MiB.

    Raises:
        ConfigurationError: `deliver` or `on_error` is not a function.
    """
    if not callable(deliver) or not (on_error is None or callable(on_error)):
        raise ConfigurationError("deliver and on_error must be functions")
    types: Any = retry_on
    is_function = callable(retry_on) and not isinstance(retry_on, type)  # else a type, a tuple or a union of them
    policy = Policy(max_tries, time_limit, types if is_function else lambda error: isinstance(error, types))
    submit(event_name, session_id, deliver, policy, on_error, message)


def submit(
    name: str,
    session_id: str,
    deliver: Callable[[], Awaitable[object]],
    policy: Policy,
    on_error: OnError | None,
    message: str | bytes | None,
) -> None:
    """Submit a notification to the dispatcher of the process, counted for the manager whose hook is running."""
    source = _current.get() or _unattributed
    notification = Notification(name, session_id, deliver, source, policy, on_error, message)
    try:
        dispatcher = _started()
    except EventLoopError:
        notification.source.submitted += 1
        notification.source.failed += 1
        give_up(notification, NotificationError("the process is exiting"))
    else:
        dispatcher.submit(notification)


def _started() -> Dispatcher:
    global _dispatcher
    portal = io_portal()
    with _lock:
        if _dispatcher is None or _dispatcher.portal is not portal:
            _dispatcher = Dispatcher(portal)
            close_at_exit(_dispatcher.aclose, portal.loop, ExitOrder.NOTIFICATIONS)
        return _dispatcher


@contextmanager
def attributed_to(owner: object) -> Iterator[None]:
    token = _current.set(_source_of(owner))
    try:
        yield
    finally:
        _current.reset(token)


def _source_of(owner: object) -> Source:
    with _lock:
        return _sources.setdefault(owner, Source())


def stats_of(owner: object) -> NotificationStats:
    source = _source_of(owner)
    return {
        "submitted": source.submitted,
        "delivered": source.delivered,
        "retried": source.retried,
        "failed": source.failed,
        "waiting": source.waiting,
        "oldest_wait": _dispatcher.oldest_wait(source) if _dispatcher is not None else 0.0,
    }


async def drain(owner: object, seconds: float, session_id: str | None = None) -> None:
    """Wait until an owner's notifications, of one session or of all, are settled; log the ones that time out.

    The process continues to deliver them.
    """
    dispatcher, source = _dispatcher, _source_of(owner)
    if dispatcher is None or not dispatcher.waiting(session_id, source):
        return
    await dispatcher.portal.run(dispatcher.drain, seconds, session_id, source)
    if left := dispatcher.waiting(session_id, source):
        logger.warning(
            "session_id=<%r>, undelivered=<%r>, seconds=<%.1f> | closed before these notifications were delivered",
            session_id,
            names_of(left),
            seconds,
        )


def _forget_parent() -> None:
    """Reset the state in a forked child: the parent delivers its own pending notifications."""
    global _lock, _dispatcher, _sources, _unattributed
    _lock, _dispatcher = Lock(), None
    _sources, _unattributed = weakref.WeakKeyDictionary(), Source()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
