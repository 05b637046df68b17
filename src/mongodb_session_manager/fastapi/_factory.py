"""The factory of an application: its lifespan, its dependency, its health."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Annotated, Unpack

import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from starlette.types import Scope

from .. import MongoDBSessionManagerFactory, get_global_factory
from .._managers.global_factory import factory_of_application
from .._managers.options import ManagerOptions
from ..errors import MongoDBSessionError
from ._answers import RETRY_AFTER

logger = logging.getLogger(__name__)

OUTER_FACTORY = "mongodb_session_manager.factory"
"""The key, in the scope of a request, of the factory of the parent application."""

_READY_TIMEOUT = 2.0
"""Seconds; load balancers time out after a few."""

_CHECK_TIMEOUT = 5.0
"""Seconds that an application waits for its database at its start."""


def session_lifespan(
    connection_string: str | None = None,
    database_name: str | None = None,
    collection_name: str | None = "agent_sessions",
    *,
    check: bool = True,
    **options: Unpack[ManagerOptions],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return a lifespan for `FastAPI(lifespan=...)` that opens the application's factory and closes it at the end.

    In a lifespan of your own:

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with session_lifespan("mongodb://localhost:27017/support")(app):
                yield

    The factory is `app.state.mongodb_session_factory`; `Factory` is the dependency that returns it. Several
    applications of one process have one factory each. While only one application runs, `get_global_factory()` returns
    its factory, unless `initialize_global_factory` created another.

    At the end, pending writes and notifications are awaited, and the client is closed.

    Args:
        connection_string: As for `MongoDBSessionManagerFactory`.
        database_name: As for `MongoDBSessionManagerFactory`.
        collection_name: As for `MongoDBSessionManagerFactory`.
        check: Whether the application refuses to start if the database does not answer within five seconds or refuses
            the credentials. With `False`, no connection is opened before the first request.
        **options: `ManagerOptions` documents them.

    Raises:
        AccessDeniedError: When the application starts: the database refuses the credentials.
        ConfigurationError: When the application starts: an argument is invalid.
        DatabaseUnavailableError: When the application starts: no server was reachable within five seconds.
        DatabaseTimeoutError: When the application starts: a server did not answer within five seconds.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        create = partial(MongoDBSessionManagerFactory, connection_string, database_name, collection_name, **options)
        async with await anyio.to_thread.run_sync(create) as factory:  # in a thread: a new client can read files
            if check:
                await _check(factory)
            app.state.mongodb_session_factory = factory
            try:
                with factory_of_application(factory):
                    yield
            finally:
                del app.state.mongodb_session_factory

    return lifespan


async def _check(factory: MongoDBSessionManagerFactory) -> None:
    try:
        await factory.check_async(_CHECK_TIMEOUT)
    except MongoDBSessionError as error:
        raise error.with_traceback(None) from None  # the server logs it: the message is enough


def factory_in(scope: Scope) -> MongoDBSessionManagerFactory | None:
    """Return the factory of a request's application, else of the application that it is mounted in."""
    factory: MongoDBSessionManagerFactory | None = getattr(scope["app"].state, "mongodb_session_factory", None)
    return factory or scope.get(OUTER_FACTORY)


def get_factory(connection: HTTPConnection) -> MongoDBSessionManagerFactory:
    """A dependency: return the factory of the application, of its parent application, or of the process.

    Raises:
        FactoryNotInitializedError: There is no factory.
    """
    return factory_in(connection.scope) or get_global_factory()


Factory = Annotated[MongoDBSessionManagerFactory, Depends(get_factory)]
"""The type of a parameter that is the application's factory."""


async def live() -> JSONResponse:
    """An endpoint: answer 200 while the application runs, without a command to the database."""
    return JSONResponse({"status": "ok"})


async def ready(connection: HTTPConnection = None) -> JSONResponse:  # type: ignore[assignment]  # FastAPI passes one
    """An endpoint: answer 200 if the database of the factory answers within two seconds, otherwise 503.

    The body names no host.
    """
    try:
        async with asyncio.timeout(_READY_TIMEOUT):
            await (get_global_factory() if connection is None else get_factory(connection)).ping_async()
    except (MongoDBSessionError, TimeoutError) as error:
        logger.warning("error=<%s> | not ready", str(error) or type(error).__name__)
        return JSONResponse({"status": "unavailable"}, 503, RETRY_AFTER)
    return JSONResponse({"status": "ok"})


health = ready
"""Another name for `ready`."""
