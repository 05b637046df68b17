"""Applications over real HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from support import eventually


@contextmanager
def serving(app: FastAPI, ws: Any = "none") -> Iterator[httpx.Client]:
    """Serve an application on a port of its own and yield a client of it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws=ws))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive())
        (port,) = [socket.getsockname()[1] for each in server.servers for socket in each.sockets]
        # Without `verify=False`, a client takes as long as a turn to load certificates, which it does not need.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, verify=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
