"""Embedded servers that a test can kill and restart, one or several in a replica set."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Self

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from mongodb_session_manager.embedded import EmbeddedMongoDB

BOUND = 60.0  # seconds


class Server(EmbeddedMongoDB):
    """An embedded server that can be killed and restarted.

    Args:
        server_parameters: Passed to mongod as `--setParameter`.
        **options: As for `EmbeddedMongoDB`.
    """

    def __init__(self, *, server_parameters: Mapping[str, str | int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._parameters |= server_parameters or {}

    @property
    def pid(self) -> int:
        """The process id of the mongod, of the last one after `kill`."""
        return self._pid

    @property
    def runs(self) -> bool:
        """Whether the mongod runs."""
        return self._ask("poll")["code"] is None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the mongod and wait until it has exited."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, number)
        until(lambda: not self.runs, "the mongod did not exit")

    def restart(self) -> None:
        """Start the mongod again with its port and data, and wait until it accepts writes."""
        self.kill(signal.SIGTERM)
        self._given_port = self._port
        self._launch()
        self._await_answer(time.monotonic() + BOUND)
        self._await_writes(time.monotonic() + BOUND)

    def acknowledge_before_journaling(self) -> None:
        """Acknowledge writes to a majority before they are in the journal, if no test kills the server.

        Writing the journal for each of them takes half of the server's processor time.
        """
        with self._client() as client:
            config = client.admin.command("replSetGetConfig")["config"]
            config |= {"version": config["version"] + 1, "writeConcernMajorityJournalDefault": False}
            client.admin.command("replSetReconfig", config)
            client.admin.command("setParameter", journalCommitInterval=500)  # milliseconds; the default is 100


class _Member(Server):
    def _await_writes(self, deadline: float) -> None:
        """Leave the configuration to the cluster."""

    def is_in_service(self, role: str) -> bool:
        """Whether the member is `"isWritablePrimary"` or `"secondary"`."""
        with suppress(PyMongoError), self._client() as client:
            return bool(client.admin.command("hello")[role])
        return False


class Cluster:
    """A replica set of three embedded servers."""

    def __init__(self, *, server_parameters: Mapping[str, str | int] | None = None) -> None:
        self.members = [_Member(server_parameters=server_parameters) for _ in range(3)]
        self._stack = ExitStack()

    @property
    def hosts(self) -> list[str]:
        return [f"127.0.0.1:{member.port}" for member in self.members]

    @property
    def connection_string(self) -> str:
        return f"mongodb://{','.join(self.hosts)}/?replicaSet=rs0"

    def __enter__(self) -> Self:
        with self._stack:
            for member in self.members:
                self._stack.enter_context(member)
            config = {
                "_id": "rs0",
                "members": [{"_id": number, "host": host} for number, host in enumerate(self.hosts)],
                "settings": {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500},
            }
            with MongoClient[dict[str, Any]]("127.0.0.1", self.members[0].port, directConnection=True) as client:
                client.admin.command("replSetInitiate", config)
            for number in range(len(self.members)):
                self._await_service(number)
            self.primary()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill(self, member: int) -> None:
        """Kill a member."""
        self.members[member].kill()

    def restart(self, member: int) -> None:
        """Restart a member and wait until it is primary or secondary."""
        self.members[member].restart()
        self._await_service(member)

    def primary(self) -> int:
        """Return the index of the primary, after an election."""
        found: list[int] = []
        until(lambda: found.extend(self._primaries()) or found, "there is no primary", 0.1)  # type: ignore[func-returns-value]
        return found[0]

    def _primaries(self) -> list[int]:
        return [
            number
            for number, member in enumerate(self.members)
            if member.runs and member.is_in_service("isWritablePrimary")
        ]

    def _await_service(self, number: int) -> None:
        member = self.members[number]
        until(
            lambda: member.is_in_service("isWritablePrimary") or member.is_in_service("secondary"),
            f"member {number} is not in service",
            0.1,
        )


def until(condition: Callable[[], object], failure: str, pause: float = 0.02) -> None:
    """Wait until a condition is true, which is looked at once in `pause` seconds."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(pause)
