"""The application is killed at random, repeatedly: every acknowledged message is stored, once and in order."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import pymongo
import pytest

import interpreter
from proxy import Proxy
from support import eventually, message_ids, texts

AGENTS = 20

LIFE = """
import asyncio, itertools, os, sys, threading
from mongodb_session_manager import MongoDBSessionManagerFactory
from support import agent

uri, database, life, kind = sys.argv[1:]

def stored(session_id, text):
    os.write(1, f"{session_id} {text}\\n".encode())

def turns(session_id, asked):
    for number in itertools.count():
        text = f"{life}-{number}"
        def answer(_):
            stored(session_id, text + "-asked")  # otherwise the model is not called
            return text + "-answered"
        asked.model.replies.append(answer)
        yield text + "-asked"
        stored(session_id, text + "-answered")

def live(factory, session_id):
    asked = agent(factory.create_session_manager(session_id))
    for text in turns(session_id, asked):
        asked(text)

async def live_async(factory, session_id):
    asked = agent(await factory.create_session_manager_async(session_id))
    for text in turns(session_id, asked):
        await asked.invoke_async(text)

async def all_live(factory, names):
    await asyncio.gather(*(live_async(factory, name) for name in names))

names = sys.stdin.readline().split()
with MongoDBSessionManagerFactory(uri, database) as factory:
    if kind == "async":
        asyncio.run(all_live(factory, names))
    for name in names:
        threading.Thread(target=live, args=(factory, name)).start()
    threading.Event().wait()
"""


class Life:
    """A process that runs turns in every session, from `begin` until it is killed."""

    def __init__(self, uri: str, database: str, number: int, kind: str) -> None:
        self.process = interpreter.start(LIFE, uri, database, number, kind)

    def begin(self, sessions: list[str]) -> None:
        self.process.stdin.write(" ".join(sessions) + "\n")
        self.process.stdin.flush()

    def read(self, count: int) -> list[str]:
        """Return the next `count` lines of its output."""
        lines = [self.process.stdout.readline() for _ in range(count)]
        assert all(lines), self.process.stderr.read()
        return lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__()

    def kill(self) -> list[str]:
        """Kill it and return its output up to then."""
        self.process.send_signal(signal.SIGKILL)
        said, stderr = self.process.stdout.readlines(), self.process.stderr.read()
        assert self.process.wait(60) == -signal.SIGKILL, stderr
        assert stderr == ""
        return said


@pytest.fixture
def lives(request: pytest.FixtureRequest) -> int:
    return 20 if request.config.getoption("--full-adversity") else 2


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        proxy.delay = 0.005  # so that commands are in flight during most of a life
        yield proxy


def turns_of(life: int, count: int) -> list[str]:
    """Return the first `count` messages of a life."""
    return [f"{life}-{number // 2}-{('asked', 'answered')[number % 2]}" for number in range(count)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_killed_at_random(
    proxy: Proxy,
    database: str,
    stored: pymongo.collection.Collection[dict[str, object]],
    kind: str,
    lives: int,
) -> None:
    sessions = [f"session-{number}" for number in range(AGENTS)]
    known: list[list[str]] = []
    with ExitStack() as stack:
        coming = stack.enter_context(Life(proxy.uri, database, 0, kind))
        for number in range(lives):
            life = coming
            if number + 1 < lives:  # the next process starts while this one lives, because starting takes as long
                coming = stack.enter_context(Life(proxy.uri, database, number + 1, kind))
            life.begin(sessions)
            said = life.read(random.randint(1, 6 * AGENTS))
            time.sleep(random.uniform(0, 0.05))
            known.append(said + life.kill())
            eventually(lambda: not proxy.open_connections)
    unsaid = 0
    for session_id in sessions:
        conversation = stored_conversation(stored, session_id)
        # The last write of a life can still have been in flight when the process was killed.
        counts = [sum(text.startswith(f"{number}-") for text in conversation) for number in range(lives)]
        assert conversation == [text for number, count in enumerate(counts) for text in turns_of(number, count)]
        for number, count in enumerate(counts):
            acknowledged = [line.split()[1] for line in known[number] if line.startswith(f"{session_id} ")]
            assert acknowledged == turns_of(number, len(acknowledged))
            assert count - len(acknowledged) in (0, 1)
            unsaid += count - len(acknowledged)
    assert unsaid > 0, "no process was killed between a write and its acknowledgement"


def stored_conversation(stored: pymongo.collection.Collection[dict[str, object]], session_id: str) -> list[str]:
    """Return the stored texts; check that the document is well-formed."""
    document = stored.find_one({"_id": session_id})
    if document is None or "agent" not in document["agents"]:
        return []
    found = document["agents"]["agent"]
    count = len(found["messages"])
    assert message_ids(document) == list(range(count))
    assert found["next_message_id"] == count
    assert [set(entry) >= {"message", "message_id", "created_at", "updated_at"} for entry in found["messages"]]
    return texts(found["messages"])
