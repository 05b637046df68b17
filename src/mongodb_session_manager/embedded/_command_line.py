"""The command line of the embedded server."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence

from ..errors import ConfigurationError, EmbeddedServerError
from ._server import EmbeddedMongoDB


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server until SIGINT or SIGTERM. The first line of stdout is its connection string."""
    parser = argparse.ArgumentParser(prog="python -m mongodb_session_manager.embedded", description=main.__doc__)
    parser.add_argument("--port", type=int, help="default: a free port")
    parser.add_argument("--data-directory", help="keep the data here (default: a temporary directory)")
    parser.add_argument("--standalone", action="store_true", help="no replica set")
    parser.add_argument("--binary", help="the mongod to run (default: MONGOD_BINARY, PATH, the extra)")
    options = parser.parse_args(argv)
    try:
        server = EmbeddedMongoDB(**vars(options))
    except ConfigurationError as error:
        parser.error(str(error))

    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # ignore further signals while the server stops
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        with server:
            print(server.connection_string, flush=True)
            while True:
                server._check()
                time.sleep(0.1)
    except KeyboardInterrupt:
        return 0
    except EmbeddedServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
