"""The endpoints for the sessions of a user, over real HTTP."""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any
from urllib.parse import urljoin

import httpx
import pymongo
import pytest
from bson import ObjectId
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.routing import APIRoute
from fastapi.security import OAuth2PasswordBearer
from fastapi.testclient import TestClient

from fix_archive import append, begin, expected, said
from fix_copying import with_image
from fix_fastapi import serving
from fix_finding import session
from mongodb_session_manager import ConfigurationError, MongoDBSessionManagerFactory, MongoDBSessionRepository
from mongodb_session_manager.fastapi import add_session_support, sessions_router
from support import CommandLog, agent, alternating, eventually

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = pymongo.collection.Collection[dict[str, Any]]

bearer = OAuth2PasswordBearer("token")


async def current_user(token: Annotated[str, Depends(bearer)]) -> str:
    """In place of a user table: the token is the user."""
    return token


def optional_user(authorization: Annotated[str | None, Header()] = None) -> str | None:
    return authorization


async def user_of_a_required_header(x_user: Annotated[str, Header()]) -> str:
    return x_user


def application() -> FastAPI:
    app = FastAPI()
    add_session_support(app)
    app.include_router(sessions_router(owner=current_user))
    app.include_router(sessions_router(owner=None), prefix="/admin")
    app.include_router(sessions_router(owner=optional_user), prefix="/optional")
    app.include_router(sessions_router(owner=user_of_a_required_header), prefix="/required")
    return app


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FastAPI, httpx.Client]]:
    app = application()
    with serving(app) as client:
        yield app, client


@dataclass
class User:
    """Sends requests with a token, or without one."""

    client: httpx.Client
    token: str | None = None

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"} if "content" in options else {}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return self.client.request(method, path, headers=headers, **options)


@pytest.fixture
def anybody(served: tuple[FastAPI, httpx.Client], factory: MongoDBSessionManagerFactory) -> User:
    app, client = served
    app.state.mongodb_session_factory = factory
    return User(client)


@pytest.fixture
def ada(anybody: User) -> User:
    return User(anybody.client, "ada")


@pytest.fixture
def bob(anybody: User) -> User:
    return User(anybody.client, "bob")


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return {"max_embedded_messages": 8}


# Every endpoint.

ROUTES: dict[str, APIRoute] = {route.name: route for route in sessions_router(owner=None).routes}  # type: ignore[misc]
OF_A_SESSION = [name for name, route in ROUTES.items() if "{session_id}" in route.path]

BODIES: dict[str, Any] = {
    "update_session": {"title": "Trip to Lisbon", "tags": ["travel"]},
    "update_metadata": {"metadata": {"a.b": 1}},
    "add_feedback": {"rating": "down", "comment": "no", "of": 3},
    "rewind_session": {"at_message": 1, "keep_as": "kept"},
    "fork_session": {"new_id": "fork", "at_message": 1},
}
"""The bodies of the endpoints with one: a new endpoint needs an entry, and then the tests below cover it."""


def ask(user: User, name: str, session_id: str = "s", prefix: str = "") -> httpx.Response:
    """Call an endpoint with valid parameters."""
    (method,) = ROUTES[name].methods
    path = prefix + ROUTES[name].path.replace("{session_id}", session_id)
    return user(method, path, json=BODIES[name]) if method in ("POST", "PATCH") else user(method, path)


@pytest.fixture(scope="module")
def document(server: str, shared_database: str, driver: Driver) -> dict[str, Any]:
    """A stored session with two turns, metadata and feedback."""
    with (
        MongoDBSessionManagerFactory(server, shared_database) as factory,
        factory.create_session_manager("prepared", title="secret", tags=["secret"]) as manager,
    ):
        live = agent(manager, "a0", "a1")
        live("q0")
        live("q1")
        manager.update_metadata({"a": {"b": "secret"}})
        manager.add_feedback({"rating": "up", "comment": "secret"})
    return driver[shared_database]["agent_sessions"].find_one({"_id": "prepared"}) or {}


Store = Callable[..., None]


