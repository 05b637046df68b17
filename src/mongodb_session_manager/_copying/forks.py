"""Copying a session, or its beginning, within a collection.

A fork has the messages that the session had when its document was read: the heads are in the document, and the buckets
below them are read one after the other. Messages pass through this process; attachments are copied on the server. If
the attachments of a message are gone, the message was replaced: the fork gets the new message. If the archived messages
are gone, the session was written back or rewound: the fork restarts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from typing import Any

from .._format.attachment_refs import Reference, references_of
from .._format.content import HAS_CONTENT, all_block_ids, removed_ids
from .._format.documents import Document, number
from .._format.ids import agent_id_of, checked_id, stored_id
from .._format.labels import owner_of
from .._format.layout import Place
from .._format.retention import Life
from .._format.sizes import stored_size
from .._format.view import replaced_in
from .._store.sessions import ROUNDS, ReadAgainError
from .._store.store import SessionStore
from ..errors import AttachmentError, DatabaseError, SessionNotFoundError
from .builder import NewAgent, SessionBuilder
from .fork_document import agent_fields, checked_ends, cut_fields, ends_of, no_message, session_fields, usage_of
from .source import Source, archived_messages, is_rewound, read_copyable
from .staging import Staging

_BATCH_MESSAGES = 1024
_BATCH_BYTES = 2 * 1024 * 1024
"""Messages are copied in batches of this number or of this size; the attachments of a batch are copied together."""

Sized = tuple[Any, int]
"""A message and its size in bytes."""


class Forker:
    def __init__(self, store: SessionStore) -> None:
        self._store = store

    async def fork(self, session_id: str, new_id: str, at_message: object, owner: str | None = None) -> Place:
        checked_id(session_id, "session_id")
        staging, ends = Staging(self._store, checked_id(new_id, "new_id")), checked_ends(at_message)
        async with self._store.connection.operation():
            try:
                for number in range(ROUNDS):
                    source = await read_copyable(self._store, session_id, owner)
                    await (staging.clear() if number else staging.begin(owner_of(source.document)))
                    with suppress(ReadAgainError):
                        await _Fork(self._store, source, staging).copy(ends)
                        return staging.place
                raise _changed_too_often(session_id)
            except BaseException:
                await staging.abandon()
                raise


class _Fork:
    def __init__(self, store: SessionStore, source: Source, staging: Staging) -> None:
        self._store = store
        self._source = source
        self._staging = staging
        self._session_id = source.place.session_id
        self._replaced: list[Reference] = []
        self._has_content = source.document.get(HAS_CONTENT) is True
        self._left_out = set(removed_ids(source.document))

    async def copy(self, at_message: int | dict[str, int] | None) -> None:
        """Copy the session up to the given messages.

        Raises:
            ReadAgainError: Its archived messages were moved, or it was rewound.
        """
        document, agents = self._source.document, self._source.agents
        ends = ends_of(self._session_id, at_message, map(agent_id_of, agents))
        fields = session_fields(document, ends, self._store.connection.now())
        others = {key: agent for key, agent in (document.get("agents") or {}).items() if key not in agents}
        builder = SessionBuilder(self._store, self._staging, {**fields, "agents": others})
        for key in agents:
            await self._copy_agent(builder, key, ends.get(agent_id_of(key)))
        await builder.fill()
        if any(number(agent, "archived") for agent in agents.values()) and await self._is_rewound():
            raise ReadAgainError
        await self._store.attachments.remove_unnamed(self._staging.place, self._replaced)
        await self._copy_content()
        seconds = self._store.expiry.session_ttl or Life.of(document).time_to_live
        # A `state` of the session is a field of the application.
        sets = {**await self._staging.date(seconds), **{k: document[k] for k in ("state",) if k in document}}
        sets |= {HAS_CONTENT: True} if self._has_content else {}
        await self._staging.go_live(sets)

    async def _copy_agent(self, builder: SessionBuilder, key: str, last: int | None) -> None:
        stored, agent_id = self._source.agents[key], agent_id_of(key)
        if last is not None and not 0 <= last < stored["next_message_id"]:
            raise no_message(agent_id, last)
        agent = builder.add_agent(key, agent_fields(stored))
        is_complete, count, usage = False, 0, usage_of(())
        stays: set[str] = set()
        cut: set[str] = set()
        async with aclosing(self._batches(key)) as batches:
            async for batch in batches:
                count += len(batch)
                kept = 0 if is_complete else len(batch)
                if last is not None and not is_complete:
                    ids = [stored_id(message) for message, _ in batch]
                    kept = ids.index(last) + 1 if last in ids else 0
                    is_complete = kept > 0
                    kept = kept or len(batch)
                await self._add(builder, agent, agent_id, batch[:kept])
                if last is not None and self._has_content:
                    stays |= all_block_ids(message for message, _ in batch[:kept])
                    cut |= all_block_ids(message for message, _ in batch[kept:])
                if kept < len(batch):
                    later = await asyncio.to_thread(usage_of, [message for message, _ in batch[kept:]])
                    usage = {name: amount + later[name] for name, amount in usage.items()}
        if last is None:
            agent.next_id = stored["next_message_id"]
        elif not is_complete:
            raise no_message(agent_id, last)
        else:
            self._left_out |= cut - stays
            agent.fields = cut_fields(agent.fields, last, agent.count, count, usage)

    async def _copy_content(self) -> None:
        """Copy the values of the storage.

        Raises:
            SessionNotFoundError: The session no longer exists. It can have been removed before the copy began, so that
                an erasure of its owner did not find the copy.
        """
        content, source, target = self._store.content, self._source.place, self._staging.place
        if self._has_content:
            await content.copy(source, target, self._left_out)
        # A message that was redacted since the session was read can be redacted in the fork.
        late = await content.removed(source) - self._left_out
        if late and self._has_content:
            await content.remove(target, late)

    async def _batches(self, key: str) -> AsyncGenerator[list[Sized], None]:
        batch: list[Sized] = []
        async with aclosing(archived_messages(self._store, self._source, key)) as buckets:
            async for messages in buckets:
                batch += await asyncio.to_thread(_sized, messages)
                if len(batch) >= _BATCH_MESSAGES or sum(size for _, size in batch) >= _BATCH_BYTES:
                    yield batch
                    batch = []
        yield batch + await asyncio.to_thread(_sized, self._source.agents[key].get("messages") or [])

    async def _add(self, builder: SessionBuilder, agent: NewAgent, agent_id: str, batch: list[Sized]) -> None:
        missing = await self._copy_files({each for message, _ in batch for each in references_of(message)})
        for message, size in batch:
            if not missing.isdisjoint(references_of(message)):
                message = await self._current(agent_id, message, missing)
                size = stored_size(message)
                if "view" in agent.fields:
                    replaced = {int(message["message_id"])}
                    agent.fields = {**agent.fields, "view": replaced_in(agent.fields["view"], replaced)}
            await builder.add_message(message, size)

    async def _copy_files(self, references: set[Reference]) -> set[Reference]:
        """Copy attachments; return the missing ones."""
        return set(await self._store.attachments.copy(self._source.place, sorted(references), self._staging.place))

    async def _current(self, agent_id: str, message: Document, missing: set[Reference]) -> Document:
        """Return the message that has replaced one whose attachments are missing; copy its attachments.

        Raises:
            SessionNotFoundError: The session no longer exists.
            AttachmentError: The message was not replaced, but an attachment is missing.
            ReadAgainError: A rewind has removed the message.
        """
        session_id = self._session_id
        for _ in range(ROUNDS):
            references = references_of(message)
            if missing.isdisjoint(references):
                return message
            self._replaced += references
            identity = message.get("message_id"), message.get("created_at")
            current = await self._store.archive.find_message(session_id, agent_id, *identity)
            session = await self._store.sessions.get(session_id, {"incarnation": 1})
            if session.get("incarnation") != self._source.place.incarnation:
                raise SessionNotFoundError(f"session {session_id!r} no longer exists")
            if current is None and await self._is_rewound():
                raise ReadAgainError
            if current is None or references_of(current) == references:
                raise AttachmentError(f"session {session_id!r} was not forked: it has attachments that are missing")
            message, missing = current, await self._copy_files(set(references_of(current)))
        raise _changed_too_often(session_id)

    async def _is_rewound(self) -> bool:
        return await is_rewound(self._store, self._session_id, self._source.loaded)


def _sized(messages: Iterable[Any]) -> list[Sized]:
    return [(message, stored_size(message if type(message) is dict else {"": message})) for message in messages]


def _changed_too_often(session_id: str) -> DatabaseError:
    return DatabaseError(f"session {session_id!r} kept changing while it was forked: try again later")
