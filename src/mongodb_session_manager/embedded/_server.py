"""The embedded server: one mongod process, which a supervisor process (`_supervisor.py`) ends with its owner."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar

import anyio
import anyio.to_thread
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from ..errors import ConfigurationError, EmbeddedServerError
from ._binary import find_mongod
from ._supervisor import Supervisor, SupervisorError

T = TypeVar("T")

_HOST = "127.0.0.1"
_REPLICA_SET = "rs0"
_ADDRESS_IN_USE = 48  # mongod's exit code when it cannot listen
_FAILED = 100  # mongod's exit code when it cannot use its data directory, among others
_NOT_YET_INITIALIZED = 94  # the server's error code: it has no replica set configuration
_POLL = 0.02  # seconds
_PRIVATE = 0o700  # only the user who runs the server can read the data and the log


class EmbeddedMongoDB:
    """A mongod on the loopback interface, for development and tests.

    By default it is a replica set `rs0` with one member, because transactions and change streams need one. Use it in
    `with` or `async with`, or call `start` and `stop`. A server that is garbage collected ends too, with a
    `ResourceWarning`. After `os.fork` the server belongs to the parent: the child can connect to it, and `stop` does
    nothing there. Not safe for concurrent use by several threads.

    Args:
        binary: The mongod to run; see `find_mongod` for the default.
        port: The port; default a free one.
        data_directory: The directory for the data, created if it does not exist; default a temporary directory, removed
            at the end. Only their owner can read new files in it. The mode of an existing directory is not changed.
        standalone: Whether to run without a replica set.
        start_timeout: Seconds within which the server must accept writes.

    Raises:
        ConfigurationError: `port` is invalid.
    """

    def __init__(
        self,
        *,
        binary: str | PathLike[str] | None = None,
        port: int | None = None,
        data_directory: str | PathLike[str] | None = None,
        standalone: bool = False,
        start_timeout: float = 60.0,
    ) -> None:
        if port is not None and not 0 < port < 65536:
            raise ConfigurationError(f"port must be from 1 to 65535, got {port!r}")
        self._binary = binary
        self._given_port = port
        self._kept_directory = None if data_directory is None else Path(data_directory).absolute()
        self._standalone = standalone
        self._start_timeout = start_timeout
        self._parameters: dict[str, str | int] = {
            "diagnosticDataCollectionEnabled": False,
            "shutdownTimeoutMillisForSignaledShutdown": 100,  # the default of 15 s is for replication
        }
        self._supervisor: Supervisor | None = None
        self._directory = self._kept_directory
        self._port = 0
        self._pid = 0
        self._command: list[str] = []
        self._log_start = 0

    @property
    def connection_string(self) -> str:
        """The URI to connect to; after `stop`, the last one."""
        return f"mongodb://{_HOST}:{self.port}/?" + (
            "directConnection=true" if self._standalone else f"replicaSet={_REPLICA_SET}"
        )

    @property
    def port(self) -> int:
        """The port; after `stop`, the last one."""
        if not self._port:
            raise EmbeddedServerError("the server was not started")
        return self._port

    @property
    def data_directory(self) -> Path:
        """The directory of the data and the log; after `stop`, the last one."""
        if self._directory is None:
            raise EmbeddedServerError("the server was not started")
        return self._directory

    def start(self) -> None:
        """Start the server and wait until it accepts writes. Does nothing if it is started.

        Raises:
            EmbeddedServerError: No mongod was found, it exited, or it was not ready in time. The message ends with the
                last lines of its log.
        """
        if self._supervisor is not None:
            return
        deadline = time.monotonic() + self._start_timeout
        binary = find_mongod(self._binary)
        try:
            self._supervisor = Supervisor("" if self._kept_directory else tempfile.gettempdir())
            temporary = self._supervisor.temporary_directory()
            self._directory = self._kept_directory or Path(temporary)
            self._port = self._given_port or _free_port()
            self._command = [str(binary), *self._options()]
            self._launch()
            self._await_answer(deadline)
            self._await_writes(deadline)
        except SupervisorError as error:
            self.stop()
            raise EmbeddedServerError(str(error)) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and remove a temporary directory. Does nothing if the server is not started."""
        if self._supervisor is not None and self._supervisor.is_ours():
            self._supervisor.end()
            self._supervisor = None

    def _check(self) -> None:
        """Raise if mongod has exited.

        Raises:
            EmbeddedServerError: It has. The message ends with the last lines of its log.
        """
        code = self._ask("poll")["code"]
        if code == _ADDRESS_IN_USE and "in use" in self._log_tail():
            raise _AddressInUseError(f"port {self._port} is in use by another process")
        if code == _FAILED and "DBPathInUse" in self._log_tail():
            raise _DirectoryInUseError(f"the data directory {self._data} is in use by another mongod")
        if code is not None:
            raise EmbeddedServerError(f"mongod exited with code {code}\n{self._log_tail()}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await _run_uncancelled(self.start)
        except BaseException:
            await _run_uncancelled(self.stop)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await _run_uncancelled(self.stop)

    # `member-0` is the name of earlier versions, whose data stays usable.
    @property
    def _data(self) -> Path:
        return self.data_directory / "member-0"

    @property
    def _log(self) -> Path:
        return self.data_directory / "member-0.log"

    def _options(self) -> list[str]:
        options = ["--bind_ip", _HOST, "--nounixsocket", "--quiet", "--logappend", "--wiredTigerCacheSizeGB", "0.25"]
        options += ["--dbpath", str(self._data), "--logpath", str(self._log)]
        options += ["--networkMessageCompressors", "disabled"]
        options += ["--slowms", str(2**31 - 1)]  # the log quotes slow commands, including the values in them
        if not self._standalone:
            options += ["--replSet", _REPLICA_SET, "--oplogSize", "64"]
        for name, value in self._parameters.items():
            options += ["--setParameter", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        return options

    def _ask(self, do: str, **arguments: object) -> dict[str, Any]:
        if self._supervisor is None:
            raise EmbeddedServerError("the server is not started")
        try:
            return self._supervisor.ask(do, **arguments)
        except SupervisorError as error:
            raise EmbeddedServerError(str(error)) from error

    def _launch(self) -> None:
        try:
            self.data_directory.mkdir(_PRIVATE, parents=True, exist_ok=True)
            self._data.mkdir(_PRIVATE, exist_ok=True)
            self._data.chmod(_PRIVATE)  # earlier versions created a directory that others can read
            self._log_start = self._log.stat().st_size if self._log.exists() else 0
        except OSError as error:
            raise EmbeddedServerError(f"the data directory cannot be used: {error}") from error
        answer = self._ask("start", argv=[*self._command, "--port", str(self._port)], log=str(self._log))
        if "error" in answer:
            raise EmbeddedServerError(f"mongod cannot be run: {answer['error']}")
        self._pid = answer["pid"]

    def _await_answer(self, deadline: float) -> None:
        """Wait until mongod answers on its port; launch it again if it exited for a reason that can pass."""
        while True:
            try:
                self._until(f"mongod did not answer on port {self._port}", deadline, self._answers)
                return
            except _AddressInUseError:
                if self._given_port is not None:
                    raise
                self._port = _free_port()
            except _DirectoryInUseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(5 * _POLL)  # the mongod of an owner that has just exited can still be exiting
            self._launch()

    def _answers(self) -> bool | None:
        try:
            socket.create_connection((_HOST, self._port), timeout=1.0).close()
        except OSError:
            return None
        with self._client() as client:
            return client.admin.command("serverStatus")["pid"] == self._pid or None

    def _await_writes(self, deadline: float) -> None:
        with self._client() as client:
            if not self._standalone:
                self._until("the replica set took no configuration", deadline, lambda: self._configure(client))
            self._until("the server did not accept writes", deadline, lambda: is_writable(client))

    def _configure(self, client: MongoClient[dict[str, Any]]) -> bool:
        """Initiate the replica set, or update the configuration of an existing one after a change of the port."""
        host = f"{_HOST}:{self._port}"
        try:
            config = client.admin.command("replSetGetConfig")["config"]
        except OperationFailure as error:
            if error.code != _NOT_YET_INITIALIZED:
                raise
            members = [{"_id": 0, "host": host}]
            client.admin.command("replSetInitiate", {"_id": _REPLICA_SET, "members": members})
            return True
        before = {member["host"]: member["_id"] for member in config["members"]}
        if set(before) != {host}:
            config["members"] = [{"_id": before.get(host, 0), "host": host}]  # a host that stays must keep its id
            config["version"] += 1
            config.pop("term", None)
            client.admin.command("replSetReconfig", config, force=True)
        return True

    def _client(self) -> MongoClient[dict[str, Any]]:
        limits: dict[str, Any] = {"serverSelectionTimeoutMS": 2000, "connectTimeoutMS": 2000, "socketTimeoutMS": 10000}
        return MongoClient(_HOST, self._port, directConnection=True, **limits)

    def _until(self, failure: str, deadline: float, probe: Callable[[], T | None]) -> T:
        """Repeat `probe` until it returns a value, while mongod runs."""
        last = "no answer"
        while True:
            self._check()
            try:
                if (result := probe()) is not None:
                    return result
            except PyMongoError as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"{failure} within {self._start_timeout} s: {last}\n{self._log_tail()}")
            time.sleep(_POLL)

    def _log_tail(self) -> str:
        """Return the last lines of the log since the last start, and the errors before them."""
        try:
            with self._log.open("rb") as log:
                log.seek(self._log_start)
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
    # Below the range of ephemeral ports, from which an outgoing connection could take the port before mongod does.
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            return port


def is_writable(client: MongoClient[dict[str, Any]]) -> bool | None:
    return client.admin.command("hello")["isWritablePrimary"] or None


async def _run_uncancelled(function: Callable[[], None]) -> None:
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
