"""`Writer`: stores recorded changes exactly once, in the document and in the archive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bson import ObjectId

from .._format.changes import AgentWrite, Change, Loaded, fold, in_parts
from .._format.comparison import StoredView, known_messages, positions, reconcile, renumbered
from .._format.content import CONTENT_TO_REMOVE, removed_ids
from .._format.documents import Document
from .._format.ids import agent_key, is_message_id, is_numbered, stored_id
from .._format.layout import Place
from .._format.malformed import usable_agents
from .._format.retention import LIFE
from .._format.sizes import MAX_DOCUMENT_BYTES, of_agent, size_of
from .._format.statements import REMOVED, Update, compile_update
from .._io.drivers import AsyncCollection, find_and_modify
from ..errors import (
    DatabaseError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionNotFoundError,
    StateTooLargeError,
)
from .archived_change import ArchivedChange, find_archived
from .expiry import matched
from .lease import Lease
from .lease_guard import LeaseGuard
from .sessions import ROUNDS
from .store import SessionStore


class Writer:
    """Stores the changes of units of work."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store

    async def apply(
        self,
        session_id: str,
        changes: Iterable[Change],
        incarnation: ObjectId | None,
        lease: Lease | None = None,
        releases: bool = False,
        loaded: Mapping[str, Loaded] | None = None,
        owner: str | None = None,
    ) -> dict[str, MongoDBSessionError]:
        """Store recorded changes exactly once, as `AsyncMongoDBSessionRepository._apply` describes."""
        refused: dict[str, MongoDBSessionError] = {}
        async with self._store.sessions.connection.operation():
            parts = list(in_parts(changes))
            for number, part in enumerate(parts, 1):
                guard = None if lease is None else LeaseGuard(lease, releases and number == len(parts))
                left = [change for change in part if not refused or _are_messages_stored(refused.get(change.agent_id))]
                for _ in range(ROUNDS):
                    flush = await self._prepare(session_id, left, incarnation, guard, loaded or {}, owner)
                    if await flush.store():
                        await self._remove_refused(flush)
                        if incarnation is not None or not await self._is_created_again(flush):
                            break
                    self._store.expiry.forget(session_id)
                else:
                    raise _changed_too_often(session_id)
                refused |= flush.refused
        return refused

    async def _prepare(
        self,
        session_id: str,
        changes: Sequence[Change],
        opened: ObjectId | None,
        guard: LeaseGuard | None,
        loaded: Mapping[str, Loaded],
        owner: str | None,
    ) -> Flush:
        """Store the attachments of changes; return the flush that stores the changes."""
        writes = fold(changes)
        try:
            life = await self._store.expiry.life(session_id, owner)
        except SessionNotFoundError as error:
            return Flush(self._store, Place(session_id, opened), {}, dict.fromkeys(writes, error))
        place = Place(session_id, opened or life.incarnation)
        for write in writes.values():
            write.incarnation, write.loaded = place.incarnation, loaded.get(write.agent_id)
            if write.moment is not None:
                write.moment = self._store.sessions.connection.now()
        await self._store.attachments.store(place, list(writes.values()), self._store.expiry.dates(life))
        return Flush(self._store, place, writes, guard=guard, owner=owner)

    async def _remove_refused(self, flush: Flush) -> None:
        """Remove the attachments of refused messages."""
        if flush.attached and not all(map(_are_messages_stored, flush.refused.values())):
            await self._store.attachments.remove_unnamed(flush.place, flush.attached)

    async def _is_created_again(self, flush: Flush) -> bool:
        """Return whether the session was deleted before the flush, and created again since."""
        is_gone = any(type(error) is SessionNotFoundError for error in flush.refused.values())
        if not flush.attempted or not is_gone:
            return False
        return await self._store.sessions.find(flush.place.session_id, {"_id": 1}, flush.owner) is not None


async def _matched_with_removed(collection: AsyncCollection, update: Update) -> Document | None:
    return await find_and_modify(
        collection, update.filter, update.update, {REMOVED: 1, "lease": 1, **CONTENT_TO_REMOVE}
    )


