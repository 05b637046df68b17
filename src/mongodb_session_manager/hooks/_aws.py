"""How AWS is reached: clients, shared and closed with their last user, and what its errors mean.

The only module that imports aioboto3 and botocore. Clients live on the library's own event loop.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .._io.loop import ExitOrder, close_at_exit, io_portal
from .._notifications.notification import Policy
from .._notifications.notification import describe as describe_any
from ..errors import EventLoopError, MissingExtraError

try:
    from aioboto3 import Session as Session
    from aiobotocore.config import AioConfig
    from botocore import exceptions as aws
    from botocore.config import Config as Config
    from botocore.parsers import ResponseParserError
except ImportError as error:
    raise MissingExtraError(
        "the AWS hooks need aioboto3: pip install 'mongodb-session-manager[aws]'", name=error.name
    ) from error

logger = logging.getLogger(__name__)

_OPENING = 10.0
"""Seconds that opening a client may take: it reads files, and may ask for credentials."""

_LETTING_GO = 0.4
"""Seconds that a call which is cancelled may take to end when no time is left."""

_DEFAULTS: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 10}
"""The dispatcher tries again, so the client does not."""

# Codes of refusals that pass, whatever their HTTP status. https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html
_PASSING = {
    "BandwidthLimitExceeded",
    "InternalError",
    "InternalFailure",
    "LimitExceededException",
    "OverLimit",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "TooManyRequestsException",
    "TransactionInProgressException",
}


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_worth_retrying(error: Exception) -> bool:
    """Tell whether an error may go away by itself: throttling, the service's own trouble, the connection."""
    match error:
        case aws.ClientError():
            code, status = _code(error), _status(error)
            return code in _PASSING or "Throttl" in code or status == 429 or status >= 500
        case aws.ConnectionError() | aws.HTTPClientError() | ResponseParserError() | aws.IncompleteReadError():
            return True
        case aws.MetadataRetrievalError() | aws.CredentialRetrievalError():
            return True
        case _:
            return isinstance(error, OSError)  # TimeoutError among them


def describe(error: BaseException) -> str:
    """Return what may be logged of an error: its text may quote the message, or what signed the request."""
    if isinstance(error, aws.ClientError):
        return f"{type(error).__name__} {_code(error)} (HTTP {_status(error)})"
    return describe_any(error)


def is_gone(error: Exception) -> bool:
    """Tell whether a WebSocket connection does not exist any more."""
    return isinstance(error, aws.ClientError) and (_code(error) == "GoneException" or _status(error) == 410)


POLICY = Policy(is_worth_retrying=is_worth_retrying, describe=describe)


@dataclass(frozen=True)
class _Key:
    """What tells clients apart."""

    service: str
    region_name: str | None
    endpoint_url: str | None
    session: Session | None
    config: Config | None


