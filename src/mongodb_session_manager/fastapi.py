"""Sessions in a FastAPI application; needs the extra `fastapi`.

    app = FastAPI(lifespan=session_lifespan("mongodb://localhost:27017/support"))
    add_session_support(app)
    app.get("/health")(health)

    @app.post("/sessions/{session_id}/messages")
    async def answer(session: Session, prompt: str) -> Response:
        return await stream(Agent(session_manager=session, callback_handler=None), prompt)

Nothing here blocks the event loop. A client that disconnects in the middle of an answer stops the agent. Everything
that was stored by then stays stored, and the next request of the session continues from there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import anyio.to_thread
from strands import Agent
from strands.types.agent import AgentInput
from strands.types.exceptions import EventLoopException

from . import AsyncMongoDBSessionManager, MongoDBSessionManagerFactory, get_global_factory
from ._managers.global_factory import factory_of_application
from .errors import (
    AgentNotFoundError,
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EncodingError,
    InvalidArgumentError,
    MessageNotFoundError,
    MessageTooLargeError,
    MissingExtraError,
    MongoDBSessionError,
    SessionConflictError,
    SessionExistsError,
    SessionNotFoundError,
    StateTooLargeError,
)

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError(
        "mongodb_session_manager.fastapi needs FastAPI: pip install 'mongodb-session-manager[fastapi]'", name=error.name
    ) from error

__all__ = [
    "Factory",
    "Session",
    "add_session_support",
    "get_factory",
    "health",
    "open_session",
    "session_lifespan",
    "stream",
]

logger = logging.getLogger(__name__)

_STACK = "mongodb_session_manager.sessions"
_FACTORY = "mongodb_session_manager.factory"

_HEALTH_TIMEOUT = 2.0
"""Seconds; load balancers give up on an answer after a few."""

_CHECK_TIMEOUT = 5.0
"""Seconds that an application waits for its database at the start."""


class _Answer(NamedTuple):
    """The answer to a client for an error: what the client can do, nothing about the server or the conversation."""

    status: int
    close_code: int
    detail: str
    """Empty for an argument of the client: the error names the argument and the reason."""


# The status of a refused argument is 422, as for arguments that FastAPI itself refuses. The close codes of a WebSocket
# are 1008 (the client must send another request), 1013 (try again later) and 1011 (an error of the server).
_ANSWERS: dict[type[MongoDBSessionError], _Answer] = {
    SessionConflictError: _Answer(409, 1013, "another request changed the session meanwhile: repeat this one"),
    SessionExistsError: _Answer(409, 1008, "a session of that id exists already"),
    SessionNotFoundError: _Answer(404, 1008, "the session does not exist"),
    AgentNotFoundError: _Answer(404, 1008, "the session holds no such agent"),
    MessageNotFoundError: _Answer(404, 1008, "the agent holds no such message"),
    InvalidArgumentError: _Answer(422, 1008, ""),
    EncodingError: _Answer(422, 1008, "a value cannot be stored"),
    MessageTooLargeError: _Answer(413, 1008, "the message is too large"),
    StateTooLargeError: _Answer(413, 1008, "the session is too large"),
    DatabaseUnavailableError: _Answer(503, 1013, "the database cannot be reached: try again later"),
    DatabaseTimeoutError: _Answer(503, 1013, "the database takes too long: try again later"),
    DatabaseError: _Answer(500, 1011, "the database refused a command"),
    ConfigurationError: _Answer(500, 1011, "the server is not configured correctly"),
}
_FAILED = _Answer(500, 1011, "the request failed")


def session_lifespan(
    *args: Any, check: bool = True, **kwargs: Any
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return a lifespan for `FastAPI(lifespan=...)` that opens the application's factory and closes it at the end.

    In a lifespan of your own:

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with session_lifespan("mongodb://localhost:27017/support")(app):
                yield

    The factory is `app.state.mongodb_session_factory`; `Factory` is the dependency that returns it. Several
    applications of one process have one factory each. While only one application runs, `get_global_factory()` returns
    its factory, unless `initialize_global_factory` made another.

    At the end, writes and notifications under way are awaited and the client is closed.

    Args:
        *args: As for `MongoDBSessionManagerFactory`.
        check: Whether the application refuses to start if the database does not answer within five seconds or refuses
            the credentials. `False` starts it and opens no connection before the first request.
        **kwargs: As for `MongoDBSessionManagerFactory`.

    Raises:
        AccessDeniedError: When the application starts: the database refuses the credentials.
        ConfigurationError: When the application starts: an argument cannot be used.
        DatabaseUnavailableError: When the application starts: no server could be reached within five seconds.
        DatabaseTimeoutError: When the application starts: a server did not answer within five seconds.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # In a thread, because making a client can read files.
        async with await anyio.to_thread.run_sync(partial(MongoDBSessionManagerFactory, *args, **kwargs)) as factory:
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


def add_session_support(app: FastAPI) -> None:
    """Close the sessions that `open_session` opens, stop the agents of `stream`, and answer errors.

    | status | WebSocket | error |
    |---|---|---|
    | 404 | 1008 | `SessionNotFoundError`, `AgentNotFoundError`, `MessageNotFoundError` |
    | 409 | 1013 | `SessionConflictError` |
    | 409 | 1008 | `SessionExistsError` |
    | 413 | 1008 | `MessageTooLargeError`, `StateTooLargeError` |
    | 422 | 1008 | `InvalidArgumentError`, `EncodingError` |
    | 503 | 1013 | `DatabaseUnavailableError`, `DatabaseTimeoutError` |
    | 500 | 1011 | `DatabaseError`, `ConfigurationError`, `AccessDeniedError`: trying again does not help |

    The body is `{"detail": "..."}`, as for FastAPI's own errors. 500 and 503 are logged in one line. All other errors
    are bugs of the application: FastAPI answers 500 and the server logs the traceback. A WebSocket is closed with the
    code and a short reason; one that was not accepted yet is accepted first, because a browser shows no code otherwise.

    After a 503 it is unknown whether the request's messages are stored: closing the session tries once more. If that
    fails too, the error is raised, and the server logs it.

    Call it before the application starts, and for each application that is mounted in another.
    """
    app.add_middleware(_SessionSupport)
    for error in (*_ANSWERS, EventLoopException):
        app.add_exception_handler(error, _answer)


def get_factory(connection: HTTPConnection) -> MongoDBSessionManagerFactory:
    """Return the factory of the application, of the one it is mounted in, or of the process: a dependency.

    Raises:
        FactoryNotInitializedError: There is no factory.
    """
    return _factory_in(connection.scope) or get_global_factory()


Factory = Annotated[MongoDBSessionManagerFactory, Depends(get_factory)]
"""The type of a parameter that is the application's factory."""


