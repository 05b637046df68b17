"""Exporting a session as lines of the export format, a few at a time."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from .._format.attachment_refs import Reference, references_of
from .._format.changes import Loaded
from .._format.content import HAS_CONTENT
from .._format.dates import now
from .._format.documents import Document
from .._format.ids import ExportedIds, agent_id_of, agent_key, checked_id
from .._format.keys import block_id_of
from .._format.layout import Place
from .._format.malformed import MalformedField, malformed_fields, usable_agents
from .._store.store import SessionStore
from ..errors import AttachmentError, DatabaseError, SessionConflictError, SessionNotFoundError
from .export_format import Writer
from .import_checks import AGENT_NOT_COPIED, NOT_COPIED
from .source import is_rewound

_ROUNDS = 8
"""An attachment is reported as missing after its message was found changed this often."""

_AT_ONCE = 64
"""The number of messages that are encoded at a time."""


class Export:
    """A running export.

    Every `pull` sends its own commands and leaves no cursor open, so stopping early leaks no cursor, and a slow reader
    does not run into the cursor timeout.
    """

    def __init__(self, store: SessionStore, session_id: str, owner: str | None = None) -> None:
        self._store = store
        self._connection = store.connection
        self._owner = owner
        self._pending = self._lines(session_id)

    async def pull(self) -> list[str]:
        return await anext(self._pending, [])

    async def _lines(self, session_id: str) -> AsyncGenerator[list[str], None]:
        """Yield lines. The heads are read before the buckets below them, so a move cannot hide a message."""
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            document = await self._store.sessions.get(session_id, {}, self._owner)
        for field in malformed_fields(document):
            if field.value is not None:
                raise field.error(session_id)
        agents: dict[str, Document] = usable_agents(session_id, document)
        loaded = {key: Loaded.of(agent) for key, agent in agents.items()}
        has_archive = any(agent.get("archived") for agent in agents.values())
        place = Place(session_id, document.get("incarnation"))
        writer, source = Writer(), _Source(place, document.get("created_at"), loaded)
        document.pop("agents", None)
        yield writer.head(session_id, _without(document, NOT_COPIED), now())
        for key in tuple(agents):
            async for lines in self._agent_lines(source, key, agents.pop(key), writer):
                yield lines
        if document.get(HAS_CONTENT) is True:
            async for lines in self._value_lines(source.place, writer):
                yield lines
        if has_archive:
            await self._check_rewound(source)
        yield [writer.end()]

    async def _value_lines(self, place: Place, writer: Writer) -> AsyncGenerator[list[str], None]:
        """Yield the lines of the values of the storage, except those that are about to be removed.

        Raises:
            SessionNotFoundError: The session no longer exists.
        """
        content = self._store.content
        async with self._connection.operation():
            left_out = await content.removed(place)  # now: messages can be redacted since the session was read
            keys = await content.keys(place, "")
        for key in keys:
            if block_id_of(key) in left_out:
                continue
            async with self._connection.operation():
                data = await content.read(place, key)
            if data is not None:
                yield await asyncio.to_thread(list, writer.value(key, data))
        await content.removed(place)

    async def _agent_lines(
        self, source: _Source, key: str, agent: Document, writer: Writer
    ) -> AsyncGenerator[list[str], None]:
        # Versions before 1.0 did not encode ids.
        agent_id = key if agent.get("next_message_id") is None else agent_id_of(key)
        yield [writer.agent(agent_id, _without(agent, AGENT_NOT_COPIED))]
        sequence = ExportedIds()
        position, archived = 0, int(agent.get("archived") or 0)
        while position < archived:
            async with self._connection.operation():
                messages = await self._older(source, key, agent.get("created_at"), position, archived)
            async for lines in self._message_lines(source, agent_id, sequence, messages, writer):
                yield lines
            position += len(messages)
        async for lines in self._message_lines(source, agent_id, sequence, agent.get("messages") or [], writer):
            yield lines

    async def _older(self, source: _Source, key: str, since: Any, begin: int, end: int) -> list[Document]:
        """Return archived messages from a position on.

        Raises:
            SessionNotFoundError: The session no longer exists.
            SessionConflictError: The session was rewound.
            DatabaseError: A message is missing.
        """
        while True:
            try:
                return await self._store.archive.read_bucket(source.place, key, since, begin, end)
            except DatabaseError as error:
                missing = error
            await self._check_rewound(source)
            if not await self._is_elsewhere(source) and not await self._store.migration.move_late_buckets(source.place):
                raise missing

    async def _check_rewound(self, source: _Source) -> None:
        session_id = source.place.session_id
        async with self._connection.operation():
            if await is_rewound(self._store, session_id, source.loaded):
                raise SessionConflictError(
                    f"session {session_id!r} was rewound while it was exported: repeat the request"
                )

    async def _is_elsewhere(self, source: _Source) -> bool:
        """Return whether the session was migrated since it was read, and update its place; raise if it was removed."""
        session_id, before = source.place
        document = await self._store.sessions.get(session_id, {"incarnation": 1, "created_at": 1}, self._owner)
        now_at = document.get("incarnation")
        if now_at == before:
            return False
        if before is not None or document.get("created_at") != source.created_at:
            raise SessionNotFoundError(f"session {session_id!r} no longer exists")
        source.place = Place(session_id, now_at)
        return True

    async def _message_lines(
        self, source: _Source, agent_id: str, sequence: ExportedIds, messages: Iterable[Document], writer: Writer
    ) -> AsyncGenerator[list[str], None]:
        session_id = source.place.session_id
        waiting: list[Document] = []
        for stored in messages:
            if type(stored) is not dict:
                path = f"agents.{agent_key(agent_id)}.messages.{sequence.position}"
                raise MalformedField(path, stored, dict).error(session_id)
            message_id = sequence.next(stored.get("message_id"))
            message = {**stored, "message_id": message_id}
            if len(waiting) == _AT_ONCE or (waiting and references_of(message)):
                yield await asyncio.to_thread(list, map(writer.message, waiting))
                waiting = []
            for _ in range(_ROUNDS if references_of(message) else 0):
                missing = None
                for reference in references_of(message):
                    if not writer.knows(reference):
                        async for lines in self._attachment_lines(source.place, reference, writer):
                            yield lines
                        if not writer.knows(reference):
                            missing = reference
                            break
                if missing is None:
                    break
                # The message might have been redacted or replaced since it was read.
                if await self._is_elsewhere(source):
                    continue
                async with self._connection.operation():
                    identity = stored.get("message_id"), stored.get("created_at")
                    find = self._store.archive.find_message
                    current = await find(session_id, agent_id, *identity, owner=self._owner)
                if current is None:
                    await self._check_rewound(source)
                if current is None or current.get("attachments") == message["attachments"]:
                    raise AttachmentError(
                        f"session {session_id!r}: message {message_id} of agent {agent_id!r} has a missing or damaged "
                        f"attachment (SHA-256 {missing.sha256})"
                    )
                message = {**current, "message_id": message_id}
            waiting.append(message)
        if waiting:
            yield await asyncio.to_thread(list, map(writer.message, waiting))

    async def _attachment_lines(
        self, place: Place, reference: Reference, writer: Writer
    ) -> AsyncGenerator[list[str], None]:
        """Yield the lines of an attachment; the last ones are missing if it is removed during the export."""
        length, n, digest = 0, 0, hashlib.sha256()
        while length < reference.length:
            async with self._connection.operation():
                data = await self._store.attachments.chunk(place, reference, n)
            if not data:
                return
            yield await asyncio.to_thread(_pieces_of, writer, reference, length, data, digest)
            length, n = length + len(data), n + 1
        if length == reference.length and digest.hexdigest() == reference.sha256:
            writer.whole(reference)


@dataclass
class _Source:
    """A session that is being exported; its place changes if it is migrated, but never its `created_at`."""

    place: Place
    created_at: Any
    loaded: dict[str, Loaded]


def _without(fields: Document, names: Iterable[str]) -> Document:
    return {name: value for name, value in fields.items() if name not in names}


def _pieces_of(writer: Writer, reference: Reference, at: int, data: bytes, digest: Any) -> list[str]:
    digest.update(data)
    return list(writer.pieces(reference, at, data))
