"""A chat in the browser: answers stream, and conversations survive reloads, lost connections and server restarts.

install: pip install 'mongodb-session-manager[embedded,fastapi]' 'fastapi>=0.135' uvicorn
run:     python example_fastapi_streaming.py
expect:  A chat at http://127.0.0.1:8000. Tell it your name, reload the page or restart the server, ask for your name,
         edit a question, have it answered again, branch off from an answer, rate it, delete the session.

The page is `chat.html`, in the same directory as this file. The data stays in the directory `chat-data`. To use your
own server, set the environment variable MONGODB_URI.

A running answer does not depend on the request that started it. If you close the tab, the answer is still completed;
if the connection is lost, the page continues where it stopped. A message is accepted once it is stored. If the
database is unreachable, the page says so within seconds and keeps your text. Nobody logs in: a random cookie is the
user, so each browser has its own sessions. To authenticate users, replace `current_user` as `example_fastapi_users.py`
does.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import anyio
import uvicorn
from anyio.abc import TaskGroup
from fastapi import Cookie, Depends, FastAPI, Header, HTTPException
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field
from strands import Agent
from strands.hooks import BeforeModelCallEvent
from strands.types.content import Message, Messages
from strands.types.exceptions import EventLoopException
from strands.types.session import SessionMessage

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    SessionSummary,
)
from mongodb_session_manager.demo import ScriptedModel, demo_server
from mongodb_session_manager.fastapi import (
    Factory,
    add_session_support,
    live,
    ready,
    responses,
    session_lifespan,
    sessions_router,
)

logger = logging.getLogger(__name__)

AGENT_ID = "assistant"
LINGER = 10.0  # seconds for which a late follower can still read how an answer ended
TIMEOUTS: dict[str, Any] = {"serverSelectionTimeoutMS": 2_000, "connectTimeoutMS": 2_000, "socketTimeoutMS": 4_000}
SYSTEM_PROMPT = "Be brief. When the user tells you their name, store it with manage_metadata under the key name."


# Requests.


class Prompt(BaseModel):
    """A message, or `None` to answer the last message again.

    `after` is the id of an earlier message; the messages after it are removed first.
    """

    text: Annotated[str, Field(min_length=1, max_length=100_000)] | None
    after: Annotated[int, Field(ge=-1)] | None = None


async def current_user(user: Annotated[str | None, Cookie()] = None) -> str:
    """Return the id of the user who has sent the request."""
    if not user:
        raise HTTPException(401, "Reload the page: it sets the cookie of a user.")
    return user


User = Annotated[str, Depends(current_user)]


# Running answers.


class Turn:
    """A running answer. Followers can disconnect and continue later."""

    def __init__(self) -> None:
        self.id = uuid4().hex
        self.agent: Agent | None = None
        self._events: list[ServerSentEvent] = []
        self._shown = 0
        self._news = anyio.Event()
        self.over = False
        self.accepted = anyio.Event()  # the message is stored, or refused
        self.refusal: MongoDBSessionError | None = None

    def fail(self, error: Exception) -> None:
        """Refuse the message if it is not stored yet, else report the failure to the followers."""
        if isinstance(error, EventLoopException):
            error = error.original_exception
        if isinstance(error, MongoDBSessionError) and not self.accepted.is_set():
            self.refusal = error
        elif isinstance(error, DatabaseUnavailableError | DatabaseTimeoutError):
            self.publish("failed", "The answer could not be stored: the database is unreachable.")
        else:
            self.publish("failed", f"The answer failed: {type(error).__name__}.")
        self.end()

    def end(self) -> None:
        """Report the end of the turn."""
        if not self.over:
            self.publish("done", {})
        self.accepted.set()

    def publish(self, event: str, data: Any) -> None:
        """Send an event to the followers."""
        self._events.append(ServerSentEvent(event=event, data=data, id=f"{self.id}/{len(self._events)}"))
        if event == "message":
            self._shown = len(self._events)  # a new follower reads it from the stored conversation
        self.over = event == "done"
        self._news.set()
        self._news = anyio.Event()

    async def follow(self, last_seen: str | None) -> AsyncIterator[ServerSentEvent]:
        """Yield the events after that event id, past and future ones, until the answer is over."""
        turn, _, number = (last_seen or "").partition("/")
        position = int(number) + 1 if turn == self.id else self._shown
        while True:
            for event in self._events[position:]:
                yield event
                position += 1
            if self.over:
                return
            if position == len(self._events):
                await self._news.wait()


class Chat:
    """The running answers of this process, by user and session."""

    def __init__(self) -> None:
        self._factory: MongoDBSessionManagerFactory
        self._tasks: TaskGroup
        self.turns: dict[tuple[str, str], Turn] = {}

    @asynccontextmanager
    async def running(self, factory: MongoDBSessionManagerFactory) -> AsyncIterator[None]:
        """Own the tasks that write answers. Unfinished answers are cancelled at the end, and can be requested again."""
        self._factory = factory
        async with anyio.create_task_group() as self._tasks:
            yield
            self._tasks.cancel_scope.cancel()

    def is_answering(self, user: str, session_id: str) -> bool:
        """Return whether an answer of the session is running."""
        turn = self.turns.get((user, session_id))
        return turn is not None and not turn.over

    async def begin(self, user: str, session_id: str, prompt: Prompt) -> None:
        """Store a message and start to answer it."""
        if self.is_answering(user, session_id):
            raise HTTPException(409, "The last message is being answered.")
        self.turns[user, session_id] = turn = Turn()
        self._tasks.start_soon(self._answer, user, session_id, prompt, turn)
        await turn.accepted.wait()
        if turn.refusal is not None:
            raise turn.refusal

    async def _answer(self, user: str, session_id: str, prompt: Prompt, turn: Turn) -> None:
        try:
            if prompt.after is not None:
                await self._factory.rewind_session_async(session_id, {AGENT_ID: prompt.after}, owner=user)
            title = prompt.text and prompt.text[:80]  # of a new session
            must_exist = prompt.text is None
            async with self._factory.create_session_manager_async(
                session_id, owner=user, title=title, must_exist=must_exist
            ) as session:
                try:
                    await self._run(session, user, prompt.text, turn)
                except Exception as error:
                    logger.exception("session_id=<%r> | the answer failed", session_id)
                    turn.fail(error)  # before the session closes, which retries to store and waits for the database
        except Exception as error:
            if not turn.over:
                turn.fail(error)
            logger.warning("session_id=<%r>, error=<%s> | not stored", session_id, error)
        finally:
            turn.end()
        await anyio.sleep(LINGER)
        if self.turns[user, session_id] is turn:
            del self.turns[user, session_id]

    async def _run(self, session: AsyncMongoDBSessionManager, user: str, prompt: str | None, turn: Turn) -> None:
        turn.agent = Agent(
            # In place of ScriptedModel, any Strands model: BedrockModel(), OpenAIModel(...), AnthropicModel(...), ...
            model=ScriptedModel([answer] * 3, delay=0.03),
            agent_id=AGENT_ID,
            system_prompt=SYSTEM_PROMPT,
            tools=[session.get_metadata_tool(allowed_keys=["name"])],
            session_manager=session,
            callback_handler=None,
        )
        turn.agent.add_hook(lambda _: turn.accepted.set(), BeforeModelCallEvent)  # the message is stored by then
        async for event in turn.agent.stream_async(prompt):
            if "data" in event:
                turn.publish("token", event["data"])
            elif "message" in event:
                if shown := shown_of(event["message"]):
                    turn.publish("message", shown)
                turn.publish("session", await self._facts(session.session_id, user))
        turn.publish("session", await self._facts(session.session_id, user))

    async def _facts(self, session_id: str, user: str) -> dict[str, Any]:
        return facts(await self._factory.get_session_summary_async(session_id, owner=user))


# Responses.


def shown_of(message: Message) -> dict[str, Any] | None:
    """Return a message as the page shows it, or `None` if the page hides it, like the result of a tool."""
    text = "".join(block.get("text", "") for block in message["content"])
    tools = [block["toolUse"]["name"] for block in message["content"] if "toolUse" in block]
    return {"role": message["role"], "text": text, "tools": tools} if text or tools else None


def rating_of(message: SessionMessage, feedback: dict[str, Any] | None) -> str | None:
    """Return the rating of a message; feedback that is older was given to a removed message with the same id."""
    if feedback is None or feedback["created_at"] < datetime.fromisoformat(message.created_at):
        return None
    return feedback.get("rating")


def facts(session: SessionSummary) -> dict[str, Any]:
    """Return the title, the metadata and the usage of a session, as the page shows them."""
    usage = {name: session.usage[f"{name}Tokens"] for name in ("input", "output", "total")}
    return {"title": session.title, "metadata": session.metadata, "usage": usage}


def conversation(stored: list[SessionMessage], feedbacks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the messages of a session with their ratings, as the page shows them."""
    ratings = {entry.get("message_id"): entry for entry in feedbacks}
    messages = [
        {"id": message.message_id, "rating": rating_of(message, ratings.get(message.message_id)), **shown}
        for message in stored
        if (shown := shown_of(message.to_message()))
    ]
    unanswered = bool(messages) and (messages[-1]["role"] == "user" or not messages[-1]["text"])
    return {"messages": messages, "unanswered": unanswered}


