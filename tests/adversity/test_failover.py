"""The primary of a replica set is killed and restarted during turns of agents, some of them in one session."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pymongo
import pytest
from strands import Agent

from fix_servers import Cluster
from mongodb_session_manager import (
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    MongoDBSessionManagerFactory,
    SessionConflictError,
)
from support import agent, eventually, message_ids, texts

LOST = (DatabaseUnavailableError, DatabaseTimeoutError)
ONE_DOCUMENT: dict[str, Any] = {"max_embedded_messages": 100_000, "max_embedded_bytes": 8 << 20}
IN_LINE: dict[str, Any] = {"on_busy": "wait", "busy_timeout": 120, "lease": 20, **ONE_DOCUMENT}
SHARED = "shared"
"""The session whose users wait for each other's turns."""

PAUSE = (0.5, 1.0)
"""Seconds between a user's turns: shorter ones keep the processor busy and show nothing more."""


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return 10 if request.config.getoption("--full-adversity") else 1


@pytest.fixture
def replica_set() -> Iterator[Cluster]:
    with Cluster(server_parameters={"enableTestCommands": 1}) as servers:
        yield servers


@dataclass
class User:
    """Runs turns, one after the other, each with a unique text, and continues after a failed turn.

    Attributes:
        name: The prefix of every text of the user.
        keeps: Whether it keeps its manager and agent, like a desktop application, or opens the session with new ones
            for each turn, like a web server.
        acknowledged: The texts whose storing was acknowledged.
        said: All texts of the user and the agent.
        failed: The number of turns that raised an error.
        in_turn: Whether a turn is running.
    """

    name: str
    factory: MongoDBSessionManagerFactory
    stop: threading.Event
    keeps: bool
    acknowledged: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    failed: int = 0
    in_turn: bool = False
    shares: bool = False

    @property
    def session_id(self) -> str:
        return SHARED if self.shares else self.name

    @property
    def expected(self) -> tuple[type[Exception], ...]:
        """The expected errors of a turn; a turn that takes too long loses its lease to the next user of the session."""
        return (*LOST, SessionConflictError) if self.shares else LOST

    def next_turn(self, asked: Agent) -> str:
        """Script the agent's next turn and return the prompt."""
        text = f"{self.name}-{len(self.said)}"
        self.said.append(text)

        def answer(_: object) -> str:
            self.acknowledged.append(text)  # otherwise the model is not called
            self.said.append(text + "-answered")
            return text + "-answered"

        asked.model.replies.clear()
        asked.model.replies.append(answer)
        return text

    def answered(self) -> None:
        self.acknowledged.append(self.said[-1])


class SyncUser(User):
    def live(self) -> None:
        manager: Any = None
        while not self.stop.is_set():
            try:
                self.in_turn = True
                if self.keeps:
                    if manager is None:
                        manager = self.factory.create_session_manager(self.session_id)
                        asked = agent(manager)
                    asked(self.next_turn(asked))
                else:
                    with self.factory.create_session_manager(self.session_id) as manager:
                        asked = agent(manager)
                        asked(self.next_turn(asked))
                self.answered()
            except self.expected:
                self.failed += 1
            self.in_turn = False
            time.sleep(random.uniform(*PAUSE))
        if self.keeps:
            manager.flush()
            manager.close()
            assert texts(asked.messages) == self.said[-len(asked.messages) :]


class AsyncUser(User):
    async def live(self) -> None:
        manager: Any = None
        while not self.stop.is_set():
            try:
                self.in_turn = True
                if self.keeps:
                    if manager is None:
                        manager = await self.factory.create_session_manager_async(self.session_id)
                        asked = agent(manager)
                    await asked.invoke_async(self.next_turn(asked))
                else:
                    async with await self.factory.create_session_manager_async(self.session_id) as manager:
                        asked = agent(manager)
                        await asked.invoke_async(self.next_turn(asked))
                self.answered()
            except self.expected:
                self.failed += 1
            self.in_turn = False
            await asyncio.sleep(random.uniform(*PAUSE))
        if self.keeps:
            await manager.flush()
            await manager.close()
            assert texts(asked.messages) == self.said[-len(asked.messages) :]


