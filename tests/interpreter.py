"""Python processes that start within milliseconds: forks of one process that has imported the library.

    process = start("import sys; print(sys.argv)", uri)     # like `python -W error -c ... <uri>`
    shown, errors = process.communicate()

Importing Strands and Motor takes a second of processor time, so all workers of a test run share one template process,
which the first of them starts and which ends with the last of them. A fork of it has one thread, a `__main__` module,
standard streams, arguments, environment and working directory of its own, and ends as every interpreter does: it waits
for its threads, calls its exit handlers and finalizes its modules.

Tests of an import or of an interpreter's start need a real one; `python` returns its command.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

TESTS = Path(__file__).parent
SEARCHED = (TESTS, TESTS.parent / "src", TESTS.parent / "examples", TESTS.parent)
IMPORTED = (
    "motor.motor_asyncio",
    "mongodb_session_manager.embedded",
    "mongodb_session_manager.fastapi",
    "aioboto3",
    "uvicorn",
    "support",
)
ADDRESS = Path(tempfile.gettempdir()) / f"interpreter-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}"

FORK_WARNING = "ignore:This process:DeprecationWarning"
"""Lets a process with threads fork, which Python 3.12 warns of."""


def environment(**changes: str) -> dict[str, str]:
    """Return the environment in which new interpreters find the library, the examples and the tests' support."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SEARCHED)), **changes}


def python(*arguments: Any, warnings: tuple[str, ...] = ("error",)) -> list[str]:
    """Return the command of a new interpreter."""
    return [sys.executable, *(f"-W{each}" for each in warnings), *map(str, arguments)]


class Process:
    """A forked interpreter.

    Attributes:
        pid: Its process id; it leads a process group of its own.
        stdin: Its standard input.
        stdout: Its standard output.
        stderr: Its standard error.
        returncode: Its exit code, or minus the number of the signal that ended it; `None` while it runs.
    """

    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[str]

    def __init__(self, request: dict[str, Any]) -> None:
        self.returncode: int | None = None
        pipes = [os.pipe() for _ in range(4)]
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err), (ours_status, theirs_status) = pipes
        theirs = [theirs_in, theirs_out, theirs_err, theirs_status]
        try:
            message = json.dumps(request).encode()
            _send(_template(), len(message).to_bytes(8, "big"), theirs)
            _template().sendall(message)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.stdin, self.stdout, self.stderr = open(ours_in, "w"), open(ours_out), open(ours_err)  # noqa: SIM115
        self._status = open(ours_status)  # noqa: SIM115
        self.pid = int(self._status.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr, self._status):
            with suppress(BrokenPipeError):  # of what nobody has read
                stream.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it runs."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Return its exit code, or `None` while it runs."""
        return self._wait(0)

    def wait(self, timeout: float = 60) -> int:
        """Return its exit code once it has ended."""
        if (code := self._wait(timeout)) is None:
            raise subprocess.TimeoutExpired("a forked interpreter", timeout)
        return code

    def _wait(self, timeout: float) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Return the rest of what it writes, once it has ended; kill its process group if that takes too long."""
        too_late = threading.Event()

        def kill() -> None:
            too_late.set()
            os.killpg(self.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        try:
            self.stdin.close()
            with ThreadPoolExecutor(1) as reading:
                errors = reading.submit(self.stderr.read)
                shown = self.stdout.read()
            self.wait()
        finally:
            timer.cancel()
            timer.join()
        self._close()
        assert not too_late.is_set(), f"the process did not end within {timeout} s\n{shown}\n{errors.result()}"
        return shown, errors.result()


def start(
    code: str | Path, *arguments: Any, warnings: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> Process:
    """Run code, or a file, in a process of its own, with warnings as errors except for those that `warnings` names."""
    return Process(
        {
            "code": code if isinstance(code, str) else None,
            "arguments": [*map(str, ["-c"] if isinstance(code, str) else [code]), *map(str, arguments)],
            "warnings": warnings,
            "environment": dict(os.environ) if env is None else env,
            "directory": os.getcwd(),
        }
    )


def run(
    code: str | Path,
    *arguments: Any,
    warnings: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    timeout: float = 60,
) -> tuple[str, str]:
    """Run code, or a file, to its end, which must be a normal one; return what it wrote."""
    process = start(code, *arguments, warnings=warnings, env=env)
    shown, errors = process.communicate(timeout)
    assert process.returncode == 0, errors
    return shown, errors


# The template.

_connections: dict[int, socket.socket] = {}  # by process id: a fork opens its own


def _template() -> socket.socket:
    """Return the connection of this process to the template, which is started if there is none."""
    if (known := _connections.get(os.getpid())) is not None:
        return known
    end = time.monotonic() + 120
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(ADDRESS))
            if connection.recv(1):
                atexit.register(connection.close)
                return _connections.setdefault(os.getpid(), connection)
        except OSError:
            subprocess.run(
                python(__file__, ADDRESS), env=environment(), check=True, stdin=subprocess.DEVNULL, timeout=60
            )
        connection.close()
        assert time.monotonic() < end, "the template process does not start"


def _send(connection: socket.socket, data: bytes, descriptors: list[int]) -> None:
    assert socket.send_fds(connection, [data], descriptors) == len(data)


def _serve(address: str) -> dict[str, Any] | None:
    """Fork a template, and from it for each request until nobody is connected; return the request in the fork."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(address)
    except OSError:  # another worker was faster
        listener.close()
        return None
    listener.listen(64)
    if os.fork():
        listener.close()
        return None
    os.setsid()
    for name in IMPORTED:
        importlib.import_module(name)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps
    users = 0
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                connection: Any = key.fileobj
                if connection is listener:
                    connection, _ = listener.accept()
                    connection.sendall(b"!")
                    selector.register(connection, selectors.EVENT_READ)
                    users += 1
                    continue
                length, descriptors, _, _ = socket.recv_fds(connection, 8, 4)
                if length:
                    message = connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
                    if _forked(descriptors):
                        for each in selector.get_map().values():
                            each.fileobj.close()  # type: ignore[union-attr]
                        return dict(json.loads(message))
                else:
                    selector.unregister(connection)
                    connection.close()
                    users -= 1
                    if not users:
                        os.unlink(address)
                        os._exit(0)


def _forked(descriptors: list[int]) -> bool:
    """Fork a process with these standard streams, and one that reports its end; return whether this is the former."""
    *streams, status = descriptors
    if os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        return False
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        for descriptor in streams:
            os.close(descriptor)
        os.write(status, f"{pid}\n".encode())
        os.write(status, f"{os.waitpid(pid, 0)[1]}\n".encode())
        os._exit(0)
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    return True


def _become(request: dict[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
    """Take over what a request says of a process; return its code and the namespace of its main module."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    tempfile.tempdir = None  # asks the environment again
    sys.argv[:] = request["arguments"]
    for option in request["warnings"]:
        action, message, category = option.split(":")
        warnings.filterwarnings(action, message, getattr(__builtins__, category))
        sys.warnoptions.append(option)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    source, file = request["code"], sys.argv[0]
    if source is None:
        source = Path(file).read_text()
        main.__file__ = file
        sys.path.insert(0, str(Path(file).parent))
    return compile(source, file, "exec"), vars(main)


if __name__ == "__main__":
    if (_request := _serve(sys.argv[1])) is not None:
        exec(*_become(_request))
