"""`add_session_support`: closes sessions after responses, and handles errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from strands.types.exceptions import EventLoopException

from ._answers import ANSWERS, UNEXPECTED, answer_to, log
from ._exchange import Exchange, Inbox, exchanges
from ._factory import OUTER_FACTORY, factory_in
from ._routes import check_routes


def add_session_support(app: FastAPI) -> None:
    """Close the sessions that dependencies open, stop the agents of `stream`, and handle errors.

    | status | WebSocket | error |
    |---|---|---|
    | 404 | 1008 | `SessionNotFoundError`, `AgentNotFoundError`, `MessageNotFoundError` |
    | 409 | 1013 | `SessionConflictError`, `SessionBusyError` |
    | 409 | 1008 | `SessionExistsError` |
    | 413 | 1008 | `MessageTooLargeError`, `StateTooLargeError` |
    | 422 | 1008 | `InvalidArgumentError`, `EncodingError` |
    | 503 | 1013 | `DatabaseUnavailableError`, `DatabaseTimeoutError` |
    | 500 | 1011 | `DatabaseError`, `ConfigurationError`, `AccessDeniedError`: repeating the request does not help |

    The body is `{"detail": "..."}`, as for FastAPI's own errors; `responses` documents it in OpenAPI. Errors with the
    code 1013 have the header `Retry-After: 1`. 500 and 503 are logged in one line. All other errors are bugs of the
    application: FastAPI answers 500 and the server logs the traceback. A WebSocket is closed with the code and a short
    reason; one that is not accepted yet is accepted first, because otherwise a browser shows no code.

    After a 503 it is unknown whether the request's messages are stored: closing the session retries once. If that fails
    too, the error is raised, and the server logs it.

    Call it before the application starts, and for each application that is mounted in another. The application then
    does not start if a route that opens a session lacks its path parameter (`ConfigurationError`).
    """
    app.add_middleware(_SessionSupport)
    for error in (*ANSWERS, EventLoopException):
        app.add_exception_handler(error, _answer)
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def checked(started: Any) -> AsyncIterator[Any]:
        check_routes(app)
        async with lifespan(started) as state:
            yield state

    app.router.lifespan_context = checked


async def _answer(request: Request, error: Exception) -> JSONResponse:
    answer = answer_to(error)
    if answer is UNEXPECTED or request.scope["type"] == "websocket":
        raise error  # FastAPI answers the former with its own 500, _SessionSupport the latter
    log(request.scope["path"], error)
    return JSONResponse({"detail": answer.detail}, answer.status, answer.headers)


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
        is_websocket, inbox = scope["type"] == "websocket", Inbox(receive)
        async with AsyncExitStack() as stack:
            stack.callback(inbox.close)
            scope[OUTER_FACTORY] = factory_in(scope)
            token = exchanges.set(Exchange(stack, inbox, scope["path"], is_websocket=is_websocket))
            try:
                if is_websocket:
                    await self._serve_websocket(scope, inbox, send)
                else:
                    await self._app(scope, inbox.receive, send)
            finally:
                exchanges.reset(token)

    async def _serve_websocket(self, scope: Scope, inbox: Inbox, send: Send) -> None:
        accepted = ended = False

        async def sending(message: Message) -> None:
            nonlocal accepted, ended
            accepted = accepted or message["type"] == "websocket.accept"
            ended = ended or message["type"] in ("websocket.close", "websocket.http.response.start")
            await send(message)

        try:
            await self._app(scope, inbox.receive, sending)
        except Exception as error:
            if inbox.is_disconnected and isinstance(error, WebSocketDisconnect):
                return  # the client has disconnected, which is no error
            answer = answer_to(error)
            if not (ended or inbox.is_disconnected):
                if not accepted:
                    # A browser refuses a connection that does not choose one of the subprotocols that it asked for.
                    chosen = next(iter(scope.get("subprotocols") or ()), None)
                    await send({"type": "websocket.accept", "subprotocol": chosen})
                reason = answer.detail.encode()[:123].decode(errors="ignore")
                await send({"type": "websocket.close", "code": answer.close_code, "reason": reason})
            if answer is UNEXPECTED:
                raise
            log(scope["path"], error)
