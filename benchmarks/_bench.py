"""The environment of a measure: a server, simulated networks, and rounds."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mongodb_session_manager.embedded import EmbeddedMongoDB

from ._proxy import proxies

T = TypeVar("T")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Bench:
    """The environment of a measure.

    Attributes:
        server: A replica set with one member and journaling.
        quick: Whether to check only that the measure works; its numbers are meaningless then.
        begin: Called with the number of steps of the measure.
        step: Called after each step.
    """

    server: EmbeddedMongoDB
    quick: bool
    begin: Callable[[int], None]
    step: Callable[[], None]

    @contextlib.contextmanager
    def networks(self, round_trips: Sequence[float]) -> Iterator[list[str]]:
        """Yield a connection string for each round trip (seconds); for 0, without a proxy."""
        port = self.server.port
        with proxies(port, [seconds for seconds in round_trips if seconds]) as ports:
            waiting = iter(ports)
            yield [_uri(next(waiting) if seconds else port) for seconds in round_trips]

    async def rounds(
        self, keys: Sequence[Key], count: int, measure: Callable[[Key], Awaitable[T]]
    ) -> dict[Key, list[T]]:
        """Measure every key in every round, so that noise of the machine affects all keys equally.

        Each round begins with another key, so that the order changes.
        """
        found: dict[Key, list[T]] = {key: [] for key in keys}
        for number in range(count):
            start = number % len(keys)
            for key in (*keys[start:], *keys[:start]):
                found[key].append(await measure(key))
                self.step()
        return found


def new_id() -> str:
    """Return the id of a session that does not exist yet."""
    return f"s-{uuid.uuid4().hex}"


def _uri(port: int) -> str:
    return f"mongodb://127.0.0.1:{port}/?directConnection=true"