def create_app(connection_string: str) -> FastAPI:
    """Return the application."""
    chat = Chat()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sessions = session_lifespan(connection_string, application_name="chat", **TIMEOUTS)
        async with sessions(app), chat.running(app.state.mongodb_session_factory):
            yield

    app = FastAPI(title="Chat", lifespan=lifespan)
    add_session_support(app)
    app.get("/live")(live)
    app.get("/ready")(ready)
    app.include_router(sessions_router(owner=current_user, prefix="/api/sessions"))

    @app.get("/", include_in_schema=False)
    async def page(user: Annotated[str | None, Cookie()] = None) -> FileResponse:
        response = FileResponse(Path(__file__).with_name("chat.html"), media_type="text/html")
        response.set_cookie("user", user or uuid4().hex, max_age=365 * 24 * 3600, httponly=True, samesite="lax")
        return response

    @app.get("/api/chats/{session_id}", responses=responses)
    async def show(session_id: str, user: User, factory: Factory) -> dict[str, Any]:
        answering = chat.is_answering(user, session_id)
        session = await factory.get_session_summary_async(session_id, owner=user)
        stored = await factory.list_messages_async(session_id, AGENT_ID, owner=user) if session.agents else []
        feedbacks = await factory.get_feedbacks_async(session_id, owner=user)
        return {"answering": answering, **conversation(stored, feedbacks), **facts(session)}

    @app.post("/api/chats/{session_id}/messages", status_code=202, responses=responses)
    async def say(session_id: str, user: User, prompt: Prompt) -> dict[str, str]:
        await chat.begin(user, session_id, prompt)
        return {"session_id": session_id}

    @app.get("/api/chats/{session_id}/events", response_class=EventSourceResponse)
    async def events(
        session_id: str, user: User, last_event_id: Annotated[str | None, Header()] = None
    ) -> AsyncIterator[ServerSentEvent]:
        if (turn := chat.turns.get((user, session_id))) is None:
            yield ServerSentEvent(event="done", data={})
        else:
            async for event in turn.follow(last_event_id):
                yield event

    @app.post("/api/chats/{session_id}/stop", status_code=204)
    async def stop(session_id: str, user: User) -> None:
        if (turn := chat.turns.get((user, session_id))) is not None and turn.agent is not None:
            turn.agent.cancel()

    return app


# The model.


def answer(messages: Messages) -> Any:
    """Answer like a model that stores the user's name in the session's metadata."""
    last = messages[-1]["content"]
    said = " ".join(block["text"] for block in last if "text" in block)
    words = said.replace(".", " ").replace(",", " ").split()
    if "fail" in words:
        return ConnectionError("the model cannot be reached")
    if any("toolResult" in block for block in last):
        return "Nice to meet you. I keep your name with the session, so that you can see it beside this conversation."
    for before in ("is", "me"):
        if ("my name is" in said.lower() or "call me" in said.lower()) and before in words[:-1]:
            name = words[words.index(before) + 1]
            return {"tool": "manage_metadata", "input": {"action": "update", "metadata": {"name": name}}}
    if "story" in words:
        return "Once upon a time there was a message. " + "It was stored before anyone spoke again. " * 8 + "The end."
    return None  # the default answer of ScriptedModel


def main() -> None:
    """Serve the chat until Ctrl+C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets your phone in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app = create_app(demo_server("chat-data"))
    print(f"http://{options.host}:{options.port}", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
