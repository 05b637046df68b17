"""A TCP proxy in front of MongoDB that takes its time, so that every command is a round trip worth the name."""

from __future__ import annotations

import socket
import threading
import time
from typing import Self


class DelayingProxy:
    """Passes connections on, each chunk a little later.

    Args:
        host: Where the server is.
        port: Its port.
        delay: Seconds, in each direction.
    """

    def __init__(self, host: str, port: int, delay: float) -> None:
        self._server, self._delay = (host, port), delay
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in [self._listener, *self._sockets]:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._server)
            self._sockets += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while chunk := source.recv(65536):
                time.sleep(self._delay)
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass
