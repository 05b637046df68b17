"""Sessions in a FastAPI application; needs the extra `fastapi`.

    app = FastAPI(lifespan=session_lifespan("mongodb://localhost:27017/support"))
    add_session_support(app)
    app.get("/health")(health)

    @app.post("/sessions/{session_id}/messages")
    async def answer(session: Session, prompt: str) -> StreamingResponse:
        agent = Agent(session_manager=session, callback_handler=None)

        async def tokens() -> AsyncIterator[str]:
            async for event in agent.stream_async(prompt):
                if "data" in event:
                    yield event["data"]

        return StreamingResponse(tokens(), media_type="text/plain")

Nothing here blocks the event loop. A client that goes away in the middle of an answer stops the agent; what was stored
by then stays stored, and the next request of the session goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any

import anyio.to_thread

from . import AsyncMongoDBSessionManager, get_global_factory, initialize_global_factory
from .errors import (
    AgentNotFoundError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EncodingError,
    InvalidArgumentError,
    MessageTooLargeError,
    MissingExtraError,
    MongoDBSessionError,
    SessionConflictError,
    SessionNotFoundError,
)

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError(
        "mongodb_session_manager.fastapi needs FastAPI: pip install 'mongodb-session-manager[fastapi]'", name=error.name
    ) from error

__all__ = ["Session", "add_session_support", "health", "open_session", "session_lifespan"]

logger = logging.getLogger(__name__)

_STACK = "mongodb_session_manager.sessions"

_HEALTH_TIMEOUT = 2.0
"""Seconds; load balancers give up on an answer after a few."""

# What a client is told: what it can do about it, and nothing of the server or of the conversation. An argument that was
# refused is the client's own, so the error itself says which and why; 422, as for what FastAPI itself refuses.
_ANSWERS: dict[type[MongoDBSessionError], tuple[int, str | None]] = {
    SessionConflictError: (409, "another request changed the session meanwhile: repeat this one"),
    SessionNotFoundError: (404, "the session does not exist"),
    AgentNotFoundError: (404, "the session holds no such agent"),
    InvalidArgumentError: (422, None),
    EncodingError: (422, "a value cannot be stored"),
    MessageTooLargeError: (413, "the message is too large"),
    DatabaseUnavailableError: (503, "the database cannot be reached: try again later"),
    DatabaseTimeoutError: (503, "the database takes too long: try again later"),
}


def session_lifespan(*args: Any, **kwargs: Any) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return a lifespan for `FastAPI(lifespan=...)` that opens the process-wide factory and closes it at the end.

    The arguments are those of `MongoDBSessionManagerFactory`. No connection is opened before the first request. In a
    lifespan of your own:

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with session_lifespan("mongodb://localhost:27017/support")(app):
                yield

    At the end, writes and notifications under way are awaited and the client is closed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # In a thread, because it waits for the end of a factory that it replaces.
        async with await anyio.to_thread.run_sync(partial(initialize_global_factory, *args, **kwargs)):
            yield

    return lifespan


def add_session_support(app: FastAPI) -> None:
    """Have an application close the sessions that `open_session` opens, and answer errors as a client expects.

    `SessionConflictError` is answered with 409, a session or agent that does not exist with 404, an argument that
    cannot be used, like a bad session id, with 422, a message that is too large with 413, and a database that is away
    or too slow with 503, which is also logged. The body is `{"detail": "..."}`, as for FastAPI's own errors. Once the
    first part of a streamed answer is out its status cannot change: an error then ends the stream.

    After a 503 it is unknown whether the request's messages are stored: closing the session tries once more. What that
    cannot store is raised, and logged by the server.

    Call it before the application starts.
    """
    app.add_middleware(_ClosesSessions)
    for error in _ANSWERS:
        app.add_exception_handler(error, _answer)


async def open_session(session_id: str, connection: HTTPConnection) -> AsyncMongoDBSessionManager:
    """Open the session that the path parameter `session_id` names, from the process-wide factory: a dependency.

    It is closed when the whole response is sent, the last part of a stream too, or the client has gone.

    Raises:
        FactoryNotInitializedError: The application has no `session_lifespan`.
        MongoDBSessionError: The session cannot be opened; see `add_session_support` for what is answered.
        RuntimeError: `add_session_support` was not called.
    """
    stack: AsyncExitStack | None = connection.scope.get(_STACK)
    if stack is None:
        raise RuntimeError("nothing would close the session: call add_session_support(app) before the app starts")
    return await stack.enter_async_context(await get_global_factory().create_session_manager_async(session_id))


Session = Annotated[AsyncMongoDBSessionManager, Depends(open_session)]
"""The type of a parameter that is the session of the path parameter `session_id`."""


async def health() -> JSONResponse:
    """Answer 200 if the database of the process-wide factory answers within two seconds, else 503: an endpoint."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT):
            await get_global_factory().ping_async()
    except (MongoDBSessionError, TimeoutError) as error:
        logger.warning("error=<%s> | not healthy", str(error) or type(error).__name__)
        return JSONResponse({"status": "unavailable"}, 503)
    return JSONResponse({"status": "ok"})


class _ClosesSessions:
    """Closes a request's sessions when its response is sent.

    Not left to a dependency with `yield`, which FastAPI before 0.118 leaves before it sends the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            scope[_STACK] = stack
            await self._app(scope, receive, send)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    status, detail = next(answer for kind, answer in _ANSWERS.items() if isinstance(error, kind))
    if status == 503:
        logger.warning("error=<%s> | answered 503", error)
    return JSONResponse({"detail": detail or str(error)}, status)
