"""Sessions of users in a FastAPI application: who may open them, who waits, and what an application documents."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Annotated, Any

import httpx
import pymongo
import pytest
import uvicorn
from blockbuster import BlockBuster
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response, WebSocket
from pydantic import BaseModel

from fix_fastapi import serving
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    ConfigurationError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    SessionOptions,
)
from mongodb_session_manager._store.lease_queue import of_connections
from mongodb_session_manager.fastapi import (
    DependencyOptions,
    Session,
    add_session_support,
    live,
    open_session,
    responses,
    session_dependency,
    session_lifespan,
    stream,
)
from mongodb_session_manager.fastapi._answers import ANSWERS
from mongodb_session_manager.fastapi._exchange import Inbox
from support import CommandLog, agent, alternating, eventually, texts

Stored = pymongo.collection.Collection[dict[str, Any]]


@pytest.fixture(autouse=True)
def agents_may_look_for_tools(blocking_calls_are_errors: BlockBuster) -> None:
    """Let Strands look for its directory of tools when an endpoint makes an agent, below what closes the session."""
    for call in ("os.getcwd", "os.stat"):
        blocking_calls_are_errors.functions[call].can_block_in("strands/tools/registry.py", "get_tools_dirs")


class Prompt(BaseModel):
    """What a user says."""

    text: str


async def current_user(authorization: Annotated[str | None, Header()] = None) -> str:
    if authorization is None:
        raise HTTPException(401, "log in")
    return authorization


def blocking_user(authorization: Annotated[str | None, Header()] = None) -> str:
    if authorization is None:
        raise HTTPException(401, "log in")
    return authorization


async def yielded_user(user: Annotated[str, Depends(current_user)]) -> AsyncIterator[str]:
    yield user


async def checked_user(
    key: Annotated[str, Header()], expiry: Annotated[int, Header()], user: Annotated[str, Depends(current_user)]
) -> str:
    return user


def no_user() -> None:
    """Forget to raise an error."""


Manager = AsyncMongoDBSessionManager
UserSession = Annotated[Manager, session_dependency(owner=current_user)]
UserChat = Annotated[Manager, session_dependency(path="chat_id", owner=current_user, must_exist=True)]
RefusedSession = Annotated[Manager, session_dependency(owner=current_user, on_busy="refuse")]
ImpatientSession = Annotated[Manager, session_dependency(owner=current_user, busy_timeout=0.05)]
Forgotten = Annotated[Manager, session_dependency(owner=no_user)]


class Application:
    """An application whose sessions belong to users; the header `Authorization` is the user's name.

    Attributes:
        opened: The sessions that endpoints were given.
        go: The model answers the first request while it is set.
    """

    def __init__(self, server: str, database: str, **options: Any) -> None:
        self.app = app = FastAPI(lifespan=session_lifespan(server, database, **options), responses=responses)
        self.opened: list[Manager] = []
        self.go = threading.Event()
        self.go.set()
        add_session_support(app)

        async def answered(session: Manager, prompt: Prompt) -> Response:
            self.opened.append(session)
            asked = agent(session)
            await asyncio.to_thread(self.go.wait)
            return await stream(asked, prompt.text)

        @app.post("/sessions/{session_id}")
        async def answer(session: UserSession, prompt: Prompt) -> Response:
            return await answered(session, prompt)

        @app.post("/refused/{session_id}")
        async def refuse(session: RefusedSession, prompt: Prompt) -> Response:
            return await answered(session, prompt)

        @app.post("/impatient/{session_id}")
        async def wait(session: ImpatientSession, prompt: Prompt) -> Response:
            return await answered(session, prompt)

        @app.post("/def/{session_id}")
        async def answer_in_def(
            session: Annotated[Manager, session_dependency(owner=blocking_user)], prompt: Prompt
        ) -> Response:
            return await answered(session, prompt)

        @app.post("/yield/{session_id}")
        async def answer_in_yield(
            session: Annotated[Manager, session_dependency(owner=yielded_user)], prompt: Prompt
        ) -> Response:
            return await answered(session, prompt)

        @app.post("/checked/{session_id}")
        async def answer_checked(
            session: Annotated[Manager, session_dependency(owner=checked_user)], prompt: Prompt
        ) -> Response:
            return await answered(session, prompt)

        @app.get("/chats/{chat_id}")
        async def show(session: UserChat) -> str:
            self.opened.append(session)
            return session.session_id

        @app.post("/forgotten/{session_id}")
        async def forget(session: Forgotten) -> None:
            self.opened.append(session)

        @app.post("/size/{session_id}")
        async def size(session: UserSession, request: Request) -> int:
            return len(await request.body())

        @app.websocket("/talk/{session_id}")
        async def talk(socket: WebSocket, session: RefusedSession) -> None:
            self.opened.append(session)
            await socket.accept()
            while True:
                await socket.send_text(await socket.receive_text())

        @app.websocket("/wait/{session_id}")
        async def talk_later(socket: WebSocket, session: UserSession) -> None:
            self.opened.append(session)
            await socket.accept()

    def wait_until_idle(self, stored: Stored) -> None:
        """Wait until nothing more is sent to the database."""
        eventually(lambda: all("closed" in repr(session) for session in self.opened))
        eventually(lambda: stored.find_one({"lease.token": {"$exists": True}}) is None)
        eventually(lambda: not self._connection._tasks and not self._connection._operations)

    @property
    def _connection(self) -> Any:
        return self.app.state.mongodb_session_factory._connection

    def waiters(self) -> int:
        """Return the number of requests that wait for a session."""
        leases = of_connections.get(self._connection)
        return 0 if leases is None else sum(len(queue.waiters) for queue in tuple(leases.queues.values()))


@pytest.fixture(scope="module")
def log() -> CommandLog:
    return CommandLog()


@pytest.fixture(scope="module")
def served(server: str, shared_database: str, log: CommandLog) -> Iterator[tuple[Application, httpx.Client]]:
    application = Application(server, shared_database, event_listeners=[log])
    with serving(application.app, ws="websockets-sansio") as client:
        yield application, client


@pytest.fixture
def application(served: tuple[Application, httpx.Client], database: str, stored: Stored) -> Iterator[Application]:
    application, _ = served
    application.opened.clear()
    application.go.set()
    yield application
    application.app.dependency_overrides.clear()
    application.wait_until_idle(stored)


@pytest.fixture
def client(served: tuple[Application, httpx.Client], application: Application) -> httpx.Client:
    _, client = served
    client.headers["Authorization"] = "ada"
    return client


@pytest.fixture
def elsewhere(server: str, database: str) -> Iterator[MongoDBSessionManager]:
    """Another process that has its turn in Ada's session "s"."""
    with MongoDBSessionManagerFactory(server, database, owner="ada", on_busy="wait") as factory:
        yield factory.create_session_manager("s")


