"""AWS clients, and the classification of AWS errors.

The only module that imports aioboto3 and botocore. Clients live on the library's own event loop.
"""

from __future__ import annotations

import asyncio
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

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

_OPENING_TIMEOUT = 10.0
"""Seconds for opening a client, which reads files and can request credentials."""

_DEFAULTS: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 10}
"""One attempt per call: the dispatcher retries, with a time limit per try, and blocks no worker between tries."""


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_worth_retrying(error: Exception) -> bool:
    """Return whether an error can be transient: throttling, a failure of the service, a lost connection."""
    match error:
        case aws.ClientError():
            return _status(error) >= 500 or _status(error) == 429 or "Throttl" in _code(error)
        case aws.ConnectionError() | aws.HTTPClientError() | ResponseParserError() | aws.IncompleteReadError():
            return True
        case aws.MetadataRetrievalError() | aws.CredentialRetrievalError():
            return True
        case _:
            return isinstance(error, OSError)  # TimeoutError among them


def describe(error: BaseException) -> str:
    """Return the loggable part of an error: its text can quote the message or the signature of the request."""
    if isinstance(error, aws.ClientError):
        return f"{type(error).__name__} {_code(error)} (HTTP {_status(error)})"
    return describe_any(error)


def is_gone(error: Exception) -> bool:
    return isinstance(error, aws.ClientError) and (_code(error) == "GoneException" or _status(error) == 410)


POLICY = Policy(is_worth_retrying=is_worth_retrying, describe=describe)


@dataclass(frozen=True)
class _Key:
    service: str
    region_name: str | None
    endpoint_url: str | None
    session: Session | None
    config: Config | None


@dataclass
class _Opened:
    """An opened client. The finalizer of its `AwsClient` refers to it, so it is never collected while it is open."""

    loop: asyncio.AbstractEventLoop | None = None
    task: asyncio.Task[Any] | None = None

    async def close(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            await asyncio.wait([task])
            if not _has_failed(task):
                await task.result().close()


class AwsClient:
    """A client of an AWS service, opened by its first call; see `shared_client`.

    It is closed when the interpreter exits, or when the last hook that uses it is collected.
    """

    def __init__(self, key: _Key) -> None:
        self.key = key
        self._opened = _Opened()
        weakref.finalize(self, _close_collected, self._opened).atexit = False

    async def call(self, operation: str, **parameters: Any) -> Any:
        opened, loop = self._opened, asyncio.get_running_loop()
        if opened.loop is not loop:  # the first call of the process, which can be a forked child
            _abandon(opened)
            opened.loop = loop
            close_at_exit(self.aclose, loop, ExitOrder.CONNECTIONS)
        if opened.task is None or _has_failed(opened.task):
            # A separate task: if this call is cancelled, the next one uses the client.
            opened.task = loop.create_task(_open(self.key))
            opened.task.add_done_callback(_has_failed)  # asyncio logs an error that nothing retrieves
        client = await asyncio.shield(opened.task)
        return await getattr(client, operation)(**parameters)

    @property
    def is_open(self) -> bool:
        task = self._opened.task
        return task is not None and task.done() and not _has_failed(task)

    async def aclose(self, seconds: float = 0) -> None:
        """Close the client; a later call opens it again. `seconds` is unused: closing waits for no answer."""
        await self._opened.close()


_abandoned: list[asyncio.Task[Any]] = []
"""The clients that a forked child inherited. The parent uses their sockets, so the child must not close them."""


def _abandon(opened: _Opened) -> None:
    if opened.task is not None:
        _abandoned.append(opened.task)
        opened.task = None


def _close_collected(opened: _Opened) -> None:
    if opened.task is None:  # never used: `io_portal` would start a thread
        return
    with suppress(EventLoopError):  # the interpreter exits
        portal = io_portal()
        if portal.loop is opened.loop:
            portal.submit(opened.close)
        else:
            _abandon(opened)


_clients: WeakValueDictionary[_Key, AwsClient] = WeakValueDictionary()
_opening_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def shared_client(
    service: str,
    *,
    region_name: str | None,
    endpoint_url: str | None,
    aws_session: Session | None,
    config: Config | None,
) -> AwsClient:
    key = _Key(service, region_name, endpoint_url, aws_session, config)
    return _clients.setdefault(key, AwsClient(key))


@cache
def _default_session() -> Session:
    return Session()


async def _open(key: _Key) -> Any:
    loop = asyncio.get_running_loop()
    config = AioConfig(**_DEFAULTS)
    if key.config is not None:
        config = config.merge(key.config)
    async with _opening_locks.setdefault(loop, asyncio.Lock()):  # a session of botocore creates one client at a time
        session: Any = key.session or await loop.run_in_executor(None, _default_session)
        context = session.client(key.service, region_name=key.region_name, endpoint_url=key.endpoint_url, config=config)
        # In a thread, because opening reads the description of the service, certificates and credentials from disk.
        # The client opens its sockets on the loop that uses it.
        opening = asyncio.wait_for(context.__aenter__(), _OPENING_TIMEOUT)
        return await loop.run_in_executor(None, asyncio.run, opening)


def _has_failed(opening: asyncio.Task[Any]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None)