class Flush:
    """Stores writes until each one is stored or refused.

    Args:
        store: The sessions.
        place: The session.
        writes: The writes by agent id.
        refused: The errors of agents whose writes cannot be stored; storing adds to it.
        guard: The lease; `None` without one.
        owner: The owner of the session; `None` for any.

    Attributes:
        attached: The references to the attachments that were stored for the writes.
        attempted: Whether there were writes to store.
    """

    def __init__(
        self,
        store: SessionStore,
        place: Place,
        writes: dict[str, AgentWrite],
        refused: dict[str, MongoDBSessionError] | None = None,
        guard: LeaseGuard | None = None,
        owner: str | None = None,
    ) -> None:
        self.place = place
        self.owner = owner
        self.refused = {} if refused is None else refused
        self.attached = [reference for write in writes.values() for reference in write.attached]
        self.attempted = bool(writes)
        self._store = store
        self._writes = writes
        self._guard = guard
        self._in_archive: dict[str, ArchivedChange] = {}
        self._redacted: set[str] = set()

    async def store(self) -> bool:
        """Store the writes.

        Returns:
            `False` if the attachments would expire before the session, so that all changes must be written again.
        """
        store, session_id, mover, rounds = self._store, self.place.session_id, self._store.mover, 0
        while self._writes:
            if rounds == ROUNDS:
                await store.sessions.raise_malformed(session_id)
                raise _changed_too_often(session_id)
            writes = list(self._writes.values())
            await mover.slow_down(session_id, writes)
            redacts = any(write.redacts for write in writes)
            returns_removed = redacts or any(write.replaces_content for write in writes)
            update = compile_update(session_id, writes, self.owner)
            if self._guard is not None:
                update = self._guard.added_to(update, store.connection.now())
            returns_fields = returns_removed or (self._guard is not None and self._guard.takes)
            command: Any = _matched_with_removed if returns_fields else matched
            try:
                stored = await store.expiry.update(update, command)
            except MessageTooLargeError as error:
                refusal = error
            else:
                if stored:
                    if self._guard is not None:
                        self._guard.confirm(stored if returns_fields else None)
                    if returns_removed and stored.get(REMOVED):
                        await store.attachments.remove_removed(self.place, stored[REMOVED])
                    if redacts:
                        self._redacted.update(removed_ids(stored))
                    self._note_stored()
                elif not await self._compare():
                    return False
                rounds += 1
                continue
            if not await mover.make_room(session_id, refusal):
                self._writes = {}
                if not await self._store_what_fits(writes, refusal):
                    return False
        is_stored = await self._change_archive()
        if self._redacted:
            await store.content.remove(self.place, self._redacted)
        return is_stored

    async def _store_alone(self, write: AgentWrite) -> bool:
        """Store a write by its own flush; return the result of `store`."""
        guard = None if self._guard is None else self._guard.unreleased()
        return await Flush(self._store, self.place, {write.agent_id: write}, self.refused, guard, self.owner).store()

    def _note_stored(self) -> None:
        """Update the known heads, and record the replaced messages whose old content a stale bucket can contain.

        The newest message is never in a bucket, unless it exceeds the limits alone and was moved to make room for the
        next one. So only a replacement of such a message, or of an older one, must check the archive.
        """
        session_id, mover = self.place.session_id, self._store.mover
        for agent_id, write in self._writes.items():
            if not (replaced := write.replaced):
                continue
            head, following = mover.head(session_id, agent_key(agent_id)), write.expected_id
            if following is None and head is not None:
                following = head.next_id
            for message_id, fields in replaced.items():
                is_newest = message_id + 1 == following
                if "message" in fields and not (is_newest and head is not None and head.size <= mover.limits.size):
                    identity = write.identities.get(message_id)
                    created_at = None if identity is None else identity.created_at
                    self._archived_change(agent_id).add(message_id, created_at, fields)
        mover.written(session_id, self._writes.values())
        self._writes = {}

    # Comparing with the stored session.

    async def _compare(self) -> bool:
        """Compare writes that matched nothing with the stored session; keep the ones to send and record refusals.

        Returns:
            `False` if the attachments would expire before the session.
        """
        session_id, store = self.place.session_id, self._store
        document = await store.sessions.find(session_id, _compared_fields(self._writes))
        if document is None or document.get("incarnation") != self.place.incarnation:
            gone = SessionNotFoundError(f"session {session_id!r} no longer exists")
            self.refused.update(dict.fromkeys(self._writes, gone))
            self._writes = {}
            return True
        if any(write.redacts for write in self._writes.values()):  # an acknowledgement might have been lost
            self._redacted.update(removed_ids(document))
        lost = None if self._guard is None else self._guard.check_lost(document)
        agents = _compared_agents(session_id, document)
        if not await self._number(agents):
            return True
        for key, numbers in agents.items():
            store.mover.change(session_id, key, since=numbers.get("created_at"), next_id=numbers["next_message_id"])
        writes, self._writes = self._writes, {}
        for agent_id, write in writes.items():
            agent = agents.get(agent_key(agent_id))
            newer = {} if agent is None else known_messages(write, agent["messages"])
            older = {} if agent is None else await find_archived(store, self.place, write, agent, newer)
            if older is None:
                self._writes[agent_id] = write
                continue
            try:
                stored = None if agent is None else StoredView.of(agent, {**older, **newer})
                rest = reconcile(write, stored)
            except MongoDBSessionError as error:
                self.refused[agent_id] = lost or error
                continue
            if rest is None:
                continue
            if lost is not None:
                self.refused[agent_id] = lost
                continue
            if rest.attached and store.expiry.learn(session_id, document).outlives(rest.dates):
                return False
            if agent is not None:
                rest = self._archived_change(agent_id).set_apart(rest, agent, older, newer)
            if not rest.is_empty:
                self._writes[agent_id] = rest
        if self._writes and self._guard is not None and (busy := await self._guard.wait(document)) is not None:
            self.refused.update(dict.fromkeys(self._writes, busy))
            self._writes = {}
        return True

    async def _number(self, agents: dict[str, Document]) -> bool:
        """Renumber the messages of the compared agents, if an old process has also written.

        A manager continues then. The next opening renumbers the messages that it does not compare.

        Returns:
            `False` if another writer changed the agents concurrently.
        """
        by_id = {agent_key(agent_id) for agent_id, write in self._writes.items() if write.by_id}
        unnumbered = [
            key
            for key, agent in agents.items()
            if not is_message_id(agent.get("next_message_id")) or (key in by_id and not is_numbered(agent))
        ]
        if not unnumbered:
            return True
        found = {
            agent_id: positions(write, agents.get(agent_key(agent_id), {}).get("messages", ()))
            for agent_id, write in self._writes.items()
        }
        if not await self._store.migration.migrate_agents(self.place.session_id, agents, unnumbered):
            return False
        for agent_id, write in self._writes.items():
            if (agent := agents.get(agent_key(agent_id))) is not None:
                new_ids = {n: agent["ids"][position] for n, position in found[agent_id].items()}
                self._writes[agent_id] = renumbered(write, new_ids)
        return True

    # Changing archived messages.

    def _archived_change(self, agent_id: str) -> ArchivedChange:
        if agent_id not in self._in_archive:
            self._in_archive[agent_id] = ArchivedChange(self._store, self.place, agent_id)
        return self._in_archive[agent_id]

    async def _change_archive(self) -> bool:
        """Change archived messages after the statement; return the result of `store`."""
        for agent_id, change in self._in_archive.items():
            if not _are_messages_stored(self.refused.get(agent_id)):
                continue
            if (write := await change.store()) is not None and not await self._store_alone(write):
                return False
        return True

    # Storing the parts that fit.

    async def _store_what_fits(self, writes: Sequence[AgentWrite], refusal: MessageTooLargeError) -> bool:
        """Store writes that are too large in total: agent by agent, without the parts that do not fit.

        Returns:
            The result of `store`.
        """
        if len(writes) == 1:
            return await self._store_parts(writes[0], refusal)
        for write in writes:  # an oversized write of one agent must not prevent the writes of others
            if not await self._store_alone(write):
                return False
        return True

    async def _store_parts(self, write: AgentWrite, refusal: MessageTooLargeError) -> bool:
        """Store the messages of a write that is too large, then the fields of the agent's state that fit."""
        session_id, agent_id, states, room = self.place.session_id, write.agent_id, write.states, self._store.room
        if not states:
            contents = write.contents()
            self.refused[agent_id] = refusal
            if size_of(contents) < MAX_DOCUMENT_BYTES:  # each message fits, but other parts fill the document
                full = await room.too_large(session_id, of_agent("a message", agent_id), contents, refusal)
                full.pending = True
                self.refused[agent_id] = full
            return True
        if write.has_more_than_states:
            if not await self._store_alone(write.without_states(states)):
                return False
            return agent_id in self.refused or await self._store_alone(write.states_alone())
        largest = max(states, key=lambda name: size_of(states[name]))
        rest = write.without_states([largest])
        if rest.states and not await self._store_alone(rest):
            return False
        if _are_messages_stored(self.refused.get(agent_id)):
            part = of_agent(largest, agent_id)
            self.refused[agent_id] = await room.too_large(session_id, part, states[largest], refusal)
        return True


