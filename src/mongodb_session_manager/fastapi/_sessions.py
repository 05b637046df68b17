"""The sessions of a request: the dependency that opens them, and the middleware that closes them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from strands.types.exceptions import EventLoopException

from .. import AsyncMongoDBSessionManager
from ._answers import ANSWERS, UNEXPECTED, answer_to, log
from ._factory import OUTER_FACTORY, factory_in, get_factory


@dataclass(frozen=True)
class Exchange:
    """A request that `add_session_support` serves; the stack is closed after the response."""

    stack: AsyncExitStack
    receive: Receive
    path: str


# A context variable, because `stream` takes an agent and not the request.
_exchange: ContextVar[Exchange | None] = ContextVar("mongodb_session_manager_exchange", default=None)


def current_exchange(purpose: str) -> Exchange:
    """Return the current request, or raise `RuntimeError` if `add_session_support` was not called."""
    if (exchange := _exchange.get()) is None:
        raise RuntimeError(f"nothing would {purpose}: call add_session_support(app) before the app starts")
    return exchange


async def open_session(session_id: str, connection: HTTPConnection) -> AsyncMongoDBSessionManager:
    """A dependency: open the session of the path parameter `session_id` with the factory of the application.

    It is closed when the whole response is sent, including the last part of a stream, or when the client disconnects.

    Raises:
        FactoryNotInitializedError: The application has no `session_lifespan`.
        MongoDBSessionError: The session cannot be opened; see `add_session_support` for the answer.
        RuntimeError: `add_session_support` was not called.
    """
    stack = current_exchange("close the session").stack
    return await stack.enter_async_context(get_factory(connection).create_session_manager_async(session_id))


Session = Annotated[AsyncMongoDBSessionManager, Depends(open_session)]
"""The type of a parameter that is the session of the path parameter `session_id`."""


def add_session_support(app: FastAPI) -> None:
    """Close the sessions that `open_session` opens, stop the agents of `stream`, and answer errors.

    | status | WebSocket | error |
    |---|---|---|
    | 404 | 1008 | `SessionNotFoundError`, `AgentNotFoundError`, `MessageNotFoundError` |
    | 409 | 1013 | `SessionConflictError`, `SessionBusyError` |
    | 409 | 1008 | `SessionExistsError` |
    | 413 | 1008 | `MessageTooLargeError`, `StateTooLargeError` |
    | 422 | 1008 | `InvalidArgumentError`, `EncodingError` |
    | 503 | 1013 | `DatabaseUnavailableError`, `DatabaseTimeoutError` |
    | 500 | 1011 | `DatabaseError`, `ConfigurationError`, `AccessDeniedError`: trying again does not help |

    The body is `{"detail": "..."}`, as for FastAPI's own errors. 500 and 503 are logged in one line. All other errors
    are bugs of the application: FastAPI answers 500 and the server logs the traceback. A WebSocket is closed with the
    code and a short reason; one that is not accepted yet is accepted first, because a browser shows no code otherwise.

    After a 503 it is unknown whether the request's messages are stored: closing the session retries once. If that fails
    too, the error is raised, and the server logs it.

    Call it before the application starts, and for each application that is mounted in another.
    """
    app.add_middleware(_SessionSupport)
    for error in (*ANSWERS, EventLoopException):
        app.add_exception_handler(error, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    answer = answer_to(error)
    if answer is UNEXPECTED or request.scope["type"] == "websocket":
        raise error  # FastAPI answers the former with its own 500, _SessionSupport the latter
    log(request.scope["path"], error)
    return JSONResponse({"detail": answer.detail}, answer.status)


class _SessionSupport:
    """Closes a request's sessions when its response is sent, and WebSockets when an error ends them.

    A dependency with `yield` cannot do this: FastAPI before 0.118 leaves it before it sends the response. Exception
    handlers cannot either: their response does not reach a WebSocket.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        async with AsyncExitStack() as stack:
            scope[OUTER_FACTORY] = factory_in(scope)
            token = _exchange.set(Exchange(stack, receive, scope["path"]))
            try:
                if scope["type"] == "websocket":
                    await self._serve_websocket(scope, receive, send)
                else:
                    await self._app(scope, receive, send)
            finally:
                _exchange.reset(token)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted = ended = False

        async def receiving() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or message["type"] == "websocket.disconnect"
            return message

        async def sending(message: Message) -> None:
            nonlocal accepted, ended
            accepted = accepted or message["type"] == "websocket.accept"
            ended = ended or message["type"] in ("websocket.close", "websocket.http.response.start")
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        except Exception as error:
            answer = answer_to(error)
            if not ended:
                if not accepted:
                    # A browser refuses a connection that does not choose one of the subprotocols that it asked for.
                    chosen = next(iter(scope.get("subprotocols") or ()), None)
                    await send({"type": "websocket.accept", "subprotocol": chosen})
                reason = answer.detail.encode()[:123].decode(errors="ignore")
                await send({"type": "websocket.close", "code": answer.close_code, "reason": reason})
            if answer is UNEXPECTED:
                raise
            log(scope["path"], error)