@dataclass(eq=False)
class _Shared:
    """A client, and who keeps it open.

    Its opening is a task of its own: a call that is cancelled meanwhile leaves it to the next one.
    """

    calls: int = 0
    keepers: weakref.WeakSet[AwsService] = field(default_factory=weakref.WeakSet)
    opening: asyncio.Task[tuple[Any, Any]] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether opening it was tried and did not succeed."""
        return self.opening is not None and self.opening.done() and _has_failed(self.opening)

    async def close(self) -> None:
        """Close the client, once it is open."""
        if self.opening is not None:
            await asyncio.wait([self.opening])
            if not self.has_failed:
                context, _ = self.opening.result()
                await context.__aexit__(None, None, None)


def _has_failed(opening: asyncio.Task[Any]) -> bool:
    return opening.cancelled() or opening.exception() is not None


class _Clients:
    """The open clients of a process. Everything happens on the library's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._shared: dict[_Key, _Shared] = {}
        self._calling: Counter[asyncio.Task[Any]] = Counter()
        self._closing: set[asyncio.Task[None]] = set()
        self._one_by_one = asyncio.Lock()
        self._session: Session | None = None
        close_at_exit(self.aclose_at_exit, loop, ExitOrder.CONNECTIONS)

    @asynccontextmanager
    async def lease(self, service: AwsService) -> AsyncIterator[Any]:
        """Lend the client of a service, opened if nobody had it open."""
        shared = self._shared.setdefault(service.key, _Shared())
        shared.calls += 1
        task = asyncio.current_task()
        assert task is not None
        self._calling[task] += 1
        if service.is_kept:
            shared.keepers.add(service)
        try:
            if shared.opening is None or shared.has_failed:
                shared.opening = self.loop.create_task(self._open(service.key))
                shared.opening.add_done_callback(_has_failed)  # asyncio would log a failure nobody waits for any more
            _, client = await asyncio.shield(shared.opening)
            yield client
        finally:
            shared.calls -= 1
            self._calling -= Counter([task])  # which leaves nothing at zero
            await self.close_unused(service.key)

    async def _open(self, key: _Key) -> tuple[Any, Any]:
        run = self.loop.run_in_executor
        async with self._one_by_one:  # sessions of botocore make one client at a time
            session: Any = key.session or self._session
            if session is None:
                session = self._session = await run(None, Session)
            config = AioConfig(**_DEFAULTS)
            if key.config is not None:
                config = config.merge(key.config)
            context = session.client(
                key.service, region_name=key.region_name, endpoint_url=key.endpoint_url, config=config
            )
            # In a thread, because opening reads the description of the service, certificates and credentials from
            # disk. The client opens its sockets where it is used.
            return context, await run(None, asyncio.run, asyncio.wait_for(context.__aenter__(), _OPENING))

    async def let_go(self, service: AwsService) -> None:
        """Note that a service needs its client no more."""
        if (shared := self._shared.get(service.key)) is not None:
            shared.keepers.discard(service)
            await self.close_unused(service.key)

    async def close_unused(self, key: _Key) -> None:
        """Close a client that nobody uses."""
        shared = self._shared.get(key)
        if shared is not None and not shared.calls and not shared.keepers:
            del self._shared[key]
            # A task of its own, because the caller may be cancelled, more than once.
            closing = self.loop.create_task(shared.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)

    async def aclose_at_exit(self, seconds: float) -> None:
        """Close every client when the interpreter ends, once the calls that were given up have let go of it."""
        if self._calling:
            await asyncio.wait(set(self._calling), timeout=max(seconds, _LETTING_GO))
        while self._shared:
            await self._shared.popitem()[1].close()
        if self._closing:
            await asyncio.wait(self._closing)


_clients: _Clients | None = None
_abandoned: list[_Clients] = []


def _running_clients() -> _Clients:
    """Return the clients of the running loop; those of a forked process's parent are left alone, sockets and all."""
    global _clients
    loop = asyncio.get_running_loop()
    if _clients is None or _clients.loop is not loop:
        if _clients is not None:
            _abandoned.append(_clients)
        _clients = _Clients(loop)
    return _clients


class AwsService:
    """A hook's way to one service of AWS.

    From its first call it keeps the client open; until it is collected, or, once it had users, while it has some.
    """

    def __init__(
        self,
        service: str,
        *,
        region_name: str | None,
        endpoint_url: str | None,
        aws_session: Session | None,
        config: Config | None,
    ) -> None:
        self.key = _Key(service, region_name, endpoint_url, aws_session, config)
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._had_users = False
        weakref.finalize(self, _close_collected, self.key).atexit = False

    @property
    def is_kept(self) -> bool:
        """Whether the client stays open between calls."""
        return bool(self._users) or not self._had_users

    async def call(self, operation: str, **parameters: Any) -> Any:
        """Call an operation of the service. Runs on the library's event loop."""
        async with _running_clients().lease(self) as client:
            return await getattr(client, operation)(**parameters)

    def hold(self, user: object) -> None:
        """Take note of a manager or factory that needs the client."""
        self._had_users = True
        self._users.add(user)

    async def let_go(self, user: object) -> None:
        """Take note that a user is gone; the last one's going closes the client, unless others share it."""
        self._users.discard(user)
        if not self._users and (clients := _clients) is not None:
            with suppress(EventLoopError):
                portal = io_portal()
                if portal.loop is clients.loop:
                    await portal.run(clients.let_go, self)


def _close_collected(key: _Key) -> None:
    if (clients := _clients) is not None:
        with suppress(EventLoopError):
            portal = io_portal()
            if portal.loop is clients.loop:
                portal.submit(clients.close_unused, key)