def _changed_too_often(session_id: str) -> DatabaseError:
    return DatabaseError(f"session {session_id!r} kept changing while it was written: try again later")


def _are_messages_stored(refusal: MongoDBSessionError | None) -> bool:
    """Return whether an agent's messages are stored, even if its state was refused."""
    return refusal is None or (isinstance(refusal, StateTooLargeError) and not refusal.pending)


def _compared_fields(writes: Iterable[str]) -> Document:
    """Return the projection of a session for `_compare`; `writes` are the ids of the agents."""
    names = ("created_at", "next_message_id", "archived", "revision", "rewound")
    parts = ("messages.message_id", "messages.message", "messages.created_at")
    fields = [f"agents.{agent_key(agent_id)}.{name}" for agent_id in writes for name in (*names, *parts)]
    return {**dict.fromkeys(fields, 1), **LIFE, "lease": 1, **CONTENT_TO_REMOVE}


def _compared_agents(session_id: str, document: Document) -> dict[str, Document]:
    """Return the agents of a session by key, without malformed agents and messages."""
    agents = usable_agents(session_id, document)
    for agent in agents.values():
        messages = agent["messages"] if type(agent.get("messages")) is list else []
        agent["ids"] = list(map(stored_id, messages))
        agent["messages"] = [message if type(message) is dict else {} for message in messages]
        for name in ("archived", "revision"):
            agent[name] = agent[name] if type(agent.get(name)) is int else 0
    return agents
