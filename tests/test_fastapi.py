"""Sessions in a FastAPI application, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import httpx
import pymongo
import pytest
from blockbuster import BlockBuster
from fastapi import Depends, FastAPI, HTTPException, Response, WebSocket
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.websockets import WebSocketDisconnect
from strands import tool
from strands.hooks import AfterInvocationEvent
from strands.tools.executors import SequentialToolExecutor

import interpreter
from fix_fastapi import serving
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    FactoryNotInitializedError,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    SessionClosedError,
    SessionConflictError,
    SessionExistsError,
    SessionNotFoundError,
    close_global_factory,
    errors,
    get_global_factory,
    initialize_global_factory,
)
from mongodb_session_manager.fastapi import (
    Factory,
    Session,
    add_session_support,
    health,
    live,
    open_session,
    ready,
    session_dependency,
    session_lifespan,
    stream,
)
from proxy import Proxy
from support import agent, eventually, sampled, texts

Stored = pymongo.collection.Collection[dict[str, Any]]

NOBODY = "mongodb://ada:hunter2@127.0.0.1:1"


@pytest.fixture(autouse=True)
def agents_may_look_for_tools(blocking_calls_are_errors: BlockBuster) -> None:
    """Let Strands look for its directory of tools when an endpoint makes an agent, below what closes the session."""
    for call in ("os.getcwd", "os.stat"):
        blocking_calls_are_errors.functions[call].can_block_in("strands/tools/registry.py", "get_tools_dirs")


@pytest.fixture(autouse=True)
def no_factory_is_left() -> Iterator[None]:
    yield
    close_global_factory()


OPENED: Any = Depends(open_session)


class Prompt(BaseModel):
    """What a user says, and the seconds that the model takes for each part of its answer."""

    text: str
    delay: float = 0.0


class Application:
    """A FastAPI application with a lifespan or without one, whose sessions `opened` opens.

    Attributes:
        sessions: The managers that its requests were given, oldest first.
        before_answering: Called between the restoring of an agent and its turn.
        before_responding: Called when a streamed response was built and is not sent yet.
        script: What the agents say.
        options: Of the agents that stream.
        agents: The agents that streamed.
        ended: Whether the session of each was open when its turn ended.
    """

    def __init__(self, lifespan: Any = None, opened: Any = OPENED) -> None:
        self.app = FastAPI(lifespan=lifespan)
        self.begin()
        add_session_support(self.app)
        self.app.get("/health")(health)
        self.app.get("/live")(live)
        self.app.get("/ready")(ready)

        @self.app.post("/sessions/{session_id}/messages")
        async def answer(prompt: Prompt, session: AsyncMongoDBSessionManager = opened) -> dict[str, str]:
            self.sessions.append(session)
            asked = agent(session, *self.script)
            await asyncio.to_thread(self.before_answering)
            return {"answer": str(await asked.invoke_async(prompt.text)).strip(), "session": repr(session)}

        async def answer_in_parts(session: AsyncMongoDBSessionManager, prompt: Prompt, format: Any) -> Response:
            self.sessions.append(session)
            asked = agent(session, *self.script, **self.options)
            asked.model.delay = prompt.delay
            asked.add_hook(lambda _: self.ended.append(repr(session).rpartition(" ")[2]), AfterInvocationEvent)
            self.agents.append(asked)
            await asyncio.to_thread(self.before_answering)
            response = await stream(asked, prompt.text, format=format)
            self.before_responding()
            return response

        @self.app.post("/sessions/{session_id}/sse")
        async def sse(prompt: Prompt, session: AsyncMongoDBSessionManager = opened) -> Response:
            return await answer_in_parts(session, prompt, "sse")

        @self.app.post("/sessions/{session_id}/text")
        async def plain(prompt: Prompt, session: AsyncMongoDBSessionManager = opened) -> Response:
            return await answer_in_parts(session, prompt, "text")

    def begin(self) -> None:
        """Forget what earlier tests have set, and their sessions."""
        self.sessions: list[AsyncMongoDBSessionManager] = []
        self.before_answering: Callable[[], object] = lambda: None
        self.before_responding: Callable[[], object] = lambda: None
        self.script: list[Any] = []
        self.options: dict[str, Any] = {}
        self.agents: list[Any] = []
        self.ended: list[str] = []


def connected(*args: Any, **kwargs: Any) -> Application:
    """Return an application with a factory of its own: around `session_lifespan(*args, **kwargs)`."""
    return Application(session_lifespan(*args, **kwargs))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Application, httpx.Client]]:
    application = Application()
    with serving(application.app) as client:
        yield application, client


@pytest.fixture
def application(
    served: tuple[Application, httpx.Client], factory: MongoDBSessionManagerFactory
) -> Iterator[Application]:
    """The application that `client` asks, with the factory of the module."""
    application, client = served
    application.begin()
    application.app.state.mongodb_session_factory = factory
    yield application
    eventually(lambda: all("closed" in repr(session) for session in application.sessions))
    with suppress(httpx.TransportError):  # after a bug of the application, the server closes the connection
        client.get("/live")  # is answered after the server has logged the errors of earlier requests


@pytest.fixture
def client(served: tuple[Application, httpx.Client], application: Application) -> httpx.Client:
    return served[1]


def conversation(stored: Stored, session_id: str = "s") -> list[str]:
    document = stored.find_one({"_id": session_id})
    return [] if document is None else texts(document["agents"]["agent"]["messages"])


def test_methods_of_a_factory_are_endpoints_and_dependencies(server: str, database: str) -> None:
    app = FastAPI()
    with MongoDBSessionManagerFactory(server, database) as factory:
        factory.create_session_manager("s").close()
        app.get("/ready", dependencies=[Depends(factory.ping), Depends(factory.ping_async)])(lambda: "ready")
        app.get("/exists")(factory.session_exists)
        app.get("/exists_async")(factory.session_exists_async)
        app.get("/sessions")(factory.list_sessions)
        with serving(app) as client:
            assert client.get("/ready").json() == "ready"
            assert client.get("/exists?session_id=s").json() is True
            assert client.get("/exists_async?session_id=s").json() is True
            (found,) = client.get("/sessions?limit=1").json()["sessions"]
    assert found["session_id"] == "s"


# Turns.


def test_a_session_goes_on_with_the_next_request(client: httpx.Client, application: Application) -> None:
    client.post("/sessions/s/messages", json={"text": "My name is Ada."})
    answer = client.post("/sessions/s/messages", json={"text": "What is my name?"})
    assert answer.status_code == 200
    assert answer.json()["answer"] == "Your name is Ada."


@pytest.mark.parametrize("path", ["messages", "sse", "text"])
def test_a_session_is_open_until_the_response_is_sent_and_closed_then(
    client: httpx.Client, application: Application, stored: Stored, path: str
) -> None:
    seen: list[str] = []
    application.script = [lambda _: seen.append(repr(application.sessions[0]))]  # what it returns answers for itself
    answer = client.post(f"/sessions/s/{path}", json={"text": "hi"})
    assert answer.status_code == 200
    assert seen == ["<AsyncMongoDBSessionManager session_id='s', open>"]
    (session,) = application.sessions
    eventually(lambda: repr(session) == "<AsyncMongoDBSessionManager session_id='s', closed>")
    assert conversation(stored) == ["hi", "Hello! I have been sent 1 message."]


def test_a_session_is_open_while_the_last_parts_of_an_answer_are_sent(
    client: httpx.Client, application: Application
) -> None:
    application.script = ["one two three four five"]
    with client.stream("POST", "/sessions/s/text", json={"text": "hi", "delay": 0.05}) as answer:
        states = {repr(application.sessions[0]).rpartition(" ")[2] for _ in answer.iter_text()}
    assert states == {"open>"}


# Answers that stream.


def events(text: str) -> list[tuple[str, str, Any]]:
    """Return id, name and data of each Server-Sent Event."""
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


def test_server_sent_events_have_ids_names_and_json(client: httpx.Client, application: Application) -> None:
    @tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return "It rains."

    application.options = {"tools": [weather]}
    application.script = [{"tool": "weather", "input": {"city": "Oslo"}}, "It\nrains:\r\ndata: \u2028 é \ud83d"]
    answer = client.post("/sessions/s/sse", json={"text": "hi"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    told = events(answer.text)
    assert [number for number, _, _ in told] == [str(number) for number in range(len(told))]
    assert [name for _, name, _ in told] == ["tool", *["text"] * (len(told) - 2), "done"]
    assert told[0][2]["name"] == "weather"
    assert told[0][2]["tool_use_id"].startswith("tooluse_")
    assert "".join(data for _, name, data in told if name == "text") == "It\nrains:\r\ndata: \u2028 é \ud83d"
    assert told[-1][2] == {"stop_reason": "end_turn"}


def test_text_that_cannot_be_encoded_does_not_break_a_stream_of_text(
    client: httpx.Client, application: Application
) -> None:
    application.script = ["half of \ud83d a pair"]
    answer = client.post("/sessions/s/text", json={"text": "hi"})
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "half of ? a pair"


def test_an_unknown_format_is_refused_before_anything_is_asked(client: httpx.Client, application: Application) -> None:
    @application.app.post("/sessions/{session_id}/xml")
    async def xml(session: Session) -> Response:
        asked = agent(session)
        with pytest.raises(ValueError, match="format must be 'sse' or 'text', got 'xml'"):
            await stream(asked, "hi", format="xml")  # type: ignore[arg-type]
        return Response(str(len(asked.model.calls)))

    assert client.post("/sessions/s/xml").text == "0"


@pytest.mark.parametrize("format", ["sse", "text"])
@pytest.mark.parametrize("error", [SessionConflictError("x"), ValueError("a secret")], ids=["conflict", "a bug"])
def test_an_error_before_the_model_answers_has_a_status(
    client: httpx.Client, application: Application, error: Exception, format: str
) -> None:
    application.script = [error]
    answer = client.post(f"/sessions/s/{format}", json={"text": "hi"})
    assert answer.status_code == (409 if isinstance(error, SessionConflictError) else 500)
    assert "secret" not in answer.text


LATER: list[tuple[Exception, dict[str, Any]]] = [
    (SessionExistsError("x"), {"status": 409, "detail": "a session with that id already exists"}),
    (SessionNotFoundError("x"), {"status": 404, "detail": "the session does not exist"}),
    (DatabaseUnavailableError("x"), {"status": 503, "detail": "the database is unreachable: try again later"}),
    (DatabaseError("x"), {"status": 500, "detail": "the database refused a command"}),
    (InvalidArgumentError("limit is bad"), {"status": 422, "detail": "limit is bad"}),
    (ValueError("a secret of the model"), {"status": 500, "detail": "the request failed"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "told"), LATER, ids=[type(error).__name__ for error, _ in LATER])
def test_an_error_after_the_first_part_is_the_last_event(
    client: httpx.Client,
    application: Application,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    told: dict[str, Any],
) -> None:
    application.script = [{"tool": "none", "text": "Wait. "}, error]
    answer = client.post("/sessions/s/sse", json={"text": "hi"})
    assert answer.status_code == 200
    shown = events(answer.text)
    assert [name for _, name, _ in shown] == ["text", "tool", "error"]
    assert shown[-1] == ("2", "error", told)
    logged = [record for record in caplog.records if record.name.startswith("mongodb_session_manager.fastapi")]
    assert len(logged) == (told["status"] >= 500)
    assert [record.levelname for record in logged] == ["WARNING" if told["status"] == 503 else "ERROR" for _ in logged]
    assert all("path=<'/sessions/s/sse'>" in record.getMessage() for record in logged)
    assert "secret" not in answer.text


def deletes(stored: Stored) -> Any:
    """Return a tool that deletes the session in which it runs."""

    @tool
    def delete() -> str:
        """Delete the session."""
        stored.delete_one({"_id": "s"})
        return "It is gone."

    return delete


def test_an_error_in_a_later_cycle_of_a_turn_has_its_status(client: httpx.Client, application: Application) -> None:
    application.script = [{"tool": "none"}, SessionConflictError("x")]
    answer = client.post("/sessions/s/messages", json={"text": "hi"})
    assert answer.status_code == 409
    assert answer.json() == {"detail": "another request changed the session concurrently: repeat this one"}


def test_an_error_of_the_database_after_the_first_part_is_the_last_event(
    client: httpx.Client, application: Application, stored: Stored
) -> None:
    application.options = {"tools": [deletes(stored)]}
    application.script = [{"tool": "delete", "text": "Wait. "}, "The end."]
    shown = events(client.post("/sessions/s/sse", json={"text": "hi"}).text)
    assert shown[-1][1:] == ("error", {"status": 404, "detail": "the session does not exist"})


def test_an_error_after_the_first_part_breaks_a_stream_of_text_off(
    client: httpx.Client, application: Application
) -> None:
    application.script = [{"tool": "none", "text": "Wait. "}, SessionConflictError("x")]
    with client.stream("POST", "/sessions/s/text", json={"text": "hi"}) as answer:
        assert answer.status_code == 200
        parts = answer.iter_text()
        assert next(parts) == "Wait. "
        with pytest.raises(httpx.RemoteProtocolError):
            next(parts)
    (session,) = application.sessions
    eventually(lambda: "closed" in repr(session))


@pytest.mark.parametrize("format", ["sse", "text"])
def test_an_answer_comes_token_by_token(client: httpx.Client, format: str) -> None:
    with client.stream("POST", f"/sessions/s/{format}", json={"text": "hi", "delay": 0.01}) as answer:
        parts = list(answer.iter_text())
    assert len(parts) > 3


@pytest.mark.parametrize("format", ["sse", "text"])
def test_a_client_that_goes_away_loses_nothing_that_was_stored(
    client: httpx.Client, application: Application, stored: Stored, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    application.script = ["one two three four five six seven eight nine ten"]
    with client.stream("POST", f"/sessions/s/{format}", json={"text": "My name is Ada.", "delay": 0.05}) as answer:
        assert "one" in next(answer.iter_text())
        # stored before the model was asked
        assert conversation(stored) == ["My name is Ada."]
    (session,) = application.sessions
    eventually(lambda: "closed" in repr(session))
    assert conversation(stored)[:1] == ["My name is Ada."]
    assert application.ended == ["open>"]
    assert len(application.agents[0].messages) < 2

    application.script = []
    answer = client.post("/sessions/s/messages", json={"text": "What is my name?"})
    assert answer.json()["answer"] == "Your name is Ada."
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_goes_away_before_the_first_token_stops_the_agent(
    application: Application, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(application.app) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/sessions/s/sse", json={"text": "hi", "delay": 600}, timeout=1)
        eventually(lambda: application.sessions and "closed" in repr(application.sessions[0]))
        assert application.ended == ["open>"]
        assert conversation(stored) == ["hi"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_agent_that_goes_on_after_its_client_has_gone_is_stopped(
    application: Application, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    @tool
    async def stubborn() -> str:
        """Swallow a cancellation, as `asyncio.wait_for` can do."""
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(600)
        return "done"

    application.script, application.options = [{"tool": "stubborn", "input": {}}, "more"], {"tools": [stubborn]}
    application.options["tool_executor"] = SequentialToolExecutor()
    with serving(application.app) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/sessions/s/sse", json={"text": "hi"}, timeout=1)
        eventually(lambda: application.sessions and "closed" in repr(application.sessions[0]))
        assert application.ended == ["open>"]
    assert [record for record in caplog.records if record.name.startswith("mongodb_session_manager")] == []


def refuse_to_respond() -> None:
    raise HTTPException(418, "it is not sent")


def test_a_response_that_is_never_sent_stops_the_agent(
    client: httpx.Client, application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    application.before_responding = refuse_to_respond
    assert client.post("/sessions/s/sse", json={"text": "hi", "delay": 0.2}).status_code == 418
    eventually(lambda: "closed" in repr(application.sessions[0]))
    assert application.ended == ["open>"]
    assert len(application.agents[0].messages) < 2
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_agent_that_streams_ends_in_the_context_in_which_it_began(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.post("/sessions/s/sse", json={"text": "hi"}).status_code == 200
    assert "Failed to detach context" not in caplog.text


def test_an_application_that_would_not_stop_agents_is_refused(server: str, database: str) -> None:
    app = FastAPI(lifespan=session_lifespan(server, database))

    @app.post("/ask")
    async def ask() -> Response:
        return await stream(agent(None), "hi")

    with TestClient(app) as client, pytest.raises(RuntimeError, match=r"call add_session_support\(app\) before"):
        client.post("/ask")


def test_a_session_is_closed_when_the_endpoint_fails(client: httpx.Client, application: Application) -> None:
    application.script = [ValueError("a bug")]
    assert client.post("/sessions/s/messages", json={"text": "hi"}).status_code == 500
    (session,) = application.sessions
    assert "closed" in repr(session)


# Errors.

EVERY_WAY = pytest.mark.parametrize("path", ["messages", "sse", "text"])
TWO_WAYS = pytest.mark.parametrize("path", sampled(["messages", "sse", "text"], "messages", "sse"))


def test_a_conflict_is_409(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    application = Application(opened=session_dependency(on_busy="conflict"))
    application.app.state.mongodb_session_factory = factory
    with serving(application.app) as client:

        def ask(path: str, text: str, session_id: str) -> httpx.Response:
            return client.post(f"/sessions/{session_id}/{path}", json={"text": text})

        def another_request(session_id: str) -> None:
            application.before_answering = lambda: None
            assert ask("messages", "first", session_id).status_code == 200

        for path in ("messages", "sse", "text"):
            application.before_answering = partial(another_request, path)
            answer = ask(path, "a secret", session_id=path)
            assert answer.status_code == 409, path
            assert answer.json() == {"detail": "another request changed the session concurrently: repeat this one"}
            assert answer.headers["retry-after"] == "1"
            assert conversation(stored, path) == ["first", "Hello! I have been sent 1 message."]
            again = ask("messages", "a secret", session_id=path)
            assert again.json()["answer"] == "Hello! I have been sent 3 messages."


@EVERY_WAY
def test_a_session_that_is_gone_is_404(
    client: httpx.Client, application: Application, stored: Stored, path: str
) -> None:
    application.before_answering = lambda: stored.delete_one({"_id": "s"})
    answer = client.post(f"/sessions/s/{path}", json={"text": "a secret"})
    assert answer.status_code == 404
    assert answer.json() == {"detail": "the session does not exist"}


@EVERY_WAY
def test_a_bad_session_id_is_422(client: httpx.Client, stored: Stored, path: str) -> None:
    answer = client.post(f"/sessions/a%00b/{path}", json={"text": "hi"})
    assert answer.status_code == 422
    assert answer.json() == {"detail": "session_id must not contain a NUL character"}
    assert stored.count_documents({}) == 0


def test_an_agent_that_is_not_there_is_404(client: httpx.Client, application: Application) -> None:
    @application.app.get("/sessions/{session_id}/count")
    async def count(session: Session) -> int:
        return await session.get_message_count("nobody")

    answer = client.get("/sessions/s/count")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "the session has no such agent"}


def test_a_value_that_cannot_be_stored_is_422(client: httpx.Client, application: Application) -> None:
    @application.app.get("/sessions/{session_id}/note")
    async def note(session: Session) -> None:
        await session.update_metadata({"note": object()})

    answer = client.get("/sessions/s/note")
    assert answer.status_code == 422
    assert answer.json() == {"detail": "a value cannot be stored"}


def test_a_message_that_is_too_large_is_413(client: httpx.Client, application: Application) -> None:
    @application.app.post("/sessions/{session_id}/essay/{format}")
    async def essay(session: Session, format: Any) -> Any:
        asked, text = agent(session), "word " * 3_400_000
        return str(await asked.invoke_async(text)) if format == "json" else await stream(asked, text, format=format)

    for format in ("json", "sse"):
        answer = client.post(f"/sessions/s/essay/{format}")
        assert answer.status_code == 413, format
        assert answer.json() == {"detail": "the message is too large"}


@TWO_WAYS
def test_a_database_that_is_away_is_503(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(connected(NOBODY, check=False, serverSelectionTimeoutMS=50).app) as client:
        answer = client.post(f"/sessions/s/{path}", json={"text": "a secret"})
    assert answer.status_code == 503
    assert answer.json() == {"detail": "the database is unreachable: try again later"}
    assert answer.headers["retry-after"] == "1"
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "127.0.0.1:1" in warning.getMessage()
    assert "hunter2" not in caplog.text
    assert "a secret" not in caplog.text


@TWO_WAYS
def test_a_database_that_is_too_slow_is_503(server: str, database: str, path: str) -> None:
    with Proxy(server) as proxy:
        application = connected(proxy.uri, database, socketTimeoutMS=300)
        with serving(application.app) as client:
            assert client.post("/sessions/s/messages", json={"text": "hi"}).status_code == 200
            proxy.freeze()
            answer = client.post(f"/sessions/s/{path}", json={"text": "hi"})
            proxy.thaw()
    assert answer.status_code == 503
    assert answer.json() == {"detail": "the database takes too long: try again later"}


@TWO_WAYS
def test_what_closing_cannot_store_after_a_503_is_logged(
    server: str, database: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    def logged_errors() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.levelno >= logging.ERROR]

    with Proxy(server) as proxy:
        application = connected(proxy.uri, database, socketTimeoutMS=300)
        with serving(application.app) as client:
            application.before_answering = proxy.freeze
            assert client.post(f"/sessions/s/{path}", json={"text": "a secret"}).status_code == 503
            eventually(logged_errors)
            proxy.thaw()
    (error,) = logged_errors()
    assert error.exc_info is not None
    assert isinstance(error.exc_info[1], DatabaseTimeoutError)
    assert "a secret" not in caplog.text


# What each error is answered with, and the code with which it closes a WebSocket; `None`: FastAPI's own 500.
ANSWERS: dict[type[MongoDBSessionError], tuple[int, int, str | None]] = {
    errors.MongoDBSessionError: (500, 1011, None),
    errors.ConfigurationError: (500, 1011, "the server is not configured correctly"),
    errors.ClientTypeError: (500, 1011, "the server is not configured correctly"),
    errors.AccessDeniedError: (500, 1011, "the server is not configured correctly"),
    errors.InvalidArgumentError: (422, 1008, "of this error"),
    errors.EncodingError: (422, 1008, "a value cannot be stored"),
    errors.MessageTooLargeError: (413, 1008, "the message is too large"),
    errors.StateTooLargeError: (413, 1008, "the session is too large"),
    errors.SessionNotFoundError: (404, 1008, "the session does not exist"),
    errors.AgentNotFoundError: (404, 1008, "the session has no such agent"),
    errors.MessageNotFoundError: (404, 1008, "the agent has no such message"),
    errors.SessionExistsError: (409, 1008, "a session with that id already exists"),
    errors.SessionBusyError: (409, 1013, "the session is busy with another request: repeat this one later"),
    errors.SessionConflictError: (409, 1013, "another request changed the session concurrently: repeat this one"),
    errors.SessionClosedError: (500, 1011, None),
    errors.EventLoopError: (500, 1011, None),
    errors.FactoryNotInitializedError: (500, 1011, None),
    errors.EmbeddedServerError: (500, 1011, None),
    errors.MissingExtraError: (500, 1011, None),
    errors.NotificationError: (500, 1011, None),
    errors.DatabaseUnavailableError: (503, 1013, "the database is unreachable: try again later"),
    errors.DatabaseTimeoutError: (503, 1013, "the database takes too long: try again later"),
    errors.DatabaseError: (500, 1011, "the database refused a command"),
    errors.AttachmentError: (500, 1011, "the database refused a command"),
}


async def over_websocket(app: FastAPI, path: str) -> tuple[list[dict[str, Any]], Exception | None]:
    """Connect a WebSocket that asks for a subprotocol; return what the server is told to send and to log."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": path, "query_string": b"", "headers": [], "subprotocols": ["chat"]}
    try:
        await app(scope, receive, send)
    except Exception as error:
        return sent, error
    return sent, None