@pytest.mark.timeout(900)
def test_failover(replica_set: Cluster, rounds: int) -> None:
    uri, stop = replica_set.connection_string, threading.Event()
    with (
        MongoDBSessionManagerFactory(uri, "failover", **ONE_DOCUMENT) as patient,
        MongoDBSessionManagerFactory(uri, "failover", serverSelectionTimeoutMS=500, **ONE_DOCUMENT) as hasty,
        MongoDBSessionManagerFactory(uri, "failover", **IN_LINE) as polite,
        MongoDBSessionManagerFactory(uri, "failover", **IN_LINE) as elsewhere,
        ThreadPoolExecutor(7) as threads,
    ):
        factories = [patient, hasty]
        users: list[User] = [
            kind(f"{kind.__name__}-{'same' if keeps else 'new'}-manager-{number}", factory, stop, keeps)
            for kind in (SyncUser, AsyncUser)
            for keeps in (True, False)
            for number, factory in enumerate(factories)
        ]
        users += [
            kind(f"{kind.__name__}-in-line-{number}", factory, stop, keeps=False, shares=True)
            for kind in (SyncUser, AsyncUser)
            for number, factory in enumerate((polite, elsewhere))
        ]

        async def all_live() -> None:
            await asyncio.gather(*(user.live() for user in users if isinstance(user, AsyncUser)))

        living = [threads.submit(user.live) for user in users if isinstance(user, SyncUser)]
        living.append(threads.submit(asyncio.run, all_live()))
        try:
            for _ in range(rounds):
                all_have_turns(users, living)
                fail_over(replica_set, users, living)
            all_have_turns(users, living)
        finally:
            stop.set()
        for life in living:
            life.result(60)
    check(replica_set, users, hasty)


def all_have_turns(users: list[User], living: list[Future[None]]) -> None:
    """Wait until two more messages of every user are stored."""
    before = [len(user.acknowledged) for user in users]

    def all_had() -> bool:
        for life in living:
            if life.done():
                life.result()
        return all(len(user.acknowledged) >= count + 2 for user, count in zip(users, before, strict=True))

    eventually(all_had, seconds=120)


def fail_over(replica_set: Cluster, users: list[User], living: list[Future[None]]) -> None:
    """Kill the primary with writes that are not replicated, continue on the others, and restart it."""
    killed = replica_set.primary()
    others = [member.port for number, member in enumerate(replica_set.members) if number != killed]
    with replication_stopped(others):
        eventually(lambda: all(user.in_turn for user in users))  # from here on, no write can be acknowledged
        replica_set.kill(killed)
    assert replica_set.primary() != killed
    all_have_turns(users, living)
    replica_set.restart(killed)


@contextmanager
def replication_stopped(ports: list[int]) -> Iterator[None]:
    with ExitStack() as stack:
        clients = [stack.enter_context(pymongo.MongoClient("127.0.0.1", port, directConnection=True)) for port in ports]
        for mode in ("alwaysOn", "off"):
            for client in clients:
                client.admin.command({"configureFailPoint": "stopReplProducer", "mode": mode})
            if mode == "alwaysOn":
                yield


def check(replica_set: Cluster, users: list[User], hasty: MongoDBSessionManagerFactory) -> None:
    with pymongo.MongoClient(replica_set.connection_string) as client:
        documents = {document["_id"]: document for document in client["failover"]["agent_sessions"].find()}
    assert documents.keys() == {user.session_id for user in users}
    for user in users:
        stored = documents[user.session_id]["agents"]["agent"]
        conversation = texts(stored["messages"])
        assert message_ids(documents[user.session_id]) == list(range(len(conversation)))
        if user.shares:
            assert "token" not in documents[SHARED]["lease"]
            answers = [n for n, text in enumerate(conversation) if text.endswith("-answered")]
            assert all(conversation[n] == f"{conversation[n - 1]}-answered" for n in answers)
        assert stored["next_message_id"] == len(stored["messages"])
        assert all(entry.keys() >= {"message", "message_id", "created_at"} for entry in stored["messages"])
        assert len(set(conversation)) == len(conversation)
        conversation = [text for text in conversation if text.startswith(f"{user.name}-")]
        known = set(user.acknowledged)
        assert [text for text in conversation if text in known] == user.acknowledged
        order = {text: position for position, text in enumerate(user.said)}
        assert conversation == sorted(conversation, key=order.__getitem__)
        if user.keeps:
            assert conversation == user.said
    acknowledged = sum(len(user.acknowledged) for user in users)
    print(f"{acknowledged} messages acknowledged, {sum(user.failed for user in users)} turns failed")
    failed = sum(user.failed for user in users if user.factory is hasty)
    assert failed, "no turn failed during the failover"
