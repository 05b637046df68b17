"""The session "s" through each class that gives access to it, called as if all were synchronous."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from support import CommandLog, alternating

KINDS = alternating("manager", "async manager", "async repository", "repository")


class Blocking:
    """An object whose coroutine methods are called like ordinary ones."""

    def __init__(self, target: Any, runner: asyncio.Runner, *first: Any) -> None:
        self.target, self._runner, self._first = target, runner, first

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = partial(getattr(self.target, name), *self._first)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self._runner.run(result) if inspect.iscoroutine(result) else result

        return call


@contextmanager
def repositories_of_kinds(server: str, database: str, commands: CommandLog) -> Iterator[Callable[[str], Blocking]]:
    """Yield a function that returns the repository of a kind, which is made when it is first asked for."""
    with asyncio.Runner() as runner, ExitStack() as stack:

        @functools.cache
        def of_kind(kind: str) -> Blocking:
            repository = MongoDBSessionRepository if kind == "repository" else AsyncMongoDBSessionRepository
            target = repository(server, database, event_listeners=[commands])
            stack.callback(Blocking(target, runner).close)
            return Blocking(target, runner, "s")

        yield of_kind


@contextmanager
def session_of_kind(
    kind: str, factory: MongoDBSessionManagerFactory, repository_of_kind: Callable[[str], Blocking]
) -> Iterator[Blocking]:
    """Create the session and yield it, connected."""
    with asyncio.Runner() as runner:
        manager = factory.create_session_manager("s")
        if kind == "manager":
            session = Blocking(manager, runner)
        elif kind == "async manager":
            session = Blocking(runner.run(factory.create_session_manager_async("s")), runner)
        else:
            session = repository_of_kind(kind)
        session.get_metadata()  # connects
        yield session
