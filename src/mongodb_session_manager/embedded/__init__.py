"""A local MongoDB server for development and tests, which ends with the process that started it.

    with EmbeddedMongoDB() as server:
        client = AsyncMongoClient(server.connection_string)

or, in a terminal, `python -m mongodb_session_manager.embedded`. Needs a mongod of MongoDB 5.0 or newer.
"""

from __future__ import annotations

from ._binary import find_mongod
from ._command_line import main
from ._server import EmbeddedMongoDB

__all__ = ["EmbeddedMongoDB", "find_mongod", "main"]
