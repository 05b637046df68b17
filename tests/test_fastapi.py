"""Sessions in a FastAPI application, over real HTTP."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pymongo
import pytest
import uvicorn
from blockbuster import BlockBuster
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    DatabaseTimeoutError,
    FactoryNotInitializedError,
    SessionClosedError,
    close_global_factory,
    get_global_factory,
    initialize_global_factory,
)
from mongodb_session_manager.fastapi import Session, add_session_support, health, session_lifespan
from proxy import Proxy
from support import agent, eventually, texts

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


class Application:
    """A FastAPI application around `session_lifespan(*args, **kwargs)`.

    Attributes:
        sessions: The managers that its requests were given, oldest first.
        before_answering: Called between the restoring of an agent and its turn.
        script: What the agents say.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.app = FastAPI(lifespan=session_lifespan(*args, **kwargs))
        self.sessions: list[AsyncMongoDBSessionManager] = []
        self.before_answering: Callable[[], object] = lambda: None
        self.script: list[Any] = []
        add_session_support(self.app)
        self.app.get("/health")(health)

        @self.app.post("/sessions/{session_id}/messages")
        async def answer(session: Session, text: str) -> dict[str, str]:
            self.sessions.append(session)
            asked = agent(session, *self.script)
            await asyncio.to_thread(self.before_answering)
            return {"answer": str(await asked.invoke_async(text)).strip(), "session": repr(session)}

        @self.app.post("/sessions/{session_id}/stream")
        async def stream(session: Session, text: str, delay: float = 0.0) -> StreamingResponse:
            self.sessions.append(session)
            asked = agent(session, *self.script)
            asked.model.delay = delay

            async def tokens() -> AsyncIterator[str]:
                async for event in asked.stream_async(text):
                    if "data" in event:
                        yield event["data"]
                yield repr(session)

            return StreamingResponse(tokens(), media_type="text/plain")


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """Serve an application on a port of its own and yield a client of it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive())
        (port,) = [socket.getsockname()[1] for each in server.servers for socket in each.sockets]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def application(server: str, database: str) -> Application:
    return Application(server, database, application_name="tested")


@pytest.fixture
def client(application: Application) -> Iterator[httpx.Client]:
    with serving(application.app) as client:
        yield client


def conversation(stored: Stored, session_id: str = "s") -> list[str]:
    document = stored.find_one({"_id": session_id})
    return [] if document is None else texts(document["agents"]["agent"]["messages"])


# Turns.


def test_a_session_goes_on_with_the_next_request(client: httpx.Client, application: Application) -> None:
    client.post("/sessions/s/messages", params={"text": "My name is Ada."})
    answer = client.post("/sessions/s/messages", params={"text": "What is my name?"})
    assert answer.status_code == 200
    assert answer.json()["answer"] == "Your name is Ada."


@pytest.mark.parametrize("path", ["messages", "stream"])
def test_a_session_is_open_until_the_response_is_sent_and_closed_then(
    client: httpx.Client, application: Application, stored: Stored, path: str
) -> None:
    answer = client.post(f"/sessions/s/{path}", params={"text": "hi"})
    assert "Hello! I have been sent 1 message." in answer.text
    assert "session_id='s', open" in answer.text
    (session,) = application.sessions
    eventually(lambda: repr(session) == "<AsyncMongoDBSessionManager session_id='s', closed>")
    assert conversation(stored) == ["hi", "Hello! I have been sent 1 message."]


def test_an_answer_comes_token_by_token(client: httpx.Client) -> None:
    with client.stream("POST", "/sessions/s/stream", params={"text": "hi", "delay": 0.01}) as answer:
        parts = list(answer.iter_text())
    assert len(parts) > 3


def test_a_client_that_goes_away_loses_nothing_that_was_stored(
    client: httpx.Client, application: Application, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    application.script = ["one two three four five six seven eight nine ten"]
    with client.stream("POST", "/sessions/s/stream", params={"text": "My name is Ada.", "delay": 0.05}) as answer:
        assert next(answer.iter_text()).startswith("one")
        # stored before the model was asked
        assert conversation(stored) == ["My name is Ada."]
    (session,) = application.sessions
    eventually(lambda: "closed" in repr(session))
    assert conversation(stored)[:1] == ["My name is Ada."]
    assert application.script == ["one two three four five six seven eight nine ten"]

    application.script = []
    answer = client.post("/sessions/s/messages", params={"text": "What is my name?"})
    assert answer.json()["answer"] == "Your name is Ada."
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_session_is_closed_when_the_endpoint_fails(client: httpx.Client, application: Application) -> None:
    application.script = [ValueError("a bug")]
    assert client.post("/sessions/s/messages", params={"text": "hi"}).status_code == 500
    (session,) = application.sessions
    assert "closed" in repr(session)


# Errors.


def test_a_conflict_is_409(client: httpx.Client, application: Application, stored: Stored) -> None:
    def another_request() -> None:
        application.before_answering = lambda: None
        assert client.post("/sessions/s/messages", params={"text": "first"}).status_code == 200

    application.before_answering = another_request
    answer = client.post("/sessions/s/messages", params={"text": "a secret"})
    assert answer.status_code == 409
    assert answer.json() == {"detail": "another request changed the session meanwhile: repeat this one"}
    assert conversation(stored) == ["first", "Hello! I have been sent 1 message."]

    again = client.post("/sessions/s/messages", params={"text": "a secret"})
    assert again.json()["answer"] == "Hello! I have been sent 3 messages."


def test_a_session_that_is_gone_is_404(client: httpx.Client, application: Application, stored: Stored) -> None:
    application.before_answering = lambda: stored.delete_one({"_id": "s"})
    answer = client.post("/sessions/s/messages", params={"text": "a secret"})
    assert answer.status_code == 404
    assert answer.json() == {"detail": "the session does not exist"}


def test_a_bad_session_id_is_422(client: httpx.Client, stored: Stored) -> None:
    answer = client.post("/sessions/a%00b/messages", params={"text": "hi"})
    assert answer.status_code == 422
    assert answer.json() == {"detail": "session_id must not hold a NUL character"}
    assert stored.count_documents({}) == 0


def test_an_agent_that_is_not_there_is_404(client: httpx.Client, application: Application) -> None:
    @application.app.get("/sessions/{session_id}/count")
    async def count(session: Session) -> int:
        return await session.get_message_count("nobody")

    answer = client.get("/sessions/s/count")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "the session holds no such agent"}


def test_a_value_that_cannot_be_stored_is_422(client: httpx.Client, application: Application) -> None:
    @application.app.get("/sessions/{session_id}/note")
    async def note(session: Session) -> None:
        await session.update_metadata({"note": object()})

    answer = client.get("/sessions/s/note")
    assert answer.status_code == 422
    assert answer.json() == {"detail": "a value cannot be stored"}


def test_a_message_that_is_too_large_is_413(client: httpx.Client, application: Application, stored: Stored) -> None:
    @application.app.post("/sessions/{session_id}/essay")
    async def essay(session: Session) -> None:
        await agent(session).invoke_async("word " * 4_000_000)

    answer = client.post("/sessions/s/essay")
    assert answer.status_code == 413
    assert answer.json() == {"detail": "the message is too large"}


@pytest.mark.parametrize("path", ["/sessions/s/messages", "/sessions/s/stream"])
def test_a_database_that_is_away_is_503(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(Application(NOBODY, serverSelectionTimeoutMS=50).app) as client:
        answer = client.post(path, params={"text": "a secret"})
    assert answer.status_code == 503
    assert answer.json() == {"detail": "the database cannot be reached: try again later"}
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "127.0.0.1:1" in warning.getMessage()
    assert "hunter2" not in caplog.text
    assert "a secret" not in caplog.text


def test_a_database_that_is_too_slow_is_503(server: str, database: str) -> None:
    with Proxy(server) as proxy:
        application = Application(proxy.uri, database, socketTimeoutMS=300)
        with serving(application.app) as client:
            assert client.post("/sessions/s/messages", params={"text": "hi"}).status_code == 200
            proxy.freeze()
            answer = client.post("/sessions/s/messages", params={"text": "hi"})
            proxy.thaw()
    assert answer.status_code == 503
    assert answer.json() == {"detail": "the database takes too long: try again later"}


def test_what_closing_cannot_store_after_a_503_is_logged(
    server: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    def errors() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.levelno >= logging.ERROR]

    with Proxy(server) as proxy:
        application = Application(proxy.uri, database, socketTimeoutMS=300)
        with serving(application.app) as client:
            application.before_answering = proxy.freeze
            assert client.post("/sessions/s/messages", params={"text": "a secret"}).status_code == 503
            eventually(errors)
            proxy.thaw()
    (error,) = errors()
    assert error.exc_info is not None
    assert isinstance(error.exc_info[1], DatabaseTimeoutError)
    assert "a secret" not in caplog.text


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
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_health_of_a_database_that_does_not_answer(
    server: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    patience = {"socketTimeoutMS": 600_000, "connectTimeoutMS": 600_000}
    with Proxy(server) as proxy, serving(Application(proxy.uri, database, **patience).app) as client:
        assert client.get("/health").status_code == 200
        proxy.freeze()
        answer = client.get("/health")
        proxy.thaw()
        assert (answer.status_code, answer.json()) == (503, {"status": "unavailable"})
        assert "error=<TimeoutError> | not healthy" in caplog.messages
        assert client.get("/health").status_code == 200


@pytest.mark.anyio
async def test_health_without_a_factory() -> None:
    assert (await health()).status_code == 503


# Life cycle.


@pytest.mark.anyio
async def test_the_factory_lives_as_long_as_the_application(application: Application) -> None:
    with pytest.raises(FactoryNotInitializedError):
        get_global_factory()
    async with application.app.router.lifespan_context(application.app):
        factory = get_global_factory()
        async with await factory.create_session_manager_async("s") as session:
            assert await session.get_application_name() == "tested"
    with pytest.raises(SessionClosedError):
        await factory.ping_async()


@pytest.mark.anyio
async def test_an_earlier_factory_is_replaced_without_blocking(server: str, database: str) -> None:
    with Proxy(server) as proxy:
        earlier = await asyncio.to_thread(initialize_global_factory, proxy.uri, database)
        session = await earlier.create_session_manager_async("s")
        proxy.freeze()
        writing = asyncio.create_task(session.update_metadata({"colour": "green"}))  # its end is awaited
        await asyncio.sleep(0.1)
        app = FastAPI(lifespan=session_lifespan(server, database))
        starting = asyncio.create_task(app.router.lifespan_context(app).__aenter__())
        await asyncio.sleep(0.1)
        assert not starting.done()
        proxy.thaw()
        await starting
        await writing
    assert get_global_factory() is not earlier


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


def test_without_the_extra() -> None:
    program = (
        "import sys\n"
        "sys.modules['fastapi'] = None\n"
        "import mongodb_session_manager\n"
        "try:\n"
        "    import mongodb_session_manager.fastapi\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert run.stdout == (
        "mongodb_session_manager.fastapi needs FastAPI: pip install 'mongodb-session-manager[fastapi]'\n"
    )