def say(client: httpx.Client, text: str = "hi", path: str = "/sessions/s", **options: Any) -> httpx.Response:
    return client.post(path, json={"text": text}, **options)


def conversation(stored: Stored, session_id: str = "s") -> list[str]:
    document = stored.find_one({"_id": session_id})
    return [] if document is None else texts(document["agents"]["agent"]["messages"])


# Owners.


@pytest.mark.parametrize("path", alternating("/sessions/s", "/def/s", "/yield/s"))
def test_a_session_belongs_to_the_user_who_created_it(client: httpx.Client, stored: Stored, path: str) -> None:
    assert say(client, path=path).status_code == 200
    assert (stored.find_one({"_id": "s"}) or {})["owner"] == "ada"
    assert say(client, path=path, headers={"Authorization": "eve"}).status_code == 404


def test_who_is_not_authenticated_creates_nothing_and_sends_no_command(
    client: httpx.Client, application: Application, stored: Stored, log: CommandLog
) -> None:
    say(client)
    application.wait_until_idle(stored)
    del client.headers["Authorization"]
    log.clear()
    for path in ("/sessions/s", "/sessions/new", "/def/new", "/yield/new", "/refused/new"):
        answer = say(client, path=path)
        assert (answer.status_code, answer.json()) == (401, {"detail": "log in"})
    assert client.get("/chats/s").status_code == 401
    assert client.post("/sessions/new", content=b"no JSON").status_code in (401, 422)
    assert log.names == []
    assert [each["_id"] for each in stored.find()] == ["s"]


