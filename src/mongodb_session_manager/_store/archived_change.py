"""`ArchivedChange`: the changes of one agent's archived messages, stored after the statement of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .._format.attachment_refs import references_of
from .._format.changes import AgentWrite, Identity, MessageWrite
from .._format.comparison import renumbered
from .._format.content import block_ids_of
from .._format.documents import Document
from .._format.expressions import number_at
from .._format.ids import agent_key
from .._format.layout import Place
from .._format.statements import REMOVED, Update, removed_without
from .._format.view import view_without
from .store import SessionStore


async def find_archived(
    store: SessionStore, place: Place, write: AgentWrite, agent: Document, newer: Mapping[int, Document]
) -> dict[int, Document] | None:
    """Return the archived messages of a write, by id.

    Args:
        store: The sessions.
        place: The session.
        write: The write.
        agent: Its agent, as stored.
        newer: The messages of the write that the session document holds.

    Returns:
        `None` if the session was written back or deleted concurrently.
    """
    if not agent.get("archived"):
        return {}
    archive, key, since = store.archive, agent_key(write.agent_id), agent.get("created_at")
    found = {}
    for message_id in write.messages.keys() - newer.keys():
        if message_id >= agent["next_message_id"]:
            continue
        ours = write.messages[message_id].identity
        created_at = None if ours is None else ours.created_at
        message = await archive.find_archived(place, key, message_id, since, agent["archived"], created_at)
        if message is None and created_at is not None and write.by_id:
            message = await archive.find_archived(place, key, message_id, since, agent["archived"])
        if message is not None:
            found[message_id] = message
        elif await archive.is_back(place.session_id, key, since, agent["archived"]) or await archive.has_moved(place):
            return None
    return found


class ArchivedChange:
    """The changes of those messages of one agent that can be in a bucket.

    Args:
        store: The sessions.
        place: The session.
        agent_id: The agent.
    """

    def __init__(self, store: SessionStore, place: Place, agent_id: str) -> None:
        self._store = store
        self._place = place
        self._key = agent_key(agent_id)
        self._fields: dict[tuple[int, Any], Document] = {}  # by message id and `created_at`; `None` if it is unknown
        self._since: Any = None
        self._archived = 0
        self._write: AgentWrite | None = None  # `None` if no message is known to be in a bucket

    def add(self, message_id: int, created_at: Any, fields: Mapping[str, Any]) -> None:
        """Add new fields of a message that can be in a bucket."""
        self._fields.setdefault((message_id, created_at), {}).update(fields)

    def set_apart(
        self, rest: AgentWrite, agent: Document, older: Mapping[int, Document], newer: Mapping[int, Document]
    ) -> AgentWrite:
        """Add the changes of archived messages; return the other changes, with the stored ids of their messages."""
        outdated: set[str] = set()
        redacted: set[str] = set()
        messages: dict[int, MessageWrite] = {}
        new_ids: dict[int, int] = {}
        for message_id, message in rest.messages.items():
            if message.recorded is not None:
                messages[message_id] = message
                continue
            if (stored := newer.get(message_id)) is not None and message_id not in older:
                messages[message_id] = replace(message, known_as=Identity.of(stored))
                new_ids[message_id] = int(stored["message_id"])
                continue
            self.add(message_id, older[message_id].get("created_at"), message.fields)
            if "message" in message.fields:
                outdated.update(map(str, references_of(older[message_id])))
            if message.redacts:
                redacted.update(block_ids_of(older[message_id]))
            if self._write is None:
                self._since, self._archived = agent.get("created_at"), int(agent["archived"])
                self._write = replace(
                    AgentWrite(rest.agent_id, by_id=rest.by_id, incarnation=rest.incarnation, loaded=rest.loaded),
                    attached=rest.attached,
                    dates=rest.dates,
                )
            self._write.set_fields(message_id, message.fields, message.identity)
            self._write.outdated = sorted({*self._write.outdated, *outdated})
        left = replace(
            rest,
            messages=messages,
            outdated=[*rest.outdated, *sorted(outdated)],
            redacted=[*rest.redacted, *sorted(redacted)],
        )
        return renumbered(left, new_ids)

    async def store(self) -> AgentWrite | None:
        """Change the buckets.

        Returns:
            The changes as a write if they must be stored again: the session was written back concurrently, from
            buckets without the changes, or it was deleted.
        """
        for (message_id, created_at), fields in self._fields.items():
            await self._store.archive.change(self._place, self._key, message_id, fields, created_at)
        return None if self._write is None or await self._count(self._write) else self._write

    async def _count(self, write: AgentWrite) -> bool:
        """Increment `archive_revision`, which a write-back matches; return `False` if the write-back came first.

        The same statement removes the old content from the view of the agent, and the references of the removed
        attachments from `removed_attachments`.
        """
        path = f"agents.{self._key}"
        condition = {
            "_id": self._place.session_id,
            f"{path}.created_at": self._since,
            f"{path}.archived": {"$gte": self._archived},
        }
        sets: Document = {f"{path}.archive_revision": {"$add": [number_at(f"${path}.archive_revision"), 1]}}
        if replaced := [n for (n, _), fields in self._fields.items() if "message" in fields]:
            sets[f"{path}.view"] = view_without(f"${path}", replaced)
        if write.outdated:
            sets[REMOVED] = removed_without(write.outdated)
        return await self._store.sessions.update(Update(condition, [{"$set": sets}], None))
