"""A session that is being opened."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from types import CoroutineType, TracebackType
from typing import Any, cast

from .async_manager import AsyncMongoDBSessionManager


async def _opened(make: Callable[[], AsyncMongoDBSessionManager]) -> AsyncMongoDBSessionManager:
    return await make().open()


class PendingSession(Coroutine[Any, Any, AsyncMongoDBSessionManager]):
    """A session that is opened by `await`, or opened and closed by `async with`.

        manager = await factory.create_session_manager_async("ada-1")

        async with factory.create_session_manager_async("ada-1") as manager:
            ...

    Nothing is opened before. It is a coroutine: `asyncio.create_task`, `asyncio.gather`, `asyncio.wait_for` and
    `asyncio.run` take it, and Python warns if it is never awaited.
    """

    def __init__(self, name: str, make: Callable[[], AsyncMongoDBSessionManager]) -> None:
        self._opening = cast("CoroutineType[Any, Any, AsyncMongoDBSessionManager]", _opened(make))
        self._opening.__qualname__ = name  # in the warning
        self._manager: AsyncMongoDBSessionManager | None = None

    def __await__(self) -> Generator[Any, Any, AsyncMongoDBSessionManager]:
        return self._opening.__await__()

    def send(self, value: Any) -> Any:
        """Resume the coroutine."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception in the coroutine."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """End the coroutine; the session is not opened."""
        self._opening.close()

    async def __aenter__(self) -> AsyncMongoDBSessionManager:
        self._manager = await self._opening
        return self._manager

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._manager is not None:
            await self._manager.close()