@pytest.mark.anyio
async def test_how_an_error_closes_a_websocket(caplog: pytest.LogCaptureFixture) -> None:
    app, kinds = FastAPI(), {kind.__name__: kind for kind in ANSWERS}
    add_session_support(app)

    @app.websocket("/before/{name}")
    async def fail_before(socket: WebSocket, name: str) -> None:
        raise kinds[name]("of this error")

    @app.websocket("/after/{name}")
    async def fail_after(socket: WebSocket, name: str) -> None:
        await socket.accept()
        raise kinds[name]("of this error")

    for kind, (status, code, detail) in ANSWERS.items():
        caplog.clear()
        before, after = f"/before/{kind.__name__}", f"/after/{kind.__name__}"
        closed = {"type": "websocket.close", "code": code, "reason": detail or "the request failed"}
        sent, error = await over_websocket(app, before)
        # Accepted first: without that, or without a subprotocol that it asked for, a browser sees no code.
        assert sent == [{"type": "websocket.accept", "subprotocol": "chat"}, closed], kind
        assert type(error) is (type(None) if detail else kind)
        sent, error = await over_websocket(app, after)
        assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"], kind
        assert sent[1] == closed, kind
        paths = [before, after] if status >= 500 and detail else []
        expected = [f"path=<{path!r}>, error=<of this error> | answered {status}" for path in paths]
        assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == expected, kind


