"""Sessions with attachments, what is left of one, and failures at each command of a copy: for exports and forks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pymongo
from strands.types.session import SessionMessage

from fix_archive import SMALL, said
from mongodb_session_manager import MongoDBSessionError, MongoDBSessionRepository
from support import client_of

Stored = pymongo.collection.Collection[dict[str, Any]]

KIB, MIB = 1024, 1024 * 1024


def with_image(message_id: int, data: bytes) -> SessionMessage:
    message = said(message_id)
    message.message["content"].append({"image": {"format": "png", "source": {"bytes": data}}})
    return message


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def all_of(repository: MongoDBSessionRepository, session_id: str) -> dict[str, Any]:
    """Everything that can be read of a session."""
    agents = [config["agent_id"] for config in repository.list_agents(session_id)]
    return {
        "session": {**vars(repository.read_session(session_id)), "session_id": None},
        "agents": {agent_id: repository.read_agent(session_id, agent_id) for agent_id in agents},
        "messages": {agent_id: repository.list_messages(session_id, agent_id) for agent_id in agents},
        "configs": repository.list_agents(session_id),
        "counts": [repository.get_message_count(session_id, agent_id) for agent_id in agents],
        "usage": repository.get_usage(session_id),
        "metadata": repository.get_metadata(session_id),
        "feedbacks": repository.get_feedbacks(session_id),
    }


def of_file(part_id: dict[str, Any]) -> dict[str, Any]:
    file = part_id.get("file")
    return file if isinstance(file, dict) else {}


def left_of(stored: Stored, session_id: str) -> list[str]:
    """The collections that hold anything of a session."""
    database = stored.database
    return [
        name
        for name in database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
        for document in database[name].find({}, {"session_id": 1})
        if session_id in (document["_id"], document.get("session_id"))
        or (isinstance(document["_id"], dict) and document["_id"].get("session_id") == session_id)
        or (isinstance(document["_id"], dict) and of_file(document["_id"]).get("session_id") == session_id)
    ]


def same_content(repository: MongoDBSessionRepository, session_id: str, other: str) -> None:
    assert all_of(repository, session_id) == all_of(repository, other)


@contextmanager
def fails_at(uri: str, number: int, **failure: Any) -> Iterator[None]:
    """Have the server fail the command of that number, from 0, that the application `copying` sends."""
    names = ["find", "update", "insert", "delete", "aggregate"]
    data = {"failCommands": names, "appName": "copying", **failure}
    with client_of(uri) as client:
        client.admin.command({"configureFailPoint": "failCommand", "mode": {"skip": number}, "data": data})
        try:
            yield
        finally:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


def copying(server: str, database: str) -> MongoDBSessionRepository:
    return MongoDBSessionRepository(
        server,
        database,
        appName="copying",
        **SMALL,
        max_inline_attachment_bytes=1000,
        retryReads=False,
        retryWrites=False,
    )


def every_failure(
    server: str,
    database: str,
    stored: Stored,
    act: Callable[[MongoDBSessionRepository], object],
    check: Callable[[MongoDBSessionRepository], None],
    count: int,
    numbers: Iterable[int] | None = None,
) -> None:
    """Let `act`, which makes session `t` with `count` commands, fail for good from a command on, and repeat it.

    Args:
        numbers: Numbers of the commands, from 0; by default of all of them.
    """
    with copying(server, database) as repository:
        repository.session_exists("warm-up")
        for number in range(count + 1) if numbers is None else numbers:
            with fails_at(server, number, errorCode=8000):
                try:
                    act(repository)
                    failed = False
                except MongoDBSessionError:
                    failed = True
            # The command that makes it live may be the last one that does not fail.
            is_there = stored.find_one({"_id": "t", "state": None}) is not None
            assert is_there or failed
            assert failed or number > count // 2
            if not is_there:
                assert not repository.session_exists("t")
                act(repository)
            check(repository)
            for name in stored.database.list_collection_names():
                stored.database[name].delete_many({"session_id": "t"})
