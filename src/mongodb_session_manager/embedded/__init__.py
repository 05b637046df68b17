"""A real local mongod for development and tests, which ends with the process that started it.

    with EmbeddedMongoDB() as server:
        client = AsyncMongoClient(server.connection_string)

or, in a terminal, `python -m mongodb_session_manager.embedded`. Needs a mongod of MongoDB 5.0 or newer.
"""

from __future__ import annotations

from ._server import EmbeddedMongoDB, find_mongod, main

__all__ = ["EmbeddedMongoDB", "find_mongod", "main"]
