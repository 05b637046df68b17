"""Processes that are killed between two commands: before the n-th is sent, or as soon as it was answered."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pymongo import monitoring

NOT_COUNTED = frozenset({"hello", "ping", "buildInfo", "endSessions", "createIndexes", "listIndexes"})
"""Commands that say nothing of a session, or are sent in the background of a process that starts."""


class Killer(monitoring.CommandListener):
    """Kills its own process at a command, once it is armed.

    Args:
        at: The number of the command, from 1; `None` kills nothing.
        after: Whether the process is killed when the command was answered, not before it is sent.
        say: Called with the name of each command that is counted.
    """

    def __init__(self, at: int | None, after: bool, say: Callable[[str, Any], None]) -> None:
        self._at, self._after, self._say = at, after, say
        self._count = 0
        self._last: int | None = None
        self._lock = threading.Lock()
        self.armed = False

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if not self.armed or event.command_name in NOT_COUNTED:
            return
        with self._lock:
            self._count += 1
            self._say("command", event.command_name)
            if self._count == self._at:
                self._last = event.request_id
                if not self._after:
                    os.kill(os.getpid(), signal.SIGKILL)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self._answered(event)

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        self._answered(event)

    def _answered(self, event: Any) -> None:
        if self._after and event.request_id == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Child:
    """A forked process that does something and says what it has done.

    Attributes:
        said: What it said, as pairs of a kind and a value.
        killed: Whether it was killed.
    """

    pid: int
    pipe: int
    said: list[tuple[str, Any]] = field(default_factory=list)
    killed: bool = False
    _is_over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def commands(self) -> list[str]:
        """The names of the commands it sent, or was about to send."""
        return [value for kind, value in self.said if kind == "command"]

    def has_said(self, kind: str) -> list[Any]:
        """Return the values of what it said of a kind."""
        return [value for said, value in self.said if said == kind]

    def kill_if_alive(self) -> None:
        """Kill it, wherever it is."""
        with self._lock:
            if not self._is_over:
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Child:
        """Wait until it is over; what it raised fails the test."""
        with os.fdopen(self.pipe) as pipe:
            for line in pipe:
                if line.endswith("\n"):
                    kind, value = json.loads(line)
                    self.said.append((kind, value))
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._is_over = True
            status = os.waitpid(self.pid, 0)[1]
        self.killed = os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL), "\n".join(self.has_said("error")) or status
        return self


def start(
    work: Callable[[Killer, Callable[[str, Any], None]], None], at: int | None = None, after: bool = False
) -> Child:
    """Fork a process that does `work(killer, say)`; nothing of the library may be open in this one."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of any fork in a process with threads
        pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    os.close(reading)

    def say(kind: str, value: Any) -> None:
        os.write(writing, (json.dumps([kind, value]) + "\n").encode())

    try:
        work(Killer(at, after, say), say)
    except BaseException:
        say("error", traceback.format_exc())
        os._exit(3)
    sys.stdout.flush()
    os._exit(0)


def kill_points(count: int, full: bool, most: int = 3) -> list[tuple[int, bool]]:
    """Return where to kill an operation of `count` commands: everywhere, or at the last point and some others."""
    *others, last = [(number, after) for number in range(1, count + 1) for after in (False, True)]
    return [*(others if full else sorted(random.sample(others, min(most - 1, len(others))))), last]
