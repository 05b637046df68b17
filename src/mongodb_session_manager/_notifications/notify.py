"""The process's dispatcher, and whose notifications are whose."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypedDict

from .._io.loop import ExitOrder, Lock, close_at_exit, io_portal
from ..errors import ConfigurationError, EventLoopError, NotificationError
from .dispatcher import Dispatcher
from .notification import Notification, OnError, Policy, Source, describe, give_up, names_of

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT = 5.0
"""Seconds that closing a manager or a factory waits for notifications, unless it is told otherwise."""

RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]


class NotificationStats(TypedDict):
    """What became of the notifications of a factory's sessions in this process.

    `submitted` = `delivered` + `failed` + `waiting`.

    Attributes:
        submitted: Handed in.
        delivered: Delivered, or found that their receiver is gone.
        retried: Tries after the first.
        failed: Given up; each was logged and handed to `on_error`.
        waiting: Neither delivered nor given up yet.
        oldest_wait: For how many seconds the oldest of these has been waiting.
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
_nobody = Source()
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
    """Have something delivered in the background, and return at once; for hooks, from any thread or event loop.

    Deliveries run on the library's own event loop, those of one session one after the other in the order of this call.
    A failed one is tried again, after pauses that double. One that is given up is logged by its name, counted
    (`factory.get_notification_stats()`) and handed to `on_error`; so is one for which there is no room, when 10,000
    notifications or 64 MiB of messages wait. Closing a manager or a factory, and the end of the interpreter, wait up
    to 5 seconds for what is not delivered yet.

    Args:
        event_name: What it is called in logs.
        session_id: The session it tells of.
        deliver: Called without arguments for each try, and awaited. It must not block the event loop.
        on_error: Called with a `NotificationEvent` and the exception, on the library's event loop or on this thread;
            it must return at once.
        retry_on: The exceptions after which a delivery is tried again, or a function that tells.
        max_tries: How often it is tried at most.
        time_limit: Seconds for one try.
        message: What is sent, for `on_error`; its length counts against the 64 MiB.

    Raises:
        ConfigurationError: An argument cannot be used.
    """
    if not callable(deliver) or not (on_error is None or callable(on_error)):
        raise ConfigurationError("deliver and on_error must be functions")
    worth = retry_on if callable(retry_on) and not isinstance(retry_on, type) else _is_one_of(retry_on)
    policy = Policy(max_tries, time_limit, worth, describe)
    submit(event_name, session_id, deliver, policy=policy, on_error=on_error, message=message)


def _is_one_of(types: type[Exception] | tuple[type[Exception], ...]) -> Callable[[Exception], bool]:
    return lambda error: isinstance(error, types)


def submit(
    event_name: str,
    session_id: str,
    deliver: Callable[[], Awaitable[object]],
    *,
    policy: Policy,
    on_error: OnError | None,
    message: str | bytes | None,
) -> None:
    """Hand a notification to the process's dispatcher, in the name of the manager whose hook this runs in."""
    notification = Notification(
        name=event_name,
        session_id=session_id,
        deliver=deliver,
        source=_current.get() or _nobody,
        policy=policy,
        on_error=on_error,
        message=message,
    )
    try:
        dispatcher = _started()
    except EventLoopError:
        notification.source.submitted += 1
        notification.source.failed += 1
        give_up(notification, NotificationError("the process ends"))
    else:
        dispatcher.submit(notification)


def _started() -> Dispatcher:
    global _dispatcher
    portal = io_portal()
    with _lock:
        if _dispatcher is None or _dispatcher.portal is not portal:
            _dispatcher = Dispatcher(portal)
            _dispatcher.start()
            close_at_exit(_dispatcher.aclose, portal.loop, ExitOrder.NOTIFICATIONS)
        return _dispatcher


@contextmanager
def in_the_name_of(owner: object) -> Iterator[None]:
    """Count what is submitted within as notifications of `owner`."""
    token = _current.set(_source_of(owner))
    try:
        yield
    finally:
        _current.reset(token)


def _source_of(owner: object) -> Source:
    with _lock:
        return _sources.setdefault(owner, Source())


def stats_of(owner: object) -> NotificationStats:
    """Return what became of an owner's notifications."""
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
    """Wait until an owner's notifications are settled, of one session or of all; log what is not by then.

    It is not given up: the process goes on trying.
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
    """Start afresh in a forked child: what waits in the parent is delivered by the parent."""
    global _lock, _dispatcher, _sources, _nobody
    _lock, _dispatcher = Lock(), None
    _sources, _nobody = weakref.WeakKeyDictionary(), Source()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
