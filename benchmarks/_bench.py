"""What every measure is given: a server, networks of several lengths in front of it, and the order of its rounds."""

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
    """What a measure runs on.

    Attributes:
        server: A replica set of one, with the journal on.
        quick: Whether to do as little as shows that the measure works; the numbers mean nothing then.
        begin: To be told how many steps a measure has.
        step: To be called after each.
    """

    server: EmbeddedMongoDB
    quick: bool
    begin: Callable[[int], None]
    step: Callable[[], None]

    @contextlib.contextmanager
    def networks(self, round_trips: Sequence[float]) -> Iterator[list[str]]:
        """Yield, for each round trip in seconds, a connection string; for 0 one without a proxy."""
        port = self.server.ports[0]
        with proxies(port, [seconds for seconds in round_trips if seconds]) as ports:
            waiting = iter(ports)
            yield [_uri(next(waiting) if seconds else port) for seconds in round_trips]

    async def rounds(
        self, keys: Sequence[Key], count: int, measure: Callable[[Key], Awaitable[T]]
    ) -> dict[Key, list[T]]:
        """Measure everything in every round, so that the noise of the machine hits all alike.

        Each round begins with another of the keys, so that none always follows the same one.
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
