"""`Source`: a session that is forked or written back, as its document was read, in the current form."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple

from bson import ObjectId

from .._format.changes import Loaded
from .._format.documents import Document, needs_upgrade, number, usable
from .._format.ids import agent_key, stored_id
from .._format.layout import Place
from .._format.malformed import MalformedField, malformed_fields, usable_agents
from .._store.sessions import ROUNDS
from .._store.store import SessionStore
from ..errors import DatabaseError


class Source(NamedTuple):
    """A session, the place of its parts, and the agents by key, except the ones that opening ignores."""

    place: Place
    document: Document
    agents: dict[str, Document]

    @property
    def loaded(self) -> dict[str, Loaded]:
        return {key: Loaded.of(agent) for key, agent in self.agents.items()}


async def read_source(store: SessionStore, session_id: str, owner: str | None = None) -> Source:
    """Return a session. A session of an earlier version is migrated to the current form, as opening it does.

    Raises:
        SessionNotFoundError: The session does not exist, or belongs to another owner.
        DatabaseError: The messages of an agent have a type that cannot be used, or other writers changed the session
            again and again.
    """
    for _ in range(ROUNDS):
        document = await store.sessions.get(session_id, {}, owner)
        if not isinstance(document.get("incarnation"), ObjectId):
            await store.migration.migrate(session_id)
            continue
        agents = _agents_of(session_id, document)
        numbers = {
            key: {
                **agent,
                "archived": number(agent, "archived"),
                "revision": number(agent, "revision"),
                "ids": list(map(stored_id, agent.get("messages") or [])),
            }
            for key, agent in agents.items()
        }
        if not (earlier := [key for key, agent in numbers.items() if needs_upgrade(agent)]):
            return Source(Place(session_id, document["incarnation"]), document, agents)
        await store.migration.migrate_agents(session_id, numbers, earlier)
    raise DatabaseError(f"session {session_id!r} kept changing while it was read: try again later")


async def read_copyable(store: SessionStore, session_id: str, owner: str | None = None) -> Source:
    """Return a session whose agents can be copied; raise `DatabaseError` as `read_source` does if one is malformed."""
    source = await read_source(store, session_id, owner)
    for field in malformed_fields(source.document):
        is_of_agent = field.path == "agents" or field.path.startswith("agents.")
        # Malformed numbers and lists of names are copied unchanged; opening ignores them, too.
        is_copied = field.kind is int or field.path.endswith((".usage", ".config_set"))
        if field.value is not None and is_of_agent and not is_copied:
            raise field.error(session_id)
    return source


def _agents_of(session_id: str, document: Mapping[str, Any]) -> dict[str, Document]:
    stored = document.get("agents")
    copied = {**document, "agents": dict(stored) if type(stored) is dict else stored}  # `usable_agents` removes some
    agents = {key: agent for key, agent in usable_agents(session_id, copied).items() if key and "." not in key}
    for key, agent in agents.items():
        messages = agent.get("messages")
        if messages is not None and type(messages) is not list:
            raise MalformedField(f"agents.{key}.messages", messages, list).error(session_id)
    return {
        key: agent
        for key, agent in agents.items()
        # Opening leaves out an agent of an earlier version if another agent has its key.
        if agent.get("next_message_id") is not None or agent_key(key) == key or agent_key(key) not in agents
    }


async def is_rewound(store: SessionStore, session_id: str, loaded: Mapping[str, Loaded]) -> bool:
    """Return whether an agent was rewound after it was loaded. Its archive can then hold other messages."""
    document = await store.sessions.find(session_id, {f"agents.{key}.rewound": 1 for key in loaded})
    agents = usable(dict, (document or {}).get("agents"))
    return any(key in agents and Loaded.of(agents[key]) != each for key, each in loaded.items())


async def archived_messages(store: SessionStore, source: Source, key: str) -> AsyncGenerator[list[Document], None]:
    """Yield the archived messages of an agent, oldest first, a bucket at a time.

    Raises:
        DatabaseError: A message is missing.
        ReadAgainError: The archived messages were moved elsewhere after the session was read.
    """
    agent = source.agents[key]
    since, position, archived = agent.get("created_at"), 0, number(agent, "archived")
    while position < archived:
        try:
            messages = await store.archive.read_bucket(source.place, key, since, position, archived)
        except DatabaseError:
            await store.archive.raise_if_moved(source.place, {key: (since, position, archived)})
            raise
        yield messages
        position += len(messages)
