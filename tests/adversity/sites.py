"""Servers for tests that cause failures, each behind a proxy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pymongo

from mongodb_session_manager import MongoDBSessionManagerFactory
from proxy import Proxy
from support import agent


@dataclass
class Site:
    """A server, a proxy in front of it, and a collection for one test module.

    Attributes:
        template: A session with the messages `hi`, `hello`.
    """

    client: pymongo.MongoClient[dict[str, Any]]
    proxy: Proxy
    database: str
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def collection(self) -> pymongo.collection.Collection[dict[str, Any]]:
        return self.client[self.database]["agent_sessions"]

    def copy_template(self, session_id: str) -> None:
        """Store a session with that id and the messages `hi`, `hello`."""
        self.collection.insert_one({**self.template, "_id": session_id, "session_id": session_id})

    def fail(self, times: int, **data: Any) -> int:
        """Set the fail point `failCommand`, or turn it off; return how many commands it has failed so far."""
        mode: Any = {"times": times} if times else "off"
        count: int = self.client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})[
            "count"
        ]
        return count


@contextmanager
def a_site(server: str) -> Iterator[Site]:
    database = f"test_{uuid.uuid4().hex}"
    with pymongo.MongoClient[dict[str, Any]](server, tz_aware=True) as client, Proxy(server) as proxy:
        with MongoDBSessionManagerFactory(proxy.uri, database) as factory:  # builds the indexes
            agent(factory.create_session_manager("s"), "hello")("hi")
        site = Site(client, proxy, database)
        template = site.collection.find_one({"_id": "s"})
        assert template is not None
        site.template = template
        yield site
        client.drop_database(database)


def answers(factory: MongoDBSessionManagerFactory) -> bool:
    return factory.get_connection_stats()["status"] == "connected"