async def open_session(session_id: str, connection: HTTPConnection) -> AsyncMongoDBSessionManager:
    """Open the session that the path parameter `session_id` names, from the application's factory: a dependency.

    It is closed when the whole response is sent, including the last part of a stream, or when the client disconnects.

    Raises:
        FactoryNotInitializedError: The application has no `session_lifespan`.
        MongoDBSessionError: The session cannot be opened; see `add_session_support` for the answer.
        RuntimeError: `add_session_support` was not called.
    """
    stack: AsyncExitStack | None = connection.scope.get(_STACK)
    if stack is None:
        raise RuntimeError("nothing would close the session: call add_session_support(app) before the app starts")
    return await stack.enter_async_context(await get_factory(connection).create_session_manager_async(session_id))


Session = Annotated[AsyncMongoDBSessionManager, Depends(open_session)]
"""The type of a parameter that is the session of the path parameter `session_id`."""


async def health(connection: HTTPConnection = None) -> JSONResponse:  # type: ignore[assignment]  # FastAPI passes one
    """Answer 200 if the database of the application's factory answers within two seconds, else 503: an endpoint."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT):
            await (get_global_factory() if connection is None else get_factory(connection)).ping_async()
    except (MongoDBSessionError, TimeoutError) as error:
        logger.warning("error=<%s> | not healthy", str(error) or type(error).__name__)
        return JSONResponse({"status": "unavailable"}, 503)
    return JSONResponse({"status": "ok"})


async def stream(agent: Agent, prompt: AgentInput, *, format: Literal["sse", "text"] = "sse") -> Response:
    """Run an agent and return a response that streams its answer.

    It returns when the model begins to answer. By then the prompt is stored, unless `save_on="invocation"`. An error up
    to then is raised and gets its own status: 404, 409, 413, 422 and 503 are real statuses.

    As `"sse"`, each event has an `id`, counted from 0, and JSON as its `data`:

    | event | data |
    |---|---|
    | `text` | a part of the answer, a string |
    | `tool` | `{"name", "tool_use_id"}` of a tool that the model calls |
    | `done` | `{"stop_reason"}`; the last event |
    | `error` | `{"status", "detail"}` of an error after the first event, in place of `done`; logged if it is 5xx |

    As `"text"`, it is only the text. An error after the first part aborts the connection, so that a client can
    distinguish an incomplete answer from a complete one.

    A client that disconnects stops the agent, even before the model begins to answer.

    Args:
        agent: An agent that is not used elsewhere. Its session must stay open until the response is sent, like a
            `Session`.
        prompt: As for `Agent.stream_async`.
        format: `"sse"` for Server-Sent Events, `"text"` for plain text.

    Raises:
        MongoDBSessionError: The prompt could not be stored; see `add_session_support` for the answer.
        RuntimeError: `add_session_support` was not called.
        ValueError: `format` is unknown.
        Exception: An error of the model before it began to answer.
    """
    if format not in ("sse", "text"):
        raise ValueError(f"format must be 'sse' or 'text', got {format!r}")
    exchange = _exchange.get()
    if exchange is None:
        raise RuntimeError("nothing would stop the agent: call add_session_support(app) before the app starts")
    turn = _Turn(agent, prompt, exchange.path)
    exchange.stack.push_async_callback(turn.stop)
    if not await turn.begins(exchange.receive):
        return Response(status_code=499)  # nothing reads it
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each part on at once
    if format == "sse":
        return StreamingResponse(turn.as_sse(), headers=headers, media_type="text/event-stream")
    return StreamingResponse(turn.as_text(), headers=headers, media_type="text/plain")


class _Event(NamedTuple):
    name: Literal["text", "tool", "done", "error"]
    data: Any


class _Turn:
    """An agent's invocation in a task of its own.

    All events come from one task, because the agent resets its context variables at its end. The endpoint and the
    response, which take the events, run in different tasks.
    """

    def __init__(self, agent: Agent, prompt: AgentInput, path: str) -> None:
        self._path = path
        self._begun = asyncio.Event()
        self._raised = False
        # No buffer: a client that reads slowly slows the agent down.
        self._send, self._receive = anyio.create_memory_object_stream[_Event](0)
        self._task = asyncio.create_task(self._run(agent, prompt))

    async def _run(self, agent: Agent, prompt: AgentInput) -> None:
        async with self._send, aclosing(agent.stream_async(prompt)) as events:  # type: ignore[type-var]
            async for event in events:
                if "event" in event:  # the model begins to answer
                    self._begun.set()
                for shown in _shown(event):
                    self._begun.set()
                    await self._send.send(shown)

    async def begins(self, receive: Receive) -> bool:
        """Return whether the agent begins to answer before the client disconnects.

        Raises:
            Exception: The agent failed before.
        """
        others = [asyncio.create_task(self._begun.wait()), asyncio.create_task(_disconnected(receive))]
        try:
            await asyncio.wait([self._task, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in others:
                task.cancel()
        await asyncio.wait(others)
        if self._task.done():
            self._raise_failure()
        return self._begun.is_set() or self._task.done()

    def _raise_failure(self) -> None:
        self._raised = True
        self._task.result()

    async def _events(self) -> AsyncIterator[_Event]:
        async for event in self._receive:
            yield event
        await asyncio.wait([self._task])
        self._raise_failure()

    async def as_sse(self) -> AsyncIterator[str]:
        """Yield the events as Server-Sent Events, an error as the last."""
        numbers = itertools.count()
        try:
            async for event in self._events():
                yield _framed(next(numbers), event)
        except Exception as error:
            answer = _answer_to(error)
            _log(self._path, error)
            yield _framed(next(numbers), _Event("error", {"status": answer.status, "detail": answer.detail}))

    async def as_text(self) -> AsyncIterator[bytes]:
        """Yield the text of the answer.

        Raises:
            Exception: The agent failed.
        """
        async for event in self._events():
            if event.name == "text":
                yield event.data.encode("utf-8", "replace")  # a model can send half of a surrogate pair

    async def stop(self) -> None:
        """Stop the agent if it still runs, and wait for its end."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._receive.close()
        if not self._raised and not self._task.cancelled() and (error := self._task.exception()) is not None:
            _log(self._path, error)