@pytest.mark.parametrize("headers", [{}, {"Key": "k"}, {"Key": "k", "Expiry": "tomorrow"}])
def test_who_lacks_a_header_that_the_owner_requires_creates_nothing(
    client: httpx.Client, application: Application, log: CommandLog, headers: dict[str, str]
) -> None:
    log.clear()
    assert say(client, path="/checked/s", headers=headers).status_code == 422
    assert log.names == []
    assert application.opened == []


def test_another_users_session_is_answered_like_a_missing_one(
    client: httpx.Client, application: Application, stored: Stored, log: CommandLog
) -> None:
    say(client)
    assert client.get("/chats/s").json() == "s"
    application.wait_until_idle(stored)
    client.headers["Authorization"] = "eve"
    answers, commands = [], []
    for session_id in ("s", "missing"):
        log.clear()
        answers.append(client.get(f"/chats/{session_id}"))
        commands.append(log.names.copy())
    theirs, missing = answers
    assert (theirs.status_code, theirs.json()) == (404, {"detail": "the session does not exist"})
    assert (missing.status_code, missing.content) == (theirs.status_code, theirs.content)
    assert {*missing.headers} == {*theirs.headers}
    assert commands[0] == commands[1]


def test_an_owner_that_is_none_opens_nothing(
    client: httpx.Client, application: Application, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.post("/forgotten/s")
    assert (answer.status_code, answer.json()) == (500, {"detail": "the server is not configured correctly"})
    assert "the owner's dependency must return the owner's id, a str, and returned NoneType" in caplog.text
    assert application.opened == []
    assert stored.count_documents({}) == 0


@pytest.mark.parametrize("owner", ["", "a\0b"])
def test_a_bad_owner_opens_nothing(client: httpx.Client, application: Application, owner: str) -> None:
    application.app.dependency_overrides[current_user] = lambda: owner
    answer = say(client)
    assert answer.status_code == 422
    assert "owner" in answer.json()["detail"]


@pytest.mark.parametrize("options", [{"on_busy": "perhaps"}, {"busy": "wait"}, {"lease": -1}])
def test_a_bad_option_is_an_error_when_the_dependency_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        session_dependency(**options)


def test_a_dependency_takes_every_option_of_a_session() -> None:
    ours, theirs = DependencyOptions.__annotations__.keys(), SessionOptions.__annotations__.keys()
    assert theirs - ours == {"owner", "metadataHook", "feedbackHook"}
    assert ours - theirs == set()


# Turns.


def test_a_double_submit_stores_both_turns_in_order(
    client: httpx.Client, application: Application, stored: Stored
) -> None:
    application.go.clear()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(say, client, "first")
        eventually(lambda: application.opened)
        second = threads.submit(say, client, "second")
        eventually(application.waiters)
        application.go.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    told = ["first", "Hello! I have been sent 1 message.", "second", "Hello! I have been sent 3 messages."]
    assert conversation(stored) == told


@pytest.mark.parametrize("path", ["/refused/s", "/impatient/s"])
def test_a_busy_session_is_409_with_retry_after_before_any_byte(
    client: httpx.Client, application: Application, elsewhere: MongoDBSessionManager, path: str
) -> None:
    with client.stream("POST", path, json={"text": "hi"}) as answer:
        assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
        assert answer.headers["content-type"] == "application/json"
        answer.read()
    assert answer.json() == {"detail": "the session is busy with another request: repeat this one later"}
    assert application.opened == []
    elsewhere.close()
    assert say(client, path=path).status_code == 200


def test_a_factory_that_refuses_is_not_made_to_wait(
    server: str, database: str, elsewhere: MongoDBSessionManager
) -> None:
    with serving(Application(server, database, on_busy="refuse").app) as client:
        assert say(client, headers={"Authorization": "ada"}).status_code == 409


def test_a_request_whose_client_leaves_gives_up_its_place(
    client: httpx.Client,
    application: Application,
    stored: Stored,
    elsewhere: MongoDBSessionManager,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        say(client, "never answered", timeout=0.5)
    eventually(lambda: not application.waiters(), 15)
    elsewhere.close()
    assert say(client, "again").status_code == 200
    assert len(application.opened) == 1
    assert conversation(stored) == ["again", "Hello! I have been sent 1 message."]
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_waiting_takes_no_part_of_a_body_that_the_endpoint_reads(
    client: httpx.Client, application: Application, elsewhere: MongoDBSessionManager
) -> None:
    go_on = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"a" * 100_000
        assert go_on.wait(30)
        yield b"b" * 1_000_000

    with ThreadPoolExecutor(1) as threads:
        sizes = threads.submit(lambda: client.post("/size/s", content=parts()).json())
        eventually(application.waiters)
        elsewhere.close()
        go_on.set()
        assert sizes.result() == 1_100_000


@pytest.mark.anyio
async def test_waiting_reads_only_one_message_ahead_of_a_client_that_sends_many() -> None:
    sent = itertools.count()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "websocket.receive", "text": str(next(sent))}

    inbox = Inbox(receive)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(inbox.disconnection(), 0.1)
    assert next(sent) == 1
    assert [(await inbox.receive())["text"] for _ in range(2)] == ["0", "2"]


# WebSockets.


@pytest.mark.parametrize(
    ("path", "user", "code", "reason"),
    [
        ("/talk/s", "ada", 1013, "the session is busy with another request: repeat this one later"),
        ("/talk/s", "eve", 1008, "the session does not exist"),
        ("/talk/a%00b", "ada", 1008, "session_id must not contain a NUL character"),
    ],
    ids=["busy", "of another owner", "a bad id"],
)
def test_a_websocket_is_closed_with_a_code(
    client: httpx.Client, elsewhere: MongoDBSessionManager, path: str, user: str, code: int, reason: str
) -> None:
    connect, closed = websockets()
    url = f"ws://127.0.0.1:{client.base_url.port}{path}"
    with connect(url, additional_headers={"Authorization": user}) as socket, pytest.raises(closed) as error:
        socket.recv()
    assert (error.value.rcvd.code, error.value.rcvd.reason) == (code, reason)


def websockets() -> tuple[Any, Any]:
    found = pytest.importorskip("websockets.sync.client", reason="the extra `dev` brings websockets")
    return found.connect, pytest.importorskip("websockets.exceptions").ConnectionClosed


def test_a_websocket_of_nobody_opens_nothing(client: httpx.Client, application: Application, stored: Stored) -> None:
    connect, _ = websockets()
    refused = pytest.importorskip("websockets.exceptions").InvalidStatus
    with pytest.raises(refused) as error, connect(f"ws://127.0.0.1:{client.base_url.port}/talk/s"):
        ...
    assert error.value.response.status_code == 401
    assert stored.count_documents({}) == 0


def test_a_websocket_whose_client_leaves_is_no_error(
    client: httpx.Client, application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    connect, _ = websockets()
    with connect(
        f"ws://127.0.0.1:{client.base_url.port}/talk/s", additional_headers={"Authorization": "ada"}
    ) as socket:
        socket.send("hi")
        assert socket.recv() == "hi"
    eventually(lambda: "closed" in repr(application.opened[0]))
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_websocket_whose_client_leaves_while_it_waits_gives_up_its_place(
    client: httpx.Client, application: Application, elsewhere: MongoDBSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    connect, _ = websockets()
    address = f"ws://127.0.0.1:{client.base_url.port}/wait/s"
    with suppress(TimeoutError):
        connect(address, additional_headers={"Authorization": "ada"}, open_timeout=0.5)
    eventually(lambda: not application.waiters(), 15)
    elsewhere.close()
    assert say(client, "again").status_code == 200
    assert len(application.opened) == 1
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


# Paths.


async def endpoint(session: Session) -> None: ...


async def socket_endpoint(socket: WebSocket, session: Session) -> None: ...


async def nested(session: Session) -> None: ...


def of_a_route(app: FastAPI) -> str:
    app.post("/messages")(endpoint)
    return "/messages"


def of_another_parameter(app: FastAPI) -> str:
    app.post("/sessions/{id}")(endpoint)
    return "/sessions/{id}"


def of_a_websocket(app: FastAPI) -> str:
    app.websocket("/talk")(socket_endpoint)
    return "/talk"


def of_a_dependency(app: FastAPI) -> str:
    app.get("/nested", dependencies=[Depends(nested)])(live)
    return "/nested"


def of_an_included_router(app: FastAPI) -> str:
    inner, outer = APIRouter(prefix="/inner"), APIRouter(prefix="/outer")
    inner.post("/messages")(endpoint)
    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")
    return "/v1/outer/inner/messages"


def of_a_websocket_of_a_router(app: FastAPI) -> str:
    router = APIRouter()
    router.websocket("/talk")(socket_endpoint)
    app.include_router(router, prefix="/v1")
    return "/v1/talk"


def of_a_mounted_application(app: FastAPI) -> str:
    mounted = FastAPI()
    mounted.post("/messages")(endpoint)
    app.mount("/below", mounted)
    return "/below/messages"


WITHOUT = [
    of_a_route,
    of_another_parameter,
    of_a_websocket,
    of_a_dependency,
    of_an_included_router,
    of_a_websocket_of_a_router,
    of_a_mounted_application,
]


@pytest.mark.anyio
@pytest.mark.parametrize("add", WITHOUT, ids=[each.__name__ for each in WITHOUT])
async def test_a_route_without_the_path_parameter_is_an_error_at_the_start(add: Callable[[FastAPI], str]) -> None:
    app = FastAPI()
    add_session_support(app)
    path = add(app)
    message = f"route {path!r} opens a session but has no path parameter 'session_id'"
    with pytest.raises(ConfigurationError) as error:
        async with app.router.lifespan_context(app):
            ...
    assert str(error.value).startswith(message)


def test_an_application_with_such_a_route_does_not_start(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    add_session_support(app)
    of_a_route(app)
    with pytest.raises(SystemExit):
        uvicorn.Server(uvicorn.Config(app, port=0, log_config=None)).run()
    assert "route '/messages' opens a session but has no path parameter 'session_id'" in caplog.text
    assert "Application startup failed. Exiting." in caplog.messages


@pytest.mark.anyio
async def test_a_path_parameter_of_a_router_or_a_mounted_application_names_the_session(
    server: str, database: str, stored: Stored
) -> None:
    mounted = FastAPI()
    mounted.post("/messages")(endpoint)
    add_session_support(mounted)
    router = APIRouter()
    router.post("/messages")(endpoint)
    app = FastAPI(lifespan=session_lifespan(server, database))
    app.include_router(router, prefix="/sessions/{session_id}")
    app.mount("/below/{session_id}", mounted)
    app.post("/paths/{session_id:path}")(endpoint)
    add_session_support(app)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for path in ("/sessions/routed/messages", "/below/mounted/messages", "/paths/a/path"):
            assert (await client.post(path)).status_code == 200
    assert {each["_id"] for each in stored.find()} == {"routed", "mounted", "a/path"}


@pytest.mark.anyio
async def test_a_session_is_never_named_by_a_query(server: str, database: str, stored: Stored) -> None:
    app = FastAPI(lifespan=session_lifespan(server, database))
    app.post("/messages")(endpoint)
    lifespan = app.router.lifespan_context
    add_session_support(app)
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/messages?session_id=s")).status_code == 422
    assert stored.count_documents({}) == 0


def test_a_test_can_replace_the_session(client: httpx.Client, application: Application, stored: Stored) -> None:
    application.app.post("/replaced/{session_id}")(endpoint)
    application.app.dependency_overrides[open_session] = lambda: None
    assert client.post("/replaced/s").status_code == 200
    assert stored.count_documents({}) == 0


# OpenAPI.


def test_openapi_documents_the_path_parameter_and_every_status(application: Application) -> None:
    schema = application.app.openapi()
    operation = schema["paths"]["/sessions/{session_id}"]["post"]
    (session_id,) = [each for each in operation["parameters"] if each["in"] == "path"]
    assert (session_id["name"], session_id["required"], session_id["schema"]["type"]) == ("session_id", True, "string")
    assert {each["in"] for each in operation["parameters"]} == {"path", "header"}
    assert {*operation["responses"]} == {"200", "404", "409", "413", "422", "503"}
    for status in ("409", "503"):
        assert operation["responses"][status]["headers"]["Retry-After"]["schema"] == {"type": "integer"}
    body = operation["responses"]["404"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ErrorDetail"}
    assert schema["components"]["schemas"]["ErrorDetail"]["properties"]["detail"]["type"] == "string"
    (chat_id,) = [each for each in schema["paths"]["/chats/{chat_id}"]["get"]["parameters"] if each["in"] == "path"]
    assert (chat_id["name"], chat_id["schema"]["type"]) == ("chat_id", "string")


def test_the_documented_statuses_are_those_of_the_errors() -> None:
    assert {*responses} == {answer.status for answer in ANSWERS.values()} - {500}
