"""Streamed answers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Literal, NamedTuple

import anyio
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive
from strands import Agent
from strands.types.agent import AgentInput

from ._answers import answer_to, log
from ._exchange import current_exchange


async def stream(agent: Agent, prompt: AgentInput, *, format: Literal["sse", "text"] = "sse") -> Response:
    """Run an agent and return a response that streams its answer.

    It returns when the model begins to answer. By then the prompt is stored with `save_on="message"`, the default. An
    earlier error is raised, so the response has the status of the error: 404, 409 (busy: with `Retry-After`), 413, 422
    or 503.

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
    exchange = current_exchange("stop the agent")
    turn = _Turn(agent, prompt, exchange.path)
    exchange.stack.push_async_callback(turn.stop)
    if not await turn.begins(exchange.inbox.receive):
        return Response(status_code=499)  # nothing reads it
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each part on at once
    if format == "sse":
        return StreamingResponse(turn.as_sse(), headers=headers, media_type="text/event-stream")
    return StreamingResponse(turn.as_text(), headers=headers, media_type="text/plain")


class _Event(NamedTuple):
    name: Literal["text", "tool", "done", "error"]
    data: Any


class _Turn:
    """An agent's invocation in its own task.

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
        numbers = itertools.count()
        try:
            async for event in self._events():
                yield _framed(next(numbers), event)
        except Exception as error:
            answer = answer_to(error)
            log(self._path, error)
            yield _framed(next(numbers), _Event("error", {"status": answer.status, "detail": answer.detail}))

    async def as_text(self) -> AsyncIterator[bytes]:
        async for event in self._events():
            if event.name == "text":
                yield event.data.encode("utf-8", "replace")  # a model can send a lone surrogate

    async def stop(self) -> None:
        """Stop the agent if it still runs, and wait for its end."""
        self._task.cancel()
        self._receive.close()  # first: an agent that goes on in spite of the cancellation must not wait for a receiver
        await asyncio.wait([self._task])
        if self._raised or self._task.cancelled():
            return
        error = self._task.exception()
        if error is not None and not isinstance(error, anyio.BrokenResourceError):
            log(self._path, error)


def _shown(event: Mapping[str, Any]) -> Iterator[_Event]:
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
    while (await receive())["type"] != "http.disconnect":
        pass
