"""Whose session it is: what another user can find out about a session, and do to it, which is nothing."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pymongo
import pytest
from strands.types.session import SessionAgent, SessionMessage

from fix_archive import said
from fix_copying import content, with_image
from fix_finding import idle
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from orchestrators import node, pipeline
from support import CommandLog, alternating, eventually

pytestmark = pytest.mark.anyio

Stored = pymongo.collection.Collection[dict[str, Any]]

THEIRS, ABSENT = "theirs", "absent"


def a_message() -> SessionMessage:
    return SessionMessage({"role": "user", "content": [{"text": "hi"}]}, 0)


def an_agent() -> SessionAgent:
    return SessionAgent("agent", {"stolen": True}, {})


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "open_session": lambda: {"must_exist": True},
    "read_session": dict,
    "delete_session": dict,
    "create_agent": lambda: {"session_agent": SessionAgent("new", {}, {})},
    "read_agent": lambda: {"agent_id": "agent"},
    "update_agent": lambda: {"session_agent": an_agent()},
    "create_message": lambda: {"agent_id": "agent", "session_message": said(12)},
    "read_message": lambda: {"agent_id": "agent", "message_id": 1},
    "update_message": lambda: {"agent_id": "agent", "session_message": a_message()},
    "list_messages": lambda: {"agent_id": "agent"},
    "create_multi_agent": lambda: {"multi_agent": pipeline(None, node("one"))},
    "read_multi_agent": lambda: {"multi_agent_id": "pipeline"},
    "update_multi_agent": lambda: {"multi_agent": pipeline(None, node("one"))},
    "update_metadata": lambda: {"metadata": {"a.b": 1}},
    "get_metadata": dict,
    "delete_metadata": lambda: {"keys": ["a.b"]},
    "add_feedback": lambda: {"feedback": {"rating": "down"}},
    "get_application_name": dict,
    "get_feedbacks": dict,
    "get_agent_config": lambda: {"agent_id": "agent"},
    "list_agents": dict,
    "update_agent_config": lambda: {"agent_id": "agent", "model": "other"},
    "get_message_count": lambda: {"agent_id": "agent"},
    "get_usage": dict,
    "update_session": lambda: {"title": "mine", "tags": None},
    "claim_session": dict,
    "get_session_summary": dict,
    "session_exists": dict,
    "export_session": dict,
    "fork_session": lambda: {"new_id": "fork"},
    "write_back": dict,
    "create_session_manager": lambda: {"must_exist": True},
}
"""The arguments of each method that takes the id of a session, besides the session and the owner."""

CREATES = {"import_session"}
"""A new id cannot be that of another session, and the error says so."""

CLASSES = [MongoDBSessionRepository, AsyncMongoDBSessionRepository, MongoDBSessionManagerFactory]


def methods_of(cls: type) -> list[str]:
    """The public methods that take the id of a session."""
    return [
        name
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") and "session_id" in inspect.signature(method).parameters
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_method_that_takes_the_id_of_a_session_takes_an_owner(cls: type) -> None:
    """A new method needs one, too, and an entry in `ARGUMENTS`: then the tests below cover it."""
    found = methods_of(cls)
    assert {name.removesuffix("_async") for name in found} <= ARGUMENTS.keys() | CREATES
    without = {name for name in found if "owner" not in inspect.signature(getattr(cls, name)).parameters}
    assert without == {name for name in found if name.startswith("create_session_manager")}  # it is one of its options


def with_content(repository: MongoDBSessionRepository) -> None:
    """Give a session everything that a session can have."""
    repository.open_session(THEIRS, owner="bob")
    repository.create_agent(THEIRS, SessionAgent("agent", {"secret": 1}, {}))
    for number in range(11):
        repository.create_message(THEIRS, "agent", said(number))
    repository.create_message(THEIRS, "agent", with_image(11, content(4096)))
    repository.create_multi_agent(THEIRS, pipeline(None, node("one")))
    repository.update_metadata(THEIRS, {"a": {"b": "secret"}})
    repository.add_feedback(THEIRS, {"rating": "up"})
    repository.update_agent_config(THEIRS, "agent", model="secret")
    repository.update_session(THEIRS, title="secret", tags=["secret"])


def everything(stored: Stored) -> dict[str, list[dict[str, Any]]]:
    names = stored.database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    return {name: list(stored.database[name].find({}, sort=[("_id", 1)])) for name in sorted(names)}


class Attacker:
    """Calls the methods of an object that has worked on the session before, and knows what it has read then."""

    def __init__(self, cls: type, server: str, database: str, commands: CommandLog, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._commands = commands
        options |= {"event_listeners": [commands], "max_embedded_messages": 4, "max_inline_attachment_bytes": 1024}
        self.target: Any = cls(server, database, **options)
        self._connection = getattr(self.target, "_async", self.target)._connection

    def run(self, method: Callable[..., Any], **arguments: Any) -> Any:
        result = method(**arguments)
        if inspect.isasyncgen(result):
            return self._runner.run(self._listed(result))
        if inspect.isawaitable(result):
            return self._runner.run(self._awaited(result))
        return list(result) if inspect.isgenerator(result) else result

    async def _listed(self, items: Any) -> list[Any]:
        return [item async for item in items]

    async def _awaited(self, result: Any) -> Any:
        return await result

    def outcome(self, name: str, session_id: str, **owner: str) -> tuple[Any, list[str]]:
        """Return what a call returns or raises, and the commands that it sends."""
        self._commands.clear()
        arguments = ARGUMENTS[name.removesuffix("_async")]()
        result: Any
        try:
            result = self.run(getattr(self.target, name), session_id=session_id, **arguments, **owner)
        except Exception as error:
            result = type(error), str(error).replace(session_id, "<id>")
        self.settle()
        return result, list(self._commands.names)

    def settle(self) -> None:
        if isinstance(self.target, AsyncMongoDBSessionRepository):
            self._runner.run(idle(self._connection))
        else:
            eventually(lambda: not self._connection._tasks)

    def close(self) -> None:
        self.run(self.target.close)
        self._runner.close()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("of", alternating("bob", None))
@pytest.mark.parametrize("how", alternating("argument", "option"))
@pytest.mark.parametrize("ttl", alternating({}, {"session_ttl": timedelta(hours=1)}))
def test_a_session_of_another_is_one_that_does_not_exist(
    server: str,
    database: str,
    stored: Stored,
    commands: CommandLog,
    cls: type,
    of: str | None,
    how: str,
    ttl: dict[str, Any],
) -> None:
    """The same error with the same text after as many commands, and nothing has changed."""
    with MongoDBSessionRepository(
        server, database, max_embedded_messages=4, max_inline_attachment_bytes=1024, **ttl
    ) as repository:
        with_content(repository)
        eventually(lambda: not repository._async._connection._tasks)
    if of is None:
        stored.update_one({"_id": THEIRS}, {"$unset": {"owner": ""}})
    option, argument = ({"owner": "alice"}, {}) if how == "option" else ({}, {"owner": "alice"})
    attacker = Attacker(cls, server, database, commands, **option, **ttl)
    try:
        if how == "argument":
            attacker.outcome("session_exists", THEIRS)
            # What this process knows of the session must not help either.
            name = "write_back" if cls is MongoDBSessionManagerFactory else "update_message"
            attacker.outcome(name, THEIRS, **({} if of is None else {"owner": "bob"}))
        before = everything(stored)
        for name in methods_of(cls):
            base = name.removesuffix("_async")
            if base in CREATES or (base == "claim_session" and of is None):
                continue
            given = {"owner": "alice"} if base == "claim_session" else argument
            assert attacker.outcome(name, THEIRS, **given) == attacker.outcome(name, ABSENT, **given), name
            assert everything(stored) == before, name
    finally:
        attacker.close()
