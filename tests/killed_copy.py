"""Copies a session in processes that are killed: `python killed_copy.py <uri> <database> fork|import <file of lines>`.

The first one is killed before its first command, the second one after the reply to it, the third one before the second
command, and so on; index builds do not count. Each makes a session of its own, `<what>-<number>`. Prints how many there
were.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pymongo import monitoring

from mongodb_session_manager import MongoDBSessionRepository

SMALL = {"max_embedded_messages": 8, "max_inline_attachment_bytes": 1000}


class Killer(monitoring.CommandListener):
    """Kills its process before or after the command of a number."""

    def __init__(self, number: int) -> None:
        self.command, self.after = divmod(number, 2)
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


def copy(uri: str, database: str, what: str, lines: Path, number: int) -> None:
    killer = Killer(number)
    with MongoDBSessionRepository(uri, database, event_listeners=[killer], **SMALL) as repository:
        repository.count_sessions()
        while not {"createIndexes", "find"} <= killer.seen:  # the background work of a new process
            time.sleep(0.01)
        killer.is_on = True
        if what == "fork":
            repository.fork_session("session-7f3a91", f"fork-{number}")
        else:
            with lines.open() as stream:
                repository.import_session(stream, f"import-{number}")
        killer.is_on = False


def main(uri: str, database: str, what: str, lines: str) -> None:
    number = 0
    while True:
        if not (child := os.fork()):
            copy(uri, database, what, Path(lines), number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        number += 1
    print(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
