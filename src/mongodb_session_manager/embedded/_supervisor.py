"""Own the mongod processes of one `EmbeddedMongoDB`, and end them when its process ends, however it ends.

Both sides of it, with the standard library only: `Supervisor` is the owner's, and run as a script this file is the
process itself. The owner holds the only write end of that process' stdin, so end of file means that the owner is gone.
Commands and answers are one JSON object per line:

    {"do": "start", "member": 0, "argv": [...], "log": "..."}   -> {"pid": 123} or {"error": "..."}
    {"do": "poll", "member": 0}                                 -> {"code": null}, an exit code, or -9 after SIGKILL
    {"do": "kill", "member": 0}                                 -> {"code": -9}, once it is gone
    {"do": "terminate", "member": 0}                            -> {"code": 0}, once it is gone
    {"do": "quit"}                                              like end of file; no answer

The `number` of a command comes back in its answer. The first line, unasked, is `{"directory": ...}`: the temporary
directory, made in the directory of the only argument and removed at the end, or null if that argument is empty.
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
from collections.abc import Iterable
from typing import IO, Any, cast

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
REAP_INTERVAL = 0.25  # seconds until a mongod that died by itself is no longer a zombie
ANSWER_TIMEOUT = 60.0  # seconds; the slowest command waits for a mongod to end


class SupervisorError(RuntimeError):
    """The supervisor process cannot be run, or cannot be asked."""


class Supervisor:
    """The owner's side: a supervisor process and the pipes to it.

    Args:
        temporary_in: The directory to make a temporary one in, or an empty string.

    Raises:
        SupervisorError: The process cannot be run.
    """

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
            raise SupervisorError(f"the supervisor process cannot be run: {error}") from error
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self._close = weakref.finalize(self, close_all, self._stdin, self._stdout)
        _started.add(self)

    def is_ours(self) -> bool:
        """Tell whether this process is the owner, not one that it forked."""
        return os.getpid() == self._owner

    def temporary_directory(self) -> str:
        """Wait for the process' first line and return the temporary directory it made."""
        self._directory = self._answer()["directory"]
        return self._directory or ""

    def ask(self, do: str, member: int, **arguments: object) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            SupervisorError: The process is gone, does not answer, or is not ours.
        """
        if not self.is_ours():
            raise SupervisorError(f"the server belongs to process {self._owner}, which forked this one")
        self._number += 1
        command = {"number": self._number, "do": do, "member": member, **arguments}
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(command).encode() + b"\n")
        while True:
            answer = self._answer()
            if answer.get("number") == self._number:  # not the answer to a command whose caller was interrupted
                return answer

    def end(self) -> None:
        """Have everything ended and wait for it; by force if the process cannot do it."""
        if self._close.alive:
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(b'{"do": "quit"}\n')  # heard even if a copy of the pipe's end exists somewhere
        self._close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3 * GRACE)
        if self._process.returncode != 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + GRACE
            while self._directory and os.path.exists(self._directory) and time.monotonic() < deadline:
                shutil.rmtree(self._directory, ignore_errors=True)  # again while a dying mongod still writes

    def forget(self) -> None:
        """Let go of the process in a forked child."""
        self._close()
        self._process.returncode = 0  # it is no child of this process

    def _answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_TIMEOUT
        readable = select.poll()  # not select(), which takes no descriptor above 1023
        readable.register(self._stdout, select.POLLIN)
        while b"\n" not in self._received:
            if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise SupervisorError("the supervisor process does not answer")
            received = os.read(self._stdout.fileno(), 65536)
            if not received:
                raise SupervisorError("the supervisor process ended")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def close_all(*pipes: IO[bytes]) -> None:
    """Close the pipes, which ends the servers."""
    for pipe in pipes:
        pipe.close()


def forget_all() -> None:
    """Let go of every supervisor in a forked child, which would else keep the servers alive."""
    for supervisor in list(_started):
        supervisor.forget()


_started: weakref.WeakSet[Supervisor] = weakref.WeakSet()
os.register_at_fork(after_in_child=forget_all)


def end(children: Iterable[subprocess.Popen[bytes]], grace: float) -> None:
    """End the children with SIGTERM, and with SIGKILL those that are left after `grace` seconds."""
    left = [child for child in children if child.poll() is None]
    deadline = time.monotonic() + grace
    if grace > 0:
        for child in left:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGCONT)  # a stopped process does not see SIGTERM
    for child in left:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def obey(command: dict[str, Any], children: dict[int, subprocess.Popen[bytes]]) -> dict[str, Any]:
    """Carry out one command and return its answer."""
    member = command["member"]
    if command["do"] == "start":
        try:
            with open(os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
                os.fchmod(log.fileno(), 0o600)  # an earlier version made it readable for everyone
                children[member] = subprocess.Popen(
                    command["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
        except OSError as error:
            return {"error": str(error)}
        return {"pid": children[member].pid}
    if command["do"] in ("kill", "terminate"):
        end([children[member]], 0.0 if command["do"] == "kill" else GRACE)
    return {"code": children[member].poll()}


def serve(children: dict[int, subprocess.Popen[bytes]]) -> None:
    """Obey commands until the owner says quit or is gone."""
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], REAP_INTERVAL)
        for child in children.values():
            child.poll()
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
            say({"number": command["number"], **obey(command, children)})


def say(answer: dict[str, Any]) -> None:
    """Send one line to the owner."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def leave(*_: object) -> None:
    """Turn a signal into an orderly end."""
    raise SystemExit(0)


def main() -> None:
    """Serve one owner, then end every mongod and remove the temporary directory."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        signal.signal(number, leave)
    children: dict[int, subprocess.Popen[bytes]] = {}
    directory = None
    try:
        if sys.argv[1]:
            directory = tempfile.mkdtemp(prefix="mongodb-session-manager-", dir=sys.argv[1])
        say({"directory": directory})
        with contextlib.suppress(BrokenPipeError):
            serve(children)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        end(children.values(), GRACE)
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
