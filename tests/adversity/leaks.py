"""Resources that a session must not leak: threads, asyncio tasks, and sockets to the server."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mongodb_session_manager._io.loop import io_portal
from proxy import Proxy
from support import eventually


@contextmanager
def nothing_left(proxy: Proxy) -> Iterator[None]:
    """Check that everything started within the block has ended soon after it."""
    before = {*threading.enumerate(), *tasks_of_the_library()}

    def left() -> list[object]:
        threads = [thread for thread in threading.enumerate() if thread not in before and not _is_idle(thread)]
        tasks = [task for task in tasks_of_the_library() if task not in before]
        return [*threads, *tasks, *[proxy] * proxy.open_connections] or sockets_through(proxy)

    yield
    gone(left)


def gone(left: Callable[[], list[object]]) -> None:
    """Wait until `left()` returns nothing."""
    try:
        eventually(lambda: not left(), seconds=10)
    except AssertionError:
        raise AssertionError(f"still there: {left()}") from None


def tasks_of_the_library() -> list[object]:
    """Return the tasks on the library's event loop."""

    async def others() -> list[object]:
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    return io_portal().call(others)


def _is_idle(thread: threading.Thread) -> bool:
    """Return whether a thread is an idle worker of an executor, of the driver or of the loop."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is None or (frame.f_code.co_name == "_worker" and "concurrent" in frame.f_code.co_filename)


def sockets_through(proxy: Proxy) -> list[object]:
    """Return this process's connections to or from the proxy's clients, including those that the peer has closed."""
    if sys.platform != "linux":
        return []
    return [ends for ends in _open_connections() if proxy.port in (ends[0][1], ends[1][1])]


def _open_connections() -> Iterator[tuple[Any, Any]]:
    """Yield the local and the remote address of each open connection of this process."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed in the meantime, or not connected
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as copy:
                    if copy.family == socket.AF_INET:
                        yield copy.getsockname(), copy.getpeername()
