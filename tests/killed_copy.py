"""Copies a session in processes that are killed: `killed_copy.py <uri> <database> fork|import <file of lines> <step>`.

Number 0 is killed before its first command, number 1 after the reply to it, number 2 before the second command, and so
on; index builds do not count. There are the first two, the last three, and every `step`th between them. Each makes a
session of its own, `<what>-<number>`; one that is not killed makes `<what>-whole`. Prints the numbers.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pymongo import monitoring

from mongodb_session_manager import MongoDBSessionRepository

SMALL: dict[str, Any] = {"max_embedded_messages": 8, "max_inline_attachment_bytes": 1000}


class Killer(monitoring.CommandListener):
    """Kills its process before or after the command of a number; with `None`, counts."""

    def __init__(self, number: int | None) -> None:
        self.command, self.after = (-1, 0) if number is None else divmod(number, 2)
        self.count = 0
        self.is_on = False
        self.seen: set[str] = set()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if self.is_on and self.count == self.command and not self.after and event.command_name != "createIndexes":
            os.kill(os.getpid(), signal.SIGKILL)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.seen.add(event.command_name)
        if self.is_on and event.command_name != "createIndexes":
            if self.count == self.command:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def copy(uri: str, database: str, what: str, lines: Path, number: int | None) -> int:
    """Make a copy and return how many commands that took."""
    name = f"{what}-{'whole' if number is None else number}"
    killer = Killer(number)
    with MongoDBSessionRepository(uri, database, event_listeners=[killer], **SMALL) as repository:
        repository.count_sessions()
        while not {"createIndexes", "find"} <= killer.seen:  # the background work of a new process
            time.sleep(0.01)
        killer.is_on = True
        if what == "fork":
            repository.fork_session("session-7f3a91", name)
        else:
            with lines.open() as stream:
                repository.import_session(stream, name)
        killer.is_on = False
    return killer.count


def main(uri: str, database: str, what: str, lines: str, step: str) -> None:
    if not (child := os.fork()):
        os._exit(copy(uri, database, what, Path(lines), None))
    count = 2 * os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    numbers = sorted({0, 1, *range(0, count, int(step)), count - 3, count - 2, count - 1})
    for number in numbers:
        if not (child := os.fork()):
            copy(uri, database, what, Path(lines), number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, number
    print(*numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])