@pytest.mark.anyio
async def test_a_reason_is_cut_to_what_a_websocket_can_close_with() -> None:
    app = FastAPI()
    add_session_support(app)

    @app.websocket("/fail")
    async def fail(socket: WebSocket) -> None:
        raise InvalidArgumentError("é" * 100)

    sent, _ = await over_websocket(app, "/fail")
    assert sent[1]["reason"] == "é" * 61


def test_a_websocket_client_sees_the_code(application: Application) -> None:
    websockets = pytest.importorskip("websockets", reason="the extra `dev` brings websockets")
    connect = pytest.importorskip("websockets.sync.client").connect

    @application.app.websocket("/sessions/{session_id}")
    async def talk(socket: WebSocket, session: Session) -> None: ...

    with serving(application.app, ws="websockets-sansio") as client:
        url = f"ws://127.0.0.1:{client.base_url.port}/sessions/a%00b"
        with connect(url) as socket, pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv()
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "session_id must not contain a NUL character")


def test_a_session_behind_a_websocket(application: Application, stored: Stored) -> None:
    @application.app.websocket("/talk/{session_id}")
    async def talk(socket: WebSocket, session: Session) -> None:
        application.sessions.append(session)
        await socket.accept()
        asked = agent(session)
        while True:
            await socket.send_text(str(await asked.invoke_async(await socket.receive_text())).strip())

    with TestClient(application.app) as talking:
        with talking.websocket_connect("/talk/s") as socket:
            socket.send_text("hi")
            assert socket.receive_text() == "Hello! I have been sent 1 message."
            stored.delete_one({"_id": "s"})
            socket.send_text("hi again")
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_text()
        assert (closed.value.code, closed.value.reason) == (1008, "the session does not exist")
        eventually(lambda: "closed" in repr(application.sessions[0]))
        with talking.websocket_connect("/talk/a%00b") as socket, pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert (closed.value.code, closed.value.reason) == (1008, "session_id must not contain a NUL character")


