"""A random walk through the lives of sessions: concurrent processes are killed anywhere, and a model checks the result.

A round forks processes. Each executes its own steps and reports every acknowledged step. At the end of the round all
processes have ended, killed or not. Then all leases are expired and a new process opens the sessions. The model knows
the sessions before the round and the acknowledged steps, and checks whether the result is possible.

Each message has a unique text, from which follow whether it has an attachment, and the bytes of the attachment.
"""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from pymongo.database import Database
from strands.agent.conversation_manager import NullConversationManager
from strands.types.content import ContentBlock

from from_v100 import OUTSIDE
from killing import Child, Killer, start
from mongodb_session_manager import (
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from support import agent, texts

LIMITS: dict[str, Any] = {"max_embedded_messages": 4, "max_inline_attachment_bytes": 100}
KINDS = ("append", "append", "append", "append", "redact", "rewind", "fork", "import", "delete", "open", "metadata")
CREATING = ("append", "fork", "import", "open")

TTL = timedelta(hours=1)
"""The retention of the sessions that the first process writes to."""

Say = Callable[[str, Any], None]
Step = tuple[str, str, str, str]  # kind, session, another session, a unique name


def attachment(text: str) -> bytes:
    return random.Random(text).randbytes(300)


def question(text: str) -> list[ContentBlock]:
    content: list[ContentBlock] = [{"text": text}]
    if text.endswith("+"):
        content.append({"image": {"format": "png", "source": {"bytes": attachment(text)}}})
    return content


def carry_out(
    uri: str, database: str, steps: list[Step], ttl: timedelta | None, options: dict[str, Any], killer: Killer, say: Say
) -> None:
    options = {**LIMITS, **options, "session_ttl": ttl, "event_listeners": [killer]}
    with (
        MongoDBSessionManagerFactory(uri, database, **options) as factory,
        MongoDBSessionRepository(uri, database, **options) as repository,
    ):
        killer.armed = True
        for number, step in enumerate(steps):
            say("begun", number)

            def stored(value: Any, number: int = number) -> None:
                say("stored", [number, value])

            try:
                carry_out_one(factory, repository, step, stored)
                say("done", number)
            except MongoDBSessionError as error:
                say("failed", [number, type(error).__name__, str(error)])
        killer.armed = False


def carry_out_one(factory: Any, repository: Any, step: Step, stored: Callable[[Any], None]) -> None:
    kind, session_id, other, name = step
    if kind == "append":
        with factory.create_session_manager(session_id) as manager:
            live = agent(manager, conversation_manager=NullConversationManager())
            model: Any = live.model
            for number in range(2):
                asked = f"{name}q{number}{'+' if len(name) % 2 else ''}"
                answer = f"{name}a{number}"

                def reply(_: object, asked: str = asked, answer: str = answer) -> str:
                    stored(asked)  # otherwise the model is not called
                    return answer

                model.replies.append(reply)
                live(question(asked))
                stored(answer)
    elif kind == "redact":
        messages = repository.list_messages(session_id, "agent")
        messages = [each for each in messages if not texts([each.to_message()])[0].startswith("gone ")]
        if messages:
            message = messages[zlib.crc32(name.encode()) % len(messages)]
            old = texts([message.to_message()])[0]
            message.redact_message = {"role": message.message["role"], "content": [{"text": f"gone {old}"}]}
            repository.update_message(session_id, "agent", message)
            stored(old)
    elif kind == "rewind":
        count = repository.get_message_count(session_id, "agent")
        repository.rewind_session(session_id, zlib.crc32(name.encode()) % (count + 1) - 1)
    elif kind == "fork":
        factory.fork_session(session_id, other)
    elif kind == "import":
        factory.import_session(list(factory.export_session(session_id)), other)
    elif kind == "delete":
        stored(factory.delete_session(session_id))
    elif kind == "metadata":
        repository.update_metadata(session_id, {name: 1})
    else:
        factory.create_session_manager(session_id).close()


@dataclass
class Totals:
    """The result of a walk."""

    rounds: int = 0
    steps: int = 0
    killed: int = 0
    acknowledged: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    strays: int = 0
    expired: int = 0

    def __str__(self) -> str:
        failures = ", ".join(f"{count} {name}" for name, count in self.failed.most_common()) or "none"
        return (
            f"{self.rounds} rounds, {self.steps} steps, {self.acknowledged} writes acknowledged, "
            f"{self.killed} processes killed, {self.expired} sessions expired; "
            f"refused: {failures}; strays of killed writers: {self.strays}"
        )


class Walk:
    """Sessions, and the facts that are known about them.

    Args:
        uri: The server.
        database: The database of the sessions.
        seed: The seed of all random choices.
        sessions: The number of session ids.
        processes: The number of processes of a round.
        options: Further options of their clients.
    """

    def __init__(
        self,
        uri: str,
        database: Database[dict[str, Any]],
        seed: int,
        *,
        sessions: int = 4,
        processes: int = 2,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.options = options or {}
        self.uri, self.database = uri, database
        self.random = random.Random(seed)
        self.ids = [f"session-{number}" for number in range(sessions)]
        self.processes = processes
        self.known: dict[str, list[str] | None] = dict.fromkeys(self.ids)
        self.redacted: set[str] = set()
        self.totals = Totals()

    # A round.

    def round(
        self, at: Callable[[], int | None], steps: int = 4, meanwhile: Callable[[list[Child]], None] | None = None
    ) -> None:
        """Run steps in concurrent processes, kill each at the command that `at()` returns, and check the result."""
        plans: list[list[Step]] = []
        children: list[Child] = []
        for process in range(self.processes):
            plan = [self._step(f"r{self.totals.rounds}p{process}s{number}") for number in range(steps)]
            plans.append(plan)
            kill_at, after = at(), self.random.random() < 0.5
            children.append(
                start(
                    partial(carry_out, self.uri, self.database.name, plan, None if process else TTL, self.options),
                    kill_at,
                    after,
                )
            )
        if meanwhile is not None:
            meanwhile(children)
        for child in children:
            child.wait()
        self.totals.rounds += 1
        self.totals.killed += sum(child.killed for child in children)
        self._check(list(zip(plans, children, strict=True)))

    def _step(self, name: str) -> Step:
        session_id, other = self.random.sample(self.ids, 2)
        return self.random.choice(KINDS), session_id, other, name + "x" * self.random.randrange(2)

    # Checks.

    def _check(self, done: list[tuple[list[Step], Child]]) -> None:
        ended = datetime(2020, 1, 1, tzinfo=UTC)
        self.database["agent_sessions"].update_many({"state": "copying"}, {"$set": {"state_until": ended}})
        story = [
            (kind, session_id, other, name, number in child.has_said("begun"), number in child.has_said("done"),
             [value for n, value in child.has_said("stored") if n == number], child)
            for plan, child in done
            for number, (kind, session_id, other, name) in enumerate(plan)
        ]  # fmt: skip
        story = [each for each in story if each[4]]
        self.totals.steps += len(story)
        for _, child in done:
            self.totals.failed.update(name for _, name, _ in child.has_said("failed"))
        before, found = dict(self.known), self._contents()
        for kind, _, _, _, _, _, stored, _ in story:
            if kind == "redact":
                self.redacted.update(stored)
            self.totals.acknowledged += len(stored)
        try:
            for session_id in self.ids:
                self._check_one(session_id, before, found, story)
            self._check_parts(story)
        except AssertionError as error:
            for each in story:
                error.add_note(f"{each[:4]} done={each[5]} stored={each[6]} killed={each[7].killed}")
            error.add_note(f"commands: {[child.commands[-12:] for _, child in done]}")
            error.add_note(f"failed: {[child.has_said('failed') for _, child in done]}")
            error.add_note(f"before: {before}")
            error.add_note(f"found: {found}")
            raise
        self.known = found

    def _contents(self) -> dict[str, list[str] | None]:
        """Return the texts of each session, read by a new process; check that every session is complete."""
        found: dict[str, list[str] | None] = {}
        with (
            MongoDBSessionRepository(self.uri, self.database.name, **LIMITS) as repository,
            MongoDBSessionManagerFactory(self.uri, self.database.name, **LIMITS) as factory,
        ):
            listed = {each.session_id for each in repository.list_sessions(limit=1000).sessions}
            for session_id in self.ids:
                if not repository.session_exists(session_id):
                    assert session_id not in listed
                    found[session_id] = None
                    continue
                assert session_id in listed
                with factory.create_session_manager(session_id) as manager:
                    if not repository.list_agents(session_id):
                        found[session_id] = []
                        continue
                    messages = repository.list_messages(session_id, "agent")
                    restored = agent(manager, conversation_manager=NullConversationManager()).messages
                said = texts([message.to_message() for message in messages])
                assert texts(restored) == said
                ids = [message.message_id for message in messages]
                assert ids == sorted(set(ids))
                for message, text in zip(messages, said, strict=True):
                    content: Any = message.to_message()["content"]
                    has = [block["image"]["source"]["bytes"] for block in content if "image" in block]
                    assert has == ([attachment(text)] if text.endswith("+") and not text.startswith("gone ") else [])
                assert sum(1 for _ in repository.export_session(session_id)) > len(messages)
                found[session_id] = said
            for each in list(self.database["agent_sessions"].find({"state": {"$exists": True}}, {"_id": 1})):
                factory.create_session_manager(each["_id"]).close()  # completes an interrupted operation
                factory.delete_session(each["_id"])
            end = time.monotonic() + 30
            while factory._connection._tasks or repository._async._connection._tasks:
                assert time.monotonic() < end
                time.sleep(0.005)
        return found

    def _check_one(self, session_id: str, before: dict[str, Any], found: dict[str, Any], story: list[Any]) -> None:
        old, now = before[session_id], found[session_id]
        own = [each for each in story if each[1] == session_id]
        deletions = [each for each in own if each[0] == "delete"]
        copies = [each for each in story if each[2] == session_id and each[0] in ("fork", "import")]
        creations = copies + [each for each in own if each[0] in ("append", "open")]
        acknowledged = [text for each in own if each[0] == "append" for text in each[6]]
        begun = {
            f"{each[3]}{part}{number}{'+' if part == 'q' and len(each[3]) % 2 else ''}"
            for each in own
            if each[0] == "append"
            for part in "qa"
            for number in range(2)
        }
        plain = [text.removeprefix("gone ") for text in now or []]
        assert len(set(plain)) == len(plain), "a message is stored twice"
        if now is None:
            assert old is None or deletions, "a session is lost"
            certain = [each for each in creations if each[5]]
            assert deletions or not certain, "a session that was created is lost"
            return
        assert old is not None or creations, "a session exists that no step has created"
        possible = begun | {text.removeprefix("gone ") for text in old or []}
        for each in copies:
            sources = {text.removeprefix("gone ") for text in before[each[1]] or []}
            sources |= {
                f"{other[3]}{part}{number}{plus}"
                for other in story
                if other[0] == "append"
                for part in "qa"
                for number in range(2)
                for plus in ("", "+")
            }
            for other in story:
                if other[0] in ("fork", "import"):
                    sources |= {text.removeprefix("gone ") for text in before[other[1]] or []}
            possible |= sources
        assert set(plain) <= possible, "a message exists that no step has stored"
        if not deletions:
            kept = [text.removeprefix("gone ") for text in old or []]
            rewinds = [each for each in own if each[0] == "rewind"]
            stayed = [text for text in plain if text in kept]
            assert stayed == kept[: len(stayed)] == plain[: len(stayed)], "an earlier message is not where it was"
            if not rewinds:
                assert stayed == kept, "a message is lost"
            acknowledged = [text for text in acknowledged if not rewinds or text in plain]
            assert [text for text in plain if text in acknowledged] == sorted(acknowledged, key=plain_order(plain))
            assert set(acknowledged) <= set(plain), "an acknowledged message is lost"
            for each in own:
                if each[0] == "redact":
                    assert not set(each[6]) & set(now), "an acknowledged redaction is undone"
            for text in (old or [])[: len(stayed)]:
                if text.startswith("gone "):
                    assert text in now, "a redaction is undone"
        elif any(each[5] for each in deletions) and not creations:
            raise AssertionError("a deleted session is there")

    def _check_parts(self, story: list[Any]) -> None:
        """Check that every part belongs to a live session; a killed writer can leave parts of a deleted one."""
        live = {each["incarnation"]: each.get("expires_at") for each in self.database["agent_sessions"].find()}
        assert not self.database["agent_sessions"].count_documents({"state": {"$exists": True}})
        deleted = {each[1] for each in story if each[0] == "delete"}
        writers = {name for each in story if each[7].killed for name in each[1:3]}
        for suffix in OUTSIDE:
            for part in list(self.database[f"agent_sessions{suffix}"].find({}, {"messages": 0, "data": 0})):
                found = part["_id"]
                incarnation = found.get("incarnation") or found["file"]["incarnation"]
                if incarnation not in live:
                    assert part["session_id"] in deleted & writers, f"a part without a session: {part}"
                    self.totals.strays += 1
                    self.database[f"agent_sessions{suffix}"].delete_one({"_id": found})
                elif "expires_at" in part:
                    date = live[incarnation]
                    assert date is not None, f"a part expires although its session does not: {part}"
                    assert date <= part["expires_at"], f"a part expires before its session at {date}: {part}"

    def expire(self) -> None:
        """Remove an expiring session and its parts, as the TTL indexes of the server do."""
        found = self.database["agent_sessions"].find_one({"expires_at": {"$exists": True}})
        if found is None:
            return
        for suffix in self.random.sample(("", *OUTSIDE), 4):
            self.database[f"agent_sessions{suffix}"].delete_many({"session_id": found["_id"]})
        self.known[found["_id"]] = None
        self.totals.expired += 1

    def end(self) -> None:
        """Delete all sessions, and check that nothing is left in the database."""
        with MongoDBSessionRepository(self.uri, self.database.name, **LIMITS) as repository:
            for session_id in self.ids:
                assert repository.delete_session(session_id) is (self.known[session_id] is not None)
        for suffix in ("", *OUTSIDE):
            assert not self.database[f"agent_sessions{suffix}"].count_documents({}), suffix


def plain_order(plain: list[str]) -> Callable[[str], int]:
    order = {text: position for position, text in enumerate(plain)}
    return lambda text: order.get(text, -1)
