"""Letting something happen between two commands of a repository."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pymongo import monitoring


def overtake(target: Any, method: str, action: Callable[[], Awaitable[object]], *, after: bool = False) -> None:
    """Await `action` before, or after, each call of an asynchronous method of an object."""
    original = getattr(target, method)

    async def overtaken(*args: Any, **kwargs: Any) -> Any:
        if not after:
            await action()
        result = await original(*args, **kwargs)
        if after:
            await action()
        return result

    setattr(target, method, overtaken)


class AtCommand(monitoring.CommandListener):
    """Calls `act` before the command after `left` others, of those named `name` if it is set, then forgets it."""

    def __init__(self) -> None:
        self.left = 0
        self.name: str | None = None
        self.act: Callable[[], object] | None = None
        self.error: BaseException | None = None  # which the driver would swallow

    def before(self, number: int, act: Callable[[], object], name: str | None = None) -> None:
        self.left, self.name, self.act, self.error = number, name, act, None

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name in ("createIndexes", "hello", "endSessions") or self.name not in (
            None,
            event.command_name,
        ):
            return
        self.left -= 1
        if self.left < 0 and self.act is not None:
            act, self.act = self.act, None
            try:
                act()
            except BaseException as error:
                self.error = error

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...