def test_a_websocket_whose_client_left_is_not_closed_again(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    @application.app.websocket("/leave")
    async def leave(socket: WebSocket) -> None:
        await socket.accept()
        with suppress(WebSocketDisconnect):
            await socket.receive_text()
        raise SessionConflictError("x")

    with TestClient(application.app) as talking, talking.websocket_connect("/leave"):
        pass
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def tree(kind: type[MongoDBSessionError]) -> Iterator[type[MongoDBSessionError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from tree(each)


def test_every_error_has_an_answer() -> None:
    assert {kind for kind in tree(MongoDBSessionError) if kind.__module__ == errors.__name__} == ANSWERS.keys()


def test_what_an_error_is_answered_with(
    client: httpx.Client, application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {kind.__name__: kind for kind in ANSWERS}

    @application.app.get("/fail/{name}")
    async def fail(name: str) -> None:
        raise kinds[name]("of this error")

    for kind, (status, code, detail) in ANSWERS.items():
        caplog.clear()
        given = client.get(f"/fail/{kind.__name__}", headers={"Connection": "close"})
        assert given.status_code == status, kind
        assert given.headers.get("retry-after") == ("1" if code == 1013 else None)
        assert given.text == "Internal Server Error" if detail is None else given.json() == {"detail": detail}, kind
        if detail is not None:
            ours = [each for each in caplog.records if each.name.startswith("mongodb_session_manager")]
            logged = [(each.levelname, each.getMessage(), each.exc_info) for each in ours if each.levelno > 20]
            level = {500: "ERROR", 503: "WARNING"}.get(status)
            line = f"path=<'/fail/{kind.__name__}'>, error=<of this error> | answered {status}"
            assert logged == ([] if level is None else [(level, line, None)]), kind


WRONG: dict[str, tuple[Callable[[MongoDBSessionManagerFactory, AsyncMongoDBSessionManager], Any], int]] = {
    "a copy over a session": (lambda factory, _: factory.fork_session_async("s", "s2"), 409),
    "a copy of no session": (lambda factory, _: factory.fork_session_async("none", "new"), 404),
    "a copy up to no message": (lambda factory, _: factory.fork_session_async("s", "new", at_message=99), 404),
    "a copy up to a bad message": (lambda factory, _: factory.fork_session_async("s", "new", at_message="x"), 422),
    "an agent that is not there": (lambda _, session: session.get_message_count("none"), 404),
    "a negative offset": (lambda _, session: session.list_messages("agent", offset=-1), 422),
    "a negative limit": (lambda _, session: session.list_messages("agent", limit=-1), 422),
    "a page of no sessions": (lambda factory, _: factory.list_sessions_async(limit=0), 422),
    "a bad order": (lambda factory, _: factory.list_sessions_async(order="x"), 422),
    "a bad cursor": (lambda factory, _: factory.list_sessions_async(cursor="x"), 422),
    "a bad filter": (lambda factory, _: factory.list_sessions_async(metadata={"$where": "1"}), 422),
    "a bad key": (lambda _, session: session.update_metadata({"$set": 1}), 422),
    "keys that are not a list": (lambda _, session: session.delete_metadata("key"), 422),
    "feedback that is not an object": (lambda _, session: session.add_feedback("good"), 422),
    "an import of anything": (lambda factory, _: factory.import_session_async(["{}"]), 422),
}  # fmt: skip


def test_what_a_client_does_wrong_is_never_500(client: httpx.Client, application: Application) -> None:
    @application.app.post("/sessions/{session_id}/wrong")
    async def do_wrong(session: Session, factory: Factory, what: str) -> None:
        await WRONG[what][0](factory, session)

    for session_id in ("s", "s2"):
        assert client.post(f"/sessions/{session_id}/messages", json={"text": "hi"}).status_code == 200
    for what, (_, status) in WRONG.items():
        answer = client.post("/sessions/s/wrong", params={"what": what})
        assert answer.status_code == status, (what, answer.text)
        assert isinstance(answer.json()["detail"], str)


def test_refused_credentials_are_not_told_to_try_again_later(
    server: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    application = connected(with_credentials(server, "ada", "hunter2"), database, check=False)
    with serving(application.app) as client:
        answer = client.post("/sessions/s/messages", json={"text": "a secret"})
    assert answer.status_code == 500
    assert "again" not in answer.json()["detail"]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelname == "ERROR"
    assert record.exc_info is None
    assert "hunter2" not in caplog.text


def with_credentials(server: str, user: str, password: str) -> str:
    """Return a connection string with other credentials."""
    scheme, _, rest = server.partition("://")
    return f"{scheme}://{user}:{password}@{rest.rpartition('@')[2]}"


def test_an_application_that_would_not_close_sessions_is_refused(server: str, database: str) -> None:
    app = FastAPI(lifespan=session_lifespan(server, database))

    @app.get("/sessions/{session_id}")
    async def show(session: Session) -> None: ...

    async def get() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            await client.get("/sessions/s")

    with pytest.raises(RuntimeError, match=r"call add_session_support\(app\) before the app starts"):
        asyncio.run(get())


# Health.


def test_health(client: httpx.Client) -> None:
    for path in ("live", "ready", "health"):
        answer = client.get(f"/{path}")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"}), path


def test_health_of_a_database_that_does_not_answer(
    server: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    patience: dict[str, Any] = {"socketTimeoutMS": 600_000, "connectTimeoutMS": 600_000}
    with Proxy(server) as proxy, serving(connected(proxy.uri, database, **patience).app) as client:
        assert client.get("/health").status_code == 200
        proxy.freeze()
        answer = client.get("/ready")
        assert client.get("/live").status_code == 200
        proxy.thaw()
        assert (answer.status_code, answer.json()) == (503, {"status": "unavailable"})
        assert answer.headers["retry-after"] == "1"
        assert "error=<TimeoutError> | not ready" in caplog.messages
        assert client.get("/health").status_code == 200


@pytest.mark.anyio
async def test_health_without_a_factory() -> None:
    assert (await health()).status_code == 503


# Life cycle.


@pytest.mark.anyio
async def test_the_factory_lives_as_long_as_the_application(server: str, database: str) -> None:
    application = connected(server, database, application_name="tested")
    with pytest.raises(FactoryNotInitializedError):
        get_global_factory()
    async with application.app.router.lifespan_context(application.app):
        factory = get_global_factory()
        async with await factory.create_session_manager_async("s") as session:
            assert await session.get_application_name() == "tested"
    with pytest.raises(SessionClosedError):
        await factory.ping_async()


@pytest.mark.anyio
async def test_a_global_factory_is_left_alone(server: str, database: str) -> None:
    application = connected(server, database)
    earlier = await asyncio.to_thread(initialize_global_factory, server, database)
    async with application.app.router.lifespan_context(application.app):
        assert get_global_factory() is earlier
        assert application.app.state.mongodb_session_factory is not earlier
    await earlier.ping_async()


@pytest.fixture
def other_database(drop_later: Callable[[str], None]) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    yield name
    drop_later(name)


def test_two_applications_of_a_process_have_a_database_each(
    server: str, database: str, other_database: str, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    first, second = connected(server, database), connected(server, other_database)
    with serving(first.app) as one:
        with serving(second.app) as two:
            for client, session_id in ((one, "first"), (two, "second")):
                assert client.post(f"/sessions/{session_id}/sse", json={"text": "hi"}).status_code == 200
                assert client.get("/health").status_code == 200
            with pytest.raises(FactoryNotInitializedError, match="2 applications of this process"):
                get_global_factory()
        assert one.get("/health").status_code == 200  # the end of the second one did not close it
        assert one.post("/sessions/first/messages", json={"text": "hi"}).status_code == 200
        assert get_global_factory() is first.app.state.mongodb_session_factory
    ids = {name: [each["_id"] for each in driver[name].agent_sessions.find()] for name in (database, other_database)}
    assert ids == {database: ["first"], other_database: ["second"]}


@pytest.mark.parametrize("own_factory", [False, True], ids=["the parent's factory", "a factory of its own"])
def test_a_mounted_application(
    server: str,
    database: str,
    other_database: str,
    driver: pymongo.MongoClient[dict[str, Any]],
    own_factory: bool,
) -> None:
    mounted = connected(server, other_database)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # a mounted application's own lifespan is never run
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(session_lifespan(server, database)(app))
            if own_factory:
                await stack.enter_async_context(session_lifespan(server, other_database)(mounted.app))
            yield

    parent = FastAPI(lifespan=lifespan)
    add_session_support(parent)
    parent.mount("/below", mounted.app)
    mounted.script = [SessionConflictError("x")]
    with serving(parent) as client:
        assert client.post("/below/sessions/s/sse", json={"text": "hi"}).status_code == 409
        assert client.get("/below/health").status_code == 200
    eventually(lambda: "closed" in repr(mounted.sessions[0]))
    used = other_database if own_factory else database
    assert driver[used].agent_sessions.count_documents({}) == 1


def test_an_endpoint_is_given_the_factory_of_its_application(client: httpx.Client, application: Application) -> None:
    @application.app.get("/sessions")
    async def sessions(factory: Factory) -> list[str]:
        assert factory is application.app.state.mongodb_session_factory
        return [each.session_id for each in (await factory.list_sessions_async()).sessions]

    client.post("/sessions/s/messages", json={"text": "hi"})
    assert client.get("/sessions").json() == ["s"]


def test_an_application_without_a_lifespan_uses_the_global_factory(server: str, database: str, stored: Stored) -> None:
    application = connected(server, database)
    application.app.router.lifespan_context = FastAPI().router.lifespan_context
    initialize_global_factory(server, database)
    with serving(application.app) as client:
        assert client.post("/sessions/s/messages", json={"text": "hi"}).status_code == 200
        assert client.get("/health").status_code == 200
    assert conversation(stored) == ["hi", "Hello! I have been sent 1 message."]


# The check at the start.


def start(uri: str, *lines: str, **options: Any) -> tuple[int, str]:
    """Start an application in a process of its own, as a user does, and return how it ended and what it said."""
    program = (
        "import uvicorn\n"
        "from fastapi import FastAPI\n"
        "from mongodb_session_manager.fastapi import session_lifespan\n"
        f"app = FastAPI(lifespan=session_lifespan({uri!r}, **{options!r}))\n"
        "uvicorn.run(app, port=0)\n"
    )
    process = interpreter.start(program)
    _, errors = process.communicate()
    assert process.returncode is not None
    return process.returncode, errors


def test_an_application_whose_database_is_away_does_not_start() -> None:
    code, said = start(NOBODY, serverSelectionTimeoutMS=500)
    assert code == 3  # what uvicorn ends with when an application does not start
    assert "Application startup failed. Exiting." in said
    assert "\nmongodb_session_manager.errors.DatabaseUnavailableError: " in said
    assert "127.0.0.1:1" in said
    assert "hunter2" not in said
    assert "pymongo" not in said


def test_an_application_whose_credentials_are_refused_does_not_start(server: str) -> None:
    code, said = start(with_credentials(server, "ada", "hunter2"))
    assert code == 3
    assert "\nmongodb_session_manager.errors.AccessDeniedError: " in said
    assert "'ada'" in said
    assert "hunter2" not in said
    assert "pymongo" not in said


def test_an_application_can_start_without_its_database() -> None:
    application = connected(NOBODY, check=False, serverSelectionTimeoutMS=50)
    with serving(application.app) as client:
        assert client.get("/health").status_code == 503


@pytest.mark.anyio
async def test_in_a_lifespan_of_ones_own(server: str, database: str) -> None:
    seen = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        async with session_lifespan(server, database)(app):
            await get_global_factory().ping_async()
            seen.append("started")
            yield {"of": "its own"}
            await get_global_factory().ping_async()
            seen.append("ended")

    app = FastAPI(lifespan=lifespan)
    async with app.router.lifespan_context(app) as state:
        assert state == {"of": "its own"}
    assert seen == ["started", "ended"]
