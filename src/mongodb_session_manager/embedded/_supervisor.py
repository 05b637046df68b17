"""The supervisor of an embedded server: it ends mongod when the process that started it ends, however that ends.

This file is both sides, with the standard library only: `Supervisor` is the owner's side, and run as a script the file
is the supervisor process. The owner has the only write end of the supervisor's stdin, so end of file means that the
owner has exited. Commands and answers are one JSON object per line:

    {"do": "start", "argv": [...], "log": "..."}    -> {"pid": 123} or {"error": "..."}
    {"do": "poll"}                                  -> {"code": null}, the exit code, or -9 after SIGKILL
    {"do": "quit"}                                  like end of file; no answer

The `number` of a command is repeated in its answer. The first line is `{"directory": ...}` and answers no command: the
temporary directory, created in the directory of the only argument and removed at the end, or null if that argument is
empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from typing import IO, Any, cast

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
REAP_INTERVAL = 0.25  # seconds until a mongod that exited is no longer a zombie
ANSWER_TIMEOUT = 60.0  # seconds


class SupervisorError(RuntimeError):
    """The supervisor process cannot be started or does not answer."""


class Supervisor:
    """The owner's side: a supervisor process and the pipes to it; creates a temporary directory in `temporary_in`."""

    def __init__(self, temporary_in: str) -> None:
        self._owner = os.getpid()
        self._number = 0
        self._received = b""
        self._directory: str | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), temporary_in],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SupervisorError(f"the supervisor process cannot be started: {error}") from error
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self._close = weakref.finalize(self, close_all, self._stdin, self._stdout)
        _started.add(self)

    def is_ours(self) -> bool:
        """Return whether this process is the owner, and not a process that it forked."""
        return os.getpid() == self._owner

    def temporary_directory(self) -> str:
        """Wait for the first line of the process and return its temporary directory."""
        self._directory = self._answer()["directory"]
        return self._directory or ""

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            SupervisorError: The process has exited, does not answer, or belongs to another process.
        """
        if not self.is_ours():
            raise SupervisorError(f"the server belongs to process {self._owner}, which forked this one")
        self._number += 1
        command = {"number": self._number, "do": do, **arguments}
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(command).encode() + b"\n")
        while True:
            answer = self._answer()
            if answer.get("number") == self._number:  # skip answers to commands whose caller was interrupted
                return answer

    def end(self) -> None:
        """End mongod and the supervisor and wait for both, by force if necessary."""
        if self._close.alive:
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(b'{"do": "quit"}\n')  # works even if another process has a copy of the write end
        self._close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3 * GRACE)
        if self._process.returncode != 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + GRACE
            while self._directory and os.path.exists(self._directory) and time.monotonic() < deadline:
                shutil.rmtree(self._directory, ignore_errors=True)  # repeated, because a dying mongod can still write

    def forget(self) -> None:
        self._close()
        self._process.returncode = 0  # it is not a child of this process

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_TIMEOUT
        readable = select.poll()  # not select(), which rejects descriptors above 1023
        readable.register(self._stdout, select.POLLIN)
        while b"\n" not in self._received:
            if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise SupervisorError("the supervisor process does not answer")
            received = os.read(self._stdout.fileno(), 65536)
            if not received:
                raise SupervisorError("the supervisor process has exited")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def close_all(*pipes: IO[bytes]) -> None:
    for pipe in pipes:
        pipe.close()


def forget_all() -> None:
    """Close the pipes of every supervisor in a forked child, because they would keep the servers alive."""
    for supervisor in list(_started):
        supervisor.forget()


_started: weakref.WeakSet[Supervisor] = weakref.WeakSet()
os.register_at_fork(after_in_child=forget_all)


class Child:
    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "poll":
            return {"code": self.process and self.process.poll()}
        try:
            with open(os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
                os.fchmod(log.fileno(), 0o600)  # earlier versions created a log that others can read
                self.process = subprocess.Popen(
                    command["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
        except OSError as error:
            return {"error": str(error)}
        return {"pid": self.process.pid}

    def end(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        self.process.send_signal(signal.SIGCONT)  # a stopped process does not handle SIGTERM
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(child: Child) -> None:
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], REAP_INTERVAL)
        if child.process is not None:
            child.process.poll()
        if not readable:
            continue
        received = os.read(0, 65536)
        if not received:
            return
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if command["do"] == "quit":
                return
            say({"number": command["number"], **child.obey(command)})


def say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def leave(*_: object) -> None:
    raise SystemExit(0)


def main() -> None:
    """Serve the owner, then end mongod and remove the temporary directory."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        signal.signal(number, leave)
    child, directory = Child(), None
    try:
        if sys.argv[1]:
            directory = tempfile.mkdtemp(prefix="mongodb-session-manager-", dir=sys.argv[1])
        say({"directory": directory})
        with contextlib.suppress(BrokenPipeError):
            serve(child)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        child.end()
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