def _shown(event: Mapping[str, Any]) -> Iterator[_Event]:
    """Yield the client's events for an event of Strands."""
    if "data" in event:
        yield _Event("text", event["data"])
    elif "message" in event:
        for block in event["message"]["content"]:
            if use := block.get("toolUse"):
                yield _Event("tool", {"name": use["name"], "tool_use_id": use["toolUseId"]})
    elif "result" in event:
        yield _Event("done", {"stop_reason": event["result"].stop_reason})


def _framed(number: int, event: _Event) -> str:
    """Return an event in the format of Server-Sent Events; JSON escapes line breaks and non-ASCII characters."""
    return f"id: {number}\nevent: {event.name}\ndata: {json.dumps(event.data)}\n\n"


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class _Exchange:
    """The current request, for `stream`, which has no parameter for it."""

    stack: AsyncExitStack
    receive: Receive
    path: str


_exchange: ContextVar[_Exchange | None] = ContextVar("mongodb_session_manager_exchange", default=None)


def _factory_in(scope: Scope) -> MongoDBSessionManagerFactory | None:
    """Return the factory of a request's application, else of the application that it is mounted in."""
    factory: MongoDBSessionManagerFactory | None = getattr(scope["app"].state, "mongodb_session_factory", None)
    return factory or scope.get(_FACTORY)


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
            scope[_STACK] = stack
            scope[_FACTORY] = _factory_in(scope)
            token = _exchange.set(_Exchange(stack, receive, scope["path"]))
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
            answer = _answer_to(error)
            if not ended:
                if not accepted:
                    # A browser refuses a connection that does not choose one of the subprotocols that it asked for.
                    chosen = next(iter(scope.get("subprotocols") or ()), None)
                    await send({"type": "websocket.accept", "subprotocol": chosen})
                reason = answer.detail.encode()[:123].decode(errors="ignore")
                await send({"type": "websocket.close", "code": answer.close_code, "reason": reason})
            if answer is _FAILED:
                raise
            _log(scope["path"], error)


def _original(error: BaseException) -> BaseException:
    """Return the error that Strands wrapped in a later cycle of an invocation, else the error itself."""
    while isinstance(error, EventLoopException):
        error = error.original_exception
    return error


def _answer_to(error: BaseException) -> _Answer:
    error = _original(error)
    answer = next((answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)), _FAILED)
    return answer if answer.detail else answer._replace(detail=str(error))


def _log(path: str, error: BaseException) -> None:
    """Log an error that the client did not cause: a database error in one line, a bug with its traceback."""
    answer = _answer_to(error)
    if answer is _FAILED:
        logger.error("path=<%r> | the request failed", path, exc_info=error)
    elif answer.status >= 500:
        level = logging.WARNING if answer.status == 503 else logging.ERROR
        logger.log(level, "path=<%r>, error=<%s> | answered %d", path, _original(error), answer.status)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    answer = _answer_to(error)
    if answer is _FAILED or request.scope["type"] == "websocket":
        raise error  # the first for FastAPI's own 500, the second for _SessionSupport
    _log(request.scope["path"], error)
    return JSONResponse({"detail": answer.detail}, answer.status)