@pytest.fixture
def with_content(document: dict[str, Any], stored: Stored) -> Store:
    """Return a function that stores the prepared session under an id, with an owner or none."""

    def store(session_id: str = "s", owner: str | None = "ada") -> None:
        own = {"_id": session_id, "session_id": session_id, "incarnation": ObjectId()}
        stored.insert_one({**document, **own, **({} if owner is None else {"owner": owner})})

    return store


def everything(stored: Stored) -> list[Any]:
    names = stored.database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    return [list(stored.database[name].find(sort=[("_id", 1)])) for name in sorted(names)]


def test_nobody_who_is_not_authenticated_gets_to_the_database(
    anybody: User, commands: CommandLog, stored: Stored
) -> None:
    for name, session_id in itertools.product(ROUTES, ("s", "a%00b")):
        answer = ask(anybody, name, session_id)
        assert (answer.status_code, answer.json()) == (401, {"detail": "Not authenticated"}), name
        assert commands.names == [], name
    assert stored.find_one() is None


@pytest.mark.parametrize(
    ("prefix", "status", "detail"),
    [("/optional", 500, "the server is not configured correctly"), ("/required", 422, "x-user: Field required")],
    ids=["an owner of None", "a header that is missing"],
)
def test_a_dependency_that_finds_no_owner_does_not_give_access_to_every_session(
    anybody: User, commands: CommandLog, prefix: str, status: int, detail: str
) -> None:
    for name in ROUTES:
        answer = ask(anybody, name, prefix=prefix)
        assert (answer.status_code, answer.json()) == (status, {"detail": detail}), name
        assert commands.names == [], name


@pytest.mark.parametrize("name", ROUTES)
def test_every_endpoint_serves_the_owner_and_the_administration(
    ada: User, anybody: User, factory: MongoDBSessionManagerFactory, with_content: Store, name: str
) -> None:
    for user, prefix, session_id in ((ada, "", "s"), (anybody, "/admin", "t")):
        factory.delete_session(BODIES.get(name, {}).get("new_id") or "kept")
        with_content(session_id)
        answer = ask(user, name, session_id, prefix)
        assert answer.status_code == ROUTES[name].status_code, answer.text
        if answer.status_code != 204:
            model = ROUTES[name].response_model
            assert answer.json().keys() == model.model_fields.keys()
            model.model_validate(answer.json())
        else:
            assert answer.content == b""


