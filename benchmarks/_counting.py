"""Counting the commands to the server."""

from __future__ import annotations

from pymongo import monitoring

_OF_CONNECTIONS = ("createIndexes", "endSessions", "hello", "ping")


class Counter(monitoring.CommandListener):
    """Counts the commands to collections.

    Attributes:
        count: The commands that were sent.
        answered: The commands that the server has answered.
    """

    def __init__(self) -> None:
        self.count = 0
        self.answered = 0

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.count += event.command_name not in _OF_CONNECTIONS

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.answered += event.command_name not in _OF_CONNECTIONS

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...
