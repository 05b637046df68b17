"""The current request: the messages of its client, and the sessions to close after the response."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from contextvars import ContextVar
from typing import NoReturn, TypeVar

import anyio
from fastapi import HTTPException
from starlette.types import Message, Receive
from starlette.websockets import WebSocketDisconnect

T = TypeVar("T")


class Inbox:
    """The messages that a server sends to the application during a request.

    Watching for the disconnection of the client reads messages ahead. They are kept for `receive`, so that the endpoint
    gets the complete body. A read that has begun is not cancelled during the request, because that could lose a
    message.
    """

    def __init__(self, receive: Receive) -> None:
        self.is_disconnected = False
        self._receive = receive
        self._kept: deque[asyncio.Future[Message]] = deque()

    async def receive(self) -> Message:
        """Return the next message."""
        if not self._kept:
            return await self._read()
        message = self._kept.popleft()
        try:
            if not message.done():
                await asyncio.wait([message])
        except asyncio.CancelledError:
            self._kept.appendleft(message)
            raise
        return message.result()

    async def _read(self) -> Message:
        message = await self._receive()
        self.is_disconnected = self.is_disconnected or message["type"] in ("http.disconnect", "websocket.disconnect")
        return message

    async def disconnection(self) -> None:
        """Wait until the client disconnects, or forever if the endpoint must first read other messages.

        These are the rest of a body, and what an accepted WebSocket receives: memory must not fill with them.
        """
        position = 0
        while not self.is_disconnected:
            if position == len(self._kept):
                self._kept.append(asyncio.ensure_future(self._read()))
            await asyncio.wait([self._kept[position]])
            message = self._kept[position].result()
            if message.get("more_body") or message["type"] == "websocket.receive":
                await asyncio.Event().wait()
            position += 1

    def close(self) -> None:
        """Cancel pending reads."""
        for message in self._kept:
            message.cancel()


class Exchange:
    """A request that `add_session_support` serves; the stack is closed after the response.

    Attributes:
        stack: The sessions and agents of the request.
        inbox: The messages of the client.
        path: The path, for log lines.
    """

    def __init__(self, stack: AsyncExitStack, inbox: Inbox, path: str, *, is_websocket: bool) -> None:
        self.stack, self.inbox, self.path = stack, inbox, path
        self._is_websocket = is_websocket

    async def enter(self, session: AbstractAsyncContextManager[T]) -> T:
        """Open a session until the end of the response; cancel the opening if the client disconnects."""
        with anyio.CancelScope() as scope:
            watch = asyncio.create_task(self._cancel_on_disconnection(scope))
            try:
                return await self.stack.enter_async_context(session)
            finally:
                watch.cancel()
        self._end()

    async def _cancel_on_disconnection(self, scope: anyio.CancelScope) -> None:
        await self.inbox.disconnection()
        scope.cancel()

    def _end(self) -> NoReturn:
        """End the endpoint after the client has disconnected; the response is not read."""
        if self._is_websocket:
            raise WebSocketDisconnect(1006)
        raise HTTPException(499, "the client has disconnected")


# A context variable, because `stream` takes an agent and not the request.
exchanges: ContextVar[Exchange | None] = ContextVar("mongodb_session_manager_exchange", default=None)


def current_exchange(purpose: str) -> Exchange:
    """Return the current request, or raise `RuntimeError` if `add_session_support` was not called."""
    if (exchange := exchanges.get()) is None:
        raise RuntimeError(f"call add_session_support(app) before the app starts: without it, nothing would {purpose}")
    return exchange