@pytest.mark.parametrize("of", alternating("ada", None), ids=["another owner", "no owner"])
@pytest.mark.parametrize("name", alternating(*OF_A_SESSION))
def test_a_session_of_another_is_one_that_does_not_exist(
    bob: User,
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    stored: Stored,
    with_content: Store,
    name: str,
    of: str | None,
) -> None:
    """The same answer after as many commands, and nothing has changed."""
    with_content(owner=of)
    eventually(lambda: not factory._connection._tasks)
    before = everything(stored)
    outcomes = []
    for session_id in ("s", "absent"):
        commands.clear()
        answer = ask(bob, name, session_id)
        eventually(lambda: not factory._connection._tasks)
        headers = {key: value for key, value in answer.headers.items() if key != "date"}
        outcomes.append((answer.status_code, answer.content, headers, list(commands.names)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][:2] == (404, b'{"detail":"the session does not exist"}')
    assert everything(stored) == before


# Lists of sessions.


def test_a_user_lists_the_own_sessions_in_pages(
    ada: User, anybody: User, stored: Stored, commands: CommandLog, factory: MongoDBSessionManagerFactory
) -> None:
    moments = [datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 8)]
    stored.insert_many(
        session(f"s{n}", owner="ada" if n % 2 else "bob", updated_at=moment) for n, moment in enumerate(moments)
    )
    commands.clear()
    first = ada("GET", "/sessions", params={"limit": 2}).json()
    assert commands.names == ["find"]
    assert [each["session_id"] for each in first["sessions"]] == ["s5", "s3"]
    second = ada("GET", "/sessions", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [each["session_id"] for each in second["sessions"]] == ["s1"]
    assert second["next_cursor"] is None
    oldest = ada("GET", "/sessions", params={"order": "updated_at", "updated_after": "2026-01-02T00:00:00Z"}).json()
    assert [each["session_id"] for each in oldest["sessions"]] == ["s3", "s5"]
    assert len(anybody("GET", "/admin/sessions").json()["sessions"]) == 7


def test_a_list_shows_labels_and_counts(ada: User, factory: MongoDBSessionManagerFactory, with_content: Store) -> None:
    with_content()
    with factory.create_session_manager("other", owner="ada", tags=["a", "b"]):
        pass
    (shown,) = ada("GET", "/sessions", params={"tags": ["secret"]}).json()["sessions"]
    assert shown == ada("GET", "/sessions/s").json()
    assert shown["title"] == "secret"
    assert shown["tags"] == ["secret"]
    assert shown["owner"] == "ada"
    assert shown["message_counts"] == {"agent": 4}
    assert shown["metadata"] == {"a": {"b": "secret"}}
    assert ada("GET", "/sessions", params={"tags": ["a", "secret"]}).json()["sessions"] == []
    assert len(ada("GET", "/sessions", params={"tags": ["b", "a"]}).json()["sessions"]) == 1


def test_labels_are_changed_and_removed(ada: User, with_content: Store) -> None:
    with_content()
    assert ada("PATCH", "/sessions/s", json={"title": "Lisbon"}).status_code == 204
    assert ada("PATCH", "/sessions/s", json={}).status_code == 204
    shown = ada("GET", "/sessions/s").json()
    assert (shown["title"], shown["tags"]) == ("Lisbon", ["secret"])
    assert ada("PATCH", "/sessions/s", json={"title": None, "tags": []}).status_code == 204
    shown = ada("GET", "/sessions/s").json()
    assert (shown["title"], shown["tags"]) == (None, [])


# Messages.


def told(messages: list[dict[str, Any]]) -> list[str]:
    return [block["text"] for message in messages for block in message["content"]]


def test_messages_are_paged_from_the_end_through_the_archive(
    ada: User, repository: MongoDBSessionRepository, commands: CommandLog, stored: Stored
) -> None:
    begin(repository)
    append(repository, *range(30))
    eventually(lambda: stored.database["agent_sessions_archive"].count_documents({}) > 1)
    repository.claim_session("s", "ada")
    commands.clear()
    shown, before, pages = [], None, 0
    while before is not None or not pages:
        params = {"limit": 7, "agent_id": "agent"} | ({} if before is None else {"before": before})
        page = ada("GET", "/sessions/s/messages", params=params).json()
        shown += page["messages"]
        before, pages = page["next_before"], pages + 1
    assert told(shown) == expected(30)[::-1]
    assert [message["message_id"] for message in shown] == list(range(30))[::-1]
    assert pages == 5
    assert set(commands.names) <= {"find", "aggregate"}
    assert len(ada("GET", "/sessions/s/messages").json()["messages"]) == 20
    one = ada("GET", "/sessions/s/messages", params={"before": 1}).json()
    assert (told(one["messages"]), one["next_before"]) == (["text 0"], None)
    assert ada("GET", "/sessions/s/messages", params={"before": 0}).json()["messages"] == []


def test_a_message_is_shown_with_its_role_and_dates(ada: User, with_content: Store) -> None:
    with_content()
    page = ada("GET", "/sessions/s/messages", params={"limit": 1}).json()
    (message,) = page["messages"]
    assert (page["agent_id"], page["next_before"]) == ("agent", 3)
    assert message.keys() == {"message_id", "role", "content", "redacted", "created_at", "updated_at"}
    assert (message["role"], told([message]), message["redacted"]) == ("assistant", ["a1"], False)
    assert datetime.fromisoformat(message["created_at"]).tzinfo is not None


def test_one_of_several_agents_must_be_named(
    ada: User, factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    with factory.create_session_manager("s", owner="ada") as manager:
        assert ada("GET", "/sessions/s/messages").json() == {"agent_id": None, "messages": [], "next_before": None}
        for agent_id in ("first", "a.b"):
            agent(manager, f"by {agent_id}", agent_id=agent_id)("hi")
    answer = ada("GET", "/sessions/s/messages")
    assert (answer.status_code, answer.json()) == (422, {"detail": "agent_id must be one of 'first', 'a.b'"})
    commands.clear()
    answer = ada("GET", "/sessions/s/messages", params={"agent_id": "a.b"})
    assert told(answer.json()["messages"]) == ["by a.b", "hi"]
    assert len(commands.names) == 1
    answer = ada("GET", "/sessions/s/messages", params={"agent_id": "third"})
    assert (answer.status_code, answer.json()) == (404, {"detail": "the session has no such agent"})


@pytest.mark.parametrize("size", [10, 200_000], ids=["inline", "attachment"])
def test_an_image_fits_into_a_data_url(ada: User, repository: MongoDBSessionRepository, size: int) -> None:
    data = b"\xfb\xff\xfe" * size
    begin(repository)
    repository.create_message("s", "agent", with_image(0, data))
    repository.claim_session("s", "ada")
    (message,) = ada("GET", "/sessions/s/messages").json()["messages"]
    image = message["content"][1]["image"]
    assert image["format"] == "png"
    assert (
        image["source"]["bytes"] == base64.b64encode(data).decode()
    )  # not the alphabet for URLs: a browser refuses it


def test_a_redacted_message_shows_only_its_replacement(ada: User, stored: Stored) -> None:
    """Also one of an earlier version, which kept the original."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    message = {
        "message": {"role": "user", "content": [{"text": "my card is 4111"}]},
        "message_id": 0,
        "redact_message": {"role": "user", "content": [{"text": "[redacted]"}]},
        "created_at": moment,
        "updated_at": moment,
    }
    data = {"agent_id": "agent", "state": {}, "conversation_manager_state": {}}
    agents = {"agent": {"agent_data": data, "messages": [message], "created_at": moment, "updated_at": moment}}
    stored.insert_one(session("s", owner="ada", agents=agents))
    answer = ada("GET", "/sessions/s/messages")
    (shown,) = answer.json()["messages"]
    assert (told([shown]), shown["redacted"]) == (["[redacted]"], True)
    assert "4111" not in answer.text


# Metadata, feedback, usage.


ODD: dict[str, tuple[Any, Any]] = {
    "a date": (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
    "a day": (date(2026, 1, 2), "2026-01-02"),
    "a duration": (timedelta(minutes=1, milliseconds=500), 60.5),
    "bytes": (b"\xfb\xff", "+/8="),
    "nan": (math.nan, None),
    "infinity": (-math.inf, None),
    "a large int": (2**64, "18446744073709551616"),
    "a huge int": (-(2**5000), hex(-(2**5000))),
    "a decimal": (Decimal("1.10"), "1.10"),
    "an id": (ObjectId("0" * 24), "0" * 24),
    "a tuple": ((1, (2, None)), [1, [2, None]]),
    "half a pair": ("\ud83d", "\ud83d"),
    "keys": ({1: True, "$a.b": 0.5}, {"1": True, "$a.b": 0.5}),
}
"""Values that the library stores, and their JSON."""


def test_values_that_json_has_no_form_for_are_shown(
    ada: User, repository: MongoDBSessionRepository, with_content: Store
) -> None:
    with_content()
    values = {name: value for name, (value, _) in ODD.items()}
    nested: Any = "deep"
    for _ in range(200):
        nested = [nested]
    repository.update_metadata("s", {"odd": values, "nested": nested})
    repository.add_feedback("s", {"odd": values})
    message = said(4)
    message.message["content"].append({"toolResult": {"toolUseId": "t", "content": [{"json": values}]}})
    repository.create_message("s", "agent", message)
    as_json = {name: shown for name, (_, shown) in ODD.items()}
    metadata = ada("GET", "/sessions/s/metadata").json()["metadata"]
    assert metadata["odd"] == as_json
    assert json.dumps(metadata["nested"]).count("[") == 200
    assert ada("GET", "/sessions").json()["sessions"][0]["metadata"] == metadata
    assert ada("GET", "/sessions/s/feedback").json()["feedbacks"][1]["odd"] == as_json
    (newest,) = ada("GET", "/sessions/s/messages", params={"limit": 1}).json()["messages"]
    assert newest["content"][1]["toolResult"]["content"][0]["json"] == as_json


def test_metadata_is_set_by_key(ada: User, with_content: Store, commands: CommandLog) -> None:
    with_content()
    commands.clear()
    changes = {"a.c": [1, "\ud83d"], "d": None}
    answer = ada("PATCH", "/sessions/s/metadata", content=json.dumps({"metadata": changes}))
    assert answer.status_code == 204
    assert len(commands.names) == 1
    expected = {"a": {"b": "secret", "c": [1, "\ud83d"]}, "d": None}
    assert ada("GET", "/sessions/s/metadata").json() == {"metadata": expected}


def test_feedback_has_any_fields_and_a_date_of_the_server(ada: User, with_content: Store, commands: CommandLog) -> None:
    with_content()
    commands.clear()
    given = {"rating": "down", "message_id": 3, "created_at": "1970-01-01T00:00:00Z"}
    assert ada("POST", "/sessions/s/feedback", json=given).status_code == 204
    assert len(commands.names) == 1
    first, second = ada("GET", "/sessions/s/feedback").json()["feedbacks"]
    assert (first["rating"], second["rating"], second["message_id"]) == ("up", "down", 3)
    assert second.keys() == {"rating", "message_id", "created_at"}
    assert second["created_at"] > first["created_at"] > "2"


def test_a_rating_is_stored_as_it_was_sent(ada: User, with_content: Store) -> None:
    with_content()
    ratings = ["up", True, 1, 0.5, None]
    for rating in ratings:
        ada("POST", "/sessions/s/feedback", json={"rating": rating})
    shown = [each["rating"] for each in ada("GET", "/sessions/s/feedback").json()["feedbacks"]]
    assert json.dumps(shown) == json.dumps(["up", *ratings])


def test_usage_is_by_agent_and_overall(ada: User, with_content: Store) -> None:
    with_content()
    usage = ada("GET", "/sessions/s/usage").json()
    assert usage["agents"]["agent"] == usage["total"]
    assert usage["total"]["invocations"] == 2


# Rewind, fork, delete.


def test_a_question_is_edited(ada: User, with_content: Store) -> None:
    with_content()
    answer = ada("POST", "/sessions/s/rewind", json={"at_message": 1, "keep_as": "before"})
    assert answer.status_code == 204, answer.text
    assert told(ada("GET", "/sessions/s/messages").json()["messages"]) == ["a0", "q0"]
    assert told(ada("GET", "/sessions/before/messages").json()["messages"]) == ["a1", "q1", "a0", "q0"]
    assert ada("POST", "/sessions/s/rewind", json={"at_message": {"agent": -1}}).status_code == 204
    assert ada("GET", "/sessions/s/messages").json()["messages"] == []
    answer = ada("POST", "/sessions/s/rewind", json={"at_message": 5})
    assert (answer.status_code, answer.json()) == (404, {"detail": "the agent has no such message"})


def test_a_session_is_not_rewound_during_a_turn(
    ada: User, factory: MongoDBSessionManagerFactory, with_content: Store
) -> None:
    with_content()
    with factory.create_session_manager("s", on_busy="wait"):
        answer = ada("POST", "/sessions/s/rewind", json={"at_message": 1})
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    assert answer.json() == {"detail": "the session is busy with another request: repeat this one later"}
    assert len(ada("GET", "/sessions/s/messages").json()["messages"]) == 4


def test_a_fork_tells_its_address(ada: User, bob: User, with_content: Store) -> None:
    with_content()
    answer = ada("POST", "/sessions/s/fork", json={"new_id": "what if?", "at_message": 1})
    assert (answer.status_code, answer.json()) == (201, {"session_id": "what if?"})
    address = urljoin(str(answer.url), answer.headers["location"])
    shown = ada("GET", address).json()
    assert (shown["session_id"], shown["owner"], shown["message_counts"]) == ("what if?", "ada", {"agent": 2})
    assert bob("GET", address).status_code == 404
    answer = ada("POST", "/sessions/s/fork", json={"new_id": "what if?"})
    assert (answer.status_code, answer.json()) == (409, {"detail": "a session with that id already exists"})


def test_a_deleted_session_is_gone(ada: User, with_content: Store, stored: Stored) -> None:
    with_content()
    assert ada("DELETE", "/sessions/s").status_code == 204
    assert stored.find_one() is None
    assert ada("DELETE", "/sessions/s").status_code == 404


# Bad input.

REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no page": ("GET", "", {"params": {"limit": 0}}, "limit: Input should be greater than or equal to 1"),
    "a large page": ("GET", "/s/messages", {"params": {"limit": 101}}, "limit: Input should be less than or equal to"),
    "a cursor": ("GET", "", {"params": {"cursor": "x"}}, "cursor must be the next_cursor of a page"),
    "an order": ("GET", "", {"params": {"order": "$x"}}, "order: Input should be '-updated_at'"),
    "a date": ("GET", "", {"params": {"created_after": "x"}}, "created_after: Input should be a valid datetime"),
    "a tag": ("GET", "", {"params": {"tags": ""}}, "tags[0] must not be empty"),
    "a position": ("GET", "/s/messages", {"params": {"before": -1}}, "before: Input should be greater than"),
    "a far position": (
        "GET",
        "/s/messages",
        {"params": {"before": 2**70, "agent_id": "agent"}},
        "before must be an int >= 0 and < 2**63",
    ),
    "an agent": ("GET", "/s/messages", {"params": {"agent_id": "a\0"}}, "agent_id must not contain a NUL character"),
    "a session": ("GET", "/a%00b", {}, "session_id must not contain a NUL character"),
    "a title": ("PATCH", "/s", {"json": {"title": 5}}, "title: Input should be a valid string"),
    "a long title": ("PATCH", "/s", {"json": {"title": "x" * 1001}}, "title must have at most 1000 characters"),
    "half a pair": ("PATCH", "/s", {"content": r'{"tags": ["\ud83d"]}'}, "tags[0] must be valid Unicode"),
    "an unknown field": ("PATCH", "/s", {"json": {"titel": "x"}}, "titel: Extra inputs are not permitted"),
    "half a key": ("POST", "/s/fork", {"content": r'{"at_message": {"\ud83d": ""}}'}, "new_id: Field required; at_"),
    "no JSON": ("PATCH", "/s", {"content": "{title: x}"}, "body: JSON decode error"),
    "no object": ("PATCH", "/s/metadata", {"json": [1]}, "body: Input should be a valid dictionary or object"),
    "no body": ("POST", "/s/rewind", {}, "body: Field required"),
    "an operator": ("PATCH", "/s/metadata", {"json": {"metadata": {"$set": 1}}}, "metadata contains the key '$set'"),
    "a deep key": ("PATCH", "/s/metadata", {"json": {"metadata": {"a" + ".b" * 200: 1}}}, "metadata contains a key of"),
    "a value": ("PATCH", "/s/metadata", {"content": '{"metadata": NaN}'}, "metadata: Input should be a valid dict"),
    "no list": ("POST", "/s/feedback", {"json": ["good"]}, "body: Input should be a valid dictionary or object"),
    "a comment": ("POST", "/s/feedback", {"json": {"comment": {"$ne": 1}}}, "comment: Input should be a valid string"),
    "a message": ("POST", "/s/rewind", {"json": {"at_message": "1"}}, "at_message.int: Input should be a valid int"),
    "a truth": ("POST", "/s/rewind", {"json": {"at_message": True}}, "at_message.int: Input should be a valid int"),
    "a low message": ("POST", "/s/rewind", {"json": {"at_message": -2}}, "at_message"),
    "a high message": ("POST", "/s/fork", {"json": {"at_message": 2**70, "new_id": "t"}}, "at_message"),
    "an id": ("POST", "/s/fork", {"json": {"new_id": ""}}, "new_id must not be empty"),
    "a long id": ("POST", "/s/fork", {"json": {"new_id": "x" * 1001}}, "new_id: String should have at most 1000 char"),
    "a long id to keep": (
        "POST",
        "/s/rewind",
        {"json": {"at_message": 1, "keep_as": "x" * 1001}},
        "keep_as: String should have at most 1000 characters",
    ),
    "an object": ("POST", "/s/fork", {"json": {"new_id": {"$ne": 1}}}, "new_id: Input should be a valid string"),
}  # fmt: skip


def test_what_a_client_does_wrong_is_named_before_anything_is_sent(ada: User, commands: CommandLog) -> None:
    for what, (method, path, options, detail) in REFUSED.items():
        answer = ada(method, f"/sessions{path}", **options)
        assert answer.status_code == 422, (what, answer.text)
        assert answer.json()["detail"].startswith(detail), what
        assert answer.json().keys() == {"detail"}, what
        assert commands.names == [], what


def test_no_answer_for_an_invalid_request_is_as_long_as_the_request(ada: User) -> None:
    given = {"tags": [1] * 10_000, "x" * 10_000: 1}
    detail = ada("PATCH", "/sessions/s", json=given).json()["detail"]
    assert detail.startswith("tags.0: Input should be a valid string; tags.1: ")
    assert len(detail) < 1000


# OpenAPI.


def documented(router: Any) -> dict[str, Any]:
    app = FastAPI()
    app.include_router(router)
    return app.openapi()


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return documented(sessions_router(owner=current_user))


def test_every_status_is_documented(openapi: dict[str, Any]) -> None:
    for name, route in ROUTES.items():
        (method,) = route.methods
        operation = openapi["paths"][route.path][method.lower()]
        expected = {str(route.status_code), "422", "503"}
        expected |= {"404"} if name in OF_A_SESSION else set()
        expected |= {"409", "413"} if method != "GET" else set()
        assert operation["responses"].keys() == expected, name
        for status, answer in operation["responses"].items():
            assert answer["description"]
            if status == "204":
                assert "content" not in answer
                continue
            schema = answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert ("Retry-After" in answer.get("headers", {})) == (status in ("409", "503"))
            if status >= "400":
                assert openapi["components"]["schemas"][schema]["properties"]["detail"]["type"] == "string"
        assert operation["summary"], name
        assert operation["tags"] == ["sessions"], name
        assert operation["security"] == [{"OAuth2PasswordBearer": []}], name
        assert ("requestBody" in operation) == (name in BODIES), name


def test_a_page_has_at_most_100_entries_in_openapi(openapi: dict[str, Any]) -> None:
    for path in ("/sessions", "/sessions/{session_id}/messages"):
        parameters = {each["name"]: each for each in openapi["paths"][path]["get"]["parameters"]}
        schema = parameters["limit"]["schema"]
        assert (schema["minimum"], schema["maximum"], schema["default"]) == (1, 100, 20)


# Options.


def test_operations_can_be_left_out() -> None:
    router = sessions_router(owner=None, exclude=["delete_session", "update_metadata"])
    names = {route.name for route in router.routes}  # type: ignore[attr-defined]
    assert names == ROUTES.keys() - {"delete_session", "update_metadata"}
    for unknown in (["delete"], "delete_session"):
        with pytest.raises(ConfigurationError, match="exclude must contain only list_sessions, get_session, "):
            sessions_router(owner=None, exclude=unknown)


def test_who_may_use_the_sessions_must_be_said() -> None:
    with pytest.raises(TypeError, match="owner"):
        sessions_router()  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="owner must be a dependency that returns the owner, or None"):
        sessions_router(owner="ada")  # type: ignore[arg-type]


def test_the_options_of_a_router_are_used(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    def refuse() -> None:
        raise HTTPException(403, "not you")

    async def who() -> str:
        raise HTTPException(401, "who?")

    app = FastAPI()
    add_session_support(app)
    app.state.mongodb_session_factory = factory
    app.include_router(sessions_router(owner=lambda: "ada", prefix="/chats", dependencies=[Depends(refuse)]))
    options: dict[str, Any] = {"include_in_schema": False, "responses": {401: {}}, "tags": ["chats"]}
    app.include_router(sessions_router(owner=who, dependencies=[Depends(refuse)], **options))
    client = TestClient(app)
    assert client.get("/chats").status_code == 403
    assert client.get("/sessions").json() == {"detail": "who?"}  # the owner comes first
    assert commands.names == []
    assert "/sessions" not in app.openapi()["paths"]


def test_a_router_whose_errors_nothing_would_answer_is_refused(factory: MongoDBSessionManagerFactory) -> None:
    app = FastAPI()
    app.state.mongodb_session_factory = factory
    app.include_router(sessions_router(owner=None))
    with pytest.raises(RuntimeError, match=r"call add_session_support\(app\) before the app starts"):
        TestClient(app).get("/sessions")


def test_a_request_is_not_repeated_in_its_error(ada: User) -> None:
    secret = "4111-1111"
    answer = ada("POST", "/sessions/s/feedback", json={"comment": {"text": secret}})
    assert answer.status_code == 422
    assert secret not in answer.text
