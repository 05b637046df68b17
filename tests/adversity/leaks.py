"""Resources that a session must not leak: threads, asyncio tasks, and sockets to the server."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        return [*threads, *tasks, *sockets_through(proxy), *[proxy] * proxy.open_connections]

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
    port = f":{proxy.port:04X}"
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    # local address, remote address, state (0A is listening), inode
    known = {line[9]: f"{line[1]} -> {line[2]}" for line in lines if line[3] != "0A" and port in line[1] + line[2]}
    return [known[inode] for inode in _open_sockets() if inode in known]


def _open_sockets() -> list[str]:
    inodes = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # closed in the meantime
            continue
        if target.startswith("socket:["):
            inodes.append(target[8:-1])
    return inodes
