"""`Opening`: creates sessions, and reads the parts of a session that restoring needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from bson import ObjectId
from pymongo import ReturnDocument

from .._format.buckets import Head, head_numbers
from .._format.content import CONTENT_TO_REMOVE, REMOVED_CONTENT, removed_ids
from .._format.documents import Document, needs_upgrade, removed_messages
from .._format.expressions import (
    MALFORMED_AGENTS,
    entries_at,
    ids_left_out,
    malformed_at,
    number_at,
    restored,
    to_restore,
)
from .._format.ids import agent_id_of, stored_id
from .._format.labels import guard
from .._format.layout import OF_V1, Place, live_at
from .._format.malformed import log_malformed
from .._format.retention import LIFE
from .._format.view import Run, closest, needed_before
from .._io.driver_errors import DuplicateKeyError
from .._io.drivers import AsyncCollection, find_and_modify
from ..errors import (
    DatabaseError,
    InvalidArgumentError,
    MongoDBSessionError,
    SessionExistsError,
)
from .archive import present
from .lease import Lease
from .lease_queue import Caller
from .migration import HAS_PARTS, is_of_v1
from .sessions import ROUNDS, ReadAgainError, missing_session, read_consistently
from .store import SessionStore
from .view import add_archived, parse_views, shows_nothing
from .view import wanted as ranges_of_view

logger = logging.getLogger(__name__)

_COPY_TIMEOUT = 10.0
"""The maximum number of seconds that opening waits for a session that is being imported or forked."""


def _restored_messages(messages: Document) -> Document:
    return {"$map": {"input": messages, "as": "message", "in": restored("$$message")}}


_RESTORE: Document = {
    "session_id": 1,
    "application_name": 1,
    "session_type": 1,
    "created_at": 1,
    "updated_at": 1,
    "multi_agents": 1,
    **LIFE,
    "removed_attachments": 1,
    **CONTENT_TO_REMOVE,
    **dict.fromkeys(OF_V1, 1),
    "has_parts": {"$and": [{"$eq": [{"$type": "$incarnation"}, "missing"]}, HAS_PARTS]},
    "malformed_agents": MALFORMED_AGENTS,
    # All agents. No restored agent needs the metrics of messages.
    "agents": {
        "$arrayToObject": {
            "$map": {
                "input": entries_at("$agents"),
                "as": "agent",
                "in": {
                    "k": "$$agent.k",
                    "v": {
                        "agent_data": "$$agent.v.agent_data",
                        "config_set": "$$agent.v.config_set",
                        "updated_at": "$$agent.v.updated_at",
                        "rewound": "$$agent.v.rewound",
                        "usage": "$$agent.v.usage",
                        "malformed_messages": malformed_at("$$agent.v.messages", "array"),
                        **head_numbers("$$agent.v"),
                        "archive_revision": number_at("$$agent.v.archive_revision"),
                        "view": "$$agent.v.view",
                        "shown": _restored_messages(needed_before("$$agent.v")),
                        "ids": ids_left_out("$$agent.v"),
                        "messages": _restored_messages(to_restore("$$agent.v")),
                    },
                },
            }
        }
    },
}


def _without_views(fields: Document) -> Document:
    """Return the projection `_RESTORE` for a session with a view that cannot be used."""
    agents = fields["agents"]["$arrayToObject"]["$map"]
    agent = {name: value for name, value in agents["in"]["v"].items() if name not in ("view", "shown")}
    agent["ids"] = ids_left_out("$$agent.v", with_view=False)
    agent["messages"] = _restored_messages(to_restore("$$agent.v", with_view=False))
    entry = {**agents["in"], "v": agent}
    return {**fields, "agents": {"$arrayToObject": {"$map": {**agents, "in": entry}}}}


_RESTORE_WITHOUT_VIEWS = _without_views(_RESTORE)


class _UnusableViewError(Exception):
    """The view of an agent cannot be used: the session is read again without views."""


class _Query(NamedTuple):
    """The parameters of an opening: the fields to read, the lease to take, whether and how to create the session."""

    session_id: str
    fields: Document
    lease: Lease | None
    caller: Caller | None
    creates: bool
    labels: Document

    @property
    def owner(self) -> str | None:
        owner: str | None = self.labels.get("owner")
        return owner


async def _find_or_create(fresh: Document, query: _Query, sessions: AsyncCollection) -> Document | None:
    """Read a live session; create it if there is none and the query allows it."""
    fields = {name: value for name, value in fresh.items() if name != "_id"}
    document: Document | None = await sessions.find_one_and_update(
        {"_id": fresh["_id"], **guard(query.owner), **live_at(fresh["created_at"])},
        {"$setOnInsert": fields},
        projection=query.fields,
        upsert=query.creates,
        return_document=ReturnDocument.AFTER,
    )
    return document


class Opening:
    """Opens and creates sessions."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._connection = store.connection

    async def open(
        self,
        session_id: str,
        lease: Lease | None = None,
        caller: Caller | None = None,
        *,
        creates: bool = True,
        labels: Document | None = None,
    ) -> Document:
        """Open a session, as `AsyncMongoDBSessionRepository.open_session` describes, and take its lease.

        Args:
            session_id: The session.
            lease: The lease that the same statement takes; `None` takes none.
            caller: The caller that waits for the lease.
            creates: Whether a session that does not exist is created.
            labels: The labels of a session that is created; only a session of their owner is opened.

        Raises:
            SessionBusyError: Another manager has its turn.
            SessionNotFoundError: The session belongs to another owner, or does not exist and `creates` is `False`.
        """
        query = _Query(session_id, _RESTORE, lease, caller, creates, labels or {})
        try:
            async with self._connection.operation():
                with suppress(_UnusableViewError):
                    return await read_consistently(session_id, lambda: self._open_once(query))
                query = query._replace(fields=_RESTORE_WITHOUT_VIEWS)
                return await read_consistently(session_id, lambda: self._open_once(query))
        except BaseException as error:
            is_unknown = not isinstance(error, MongoDBSessionError) or error.outcome_unknown
            if lease is not None and (lease.is_held or is_unknown):
                lease.give_up()
            raise

    async def _open_once(self, query: _Query) -> Document:
        store, session_id = self._store, query.session_id
        document = await self._create_or_read(query)
        # The result of the driver's own second attempt at an upsert has no computed fields.
        if document.get("has_parts") or document.keys() & OF_V1:
            await store.migration.migrate(session_id)
            raise ReadAgainError
        agents: dict[str, Document] = document["agents"]
        for key in [key for key in agents if not key or "." in key]:
            log_malformed(session_id, "agents", key)
            del agents[key]
        for agent in agents.values():
            agent["ids"] += map(stored_id, agent["messages"])
        of_old = [key for key, agent in agents.items() if needs_upgrade(agent)]
        gained = {} if not is_of_v1(document) else {"incarnation": ObjectId()}
        is_shown = any(agents[key].get("view") is not None for key in of_old)
        if not await store.migration.migrate_agents(session_id, agents, of_old, gained) or is_shown:
            raise ReadAgainError
        if not parse_views(session_id, agents):
            raise _UnusableViewError
        document |= gained
        store.expiry.learn(session_id, document)
        store.ensure_indexes()
        place = Place(session_id, document["incarnation"])
        await self._restore_archived(place, agents)
        if any(map(shows_nothing, agents.values())):
            raise _UnusableViewError
        await self._restore_attachments(place, agents)
        removed, content = document.pop("removed_attachments", None), removed_ids(document)
        document.pop(REMOVED_CONTENT, None)
        stale = {key: Head.of(agent) for key, agent in agents.items() if agent.get("stale_below")}
        if removed or stale or content:
            self._connection.start(self._finish_removal(place, stale, removed, content))
        return document

    async def _restore_attachments(self, place: Place, agents: dict[str, Document]) -> None:
        loaded = {key: [*agent.get("shown", ()), *agent["messages"]] for key, agent in agents.items()}
        await self._store.attachments.restore(place, {agent_id_of(key): loaded[key] for key in agents})
        for key, agent in agents.items():
            count = len(agent.get("shown", ()))
            agent["shown"], agent["messages"] = loaded[key][:count], loaded[key][count:]

    async def _finish_removal(
        self, place: Place, stale: Mapping[str, Head], listed: Any, content: Sequence[str]
    ) -> None:
        """Remove stale buckets, and the attachments and content of replaced or removed messages; log a failure."""
        try:
            async with self._connection.operation():
                for key, head in stale.items():
                    await self._store.mover.remove_stale(place, key, head)
                if listed:
                    await self._store.attachments.remove_removed(place, listed if isinstance(listed, list) else [])
                if content:
                    await self._store.content.remove(place, content)
        except MongoDBSessionError as error:
            logger.warning(
                "session_id=<%r>, error=<%s> | replaced or removed messages and attachments were not deleted; the next "
                "opening tries again",
                place.session_id,
                error,
            )

    async def _restore_archived(self, place: Place, agents: dict[str, Document]) -> None:
        """Prepend, to the messages of each agent, the archived messages that restoring it needs."""
        wanted = {}
        views: dict[str, tuple[list[Run], bool]] = {}
        for key, agent in agents.items():
            head = self._store.mover.learn(place.session_id, key, agent)
            removed, archived = removed_messages(agent), agent["archived"]
            agent["first"] = archived + agent["count"] - len(agent["messages"])
            if agent.get("view") is not None:
                if ranges := ranges_of_view(agent, head.is_regular):
                    wanted[key] = (agent.get("created_at"), ranges[0][0], archived)
                    views[key] = (ranges, head.is_regular)
                continue
            if removed > archived + agent["count"]:
                removed = 0  # the stored count is wrong: restoring logs a warning and restores all messages
            if removed < archived:
                wanted[key] = (agent.get("created_at"), removed, archived)
                agent["first"] = removed
        if not wanted:
            return
        archive = self._store.archive
        queried = [(key, which) for key, which in wanted.items() if key not in views]
        queried += [
            (key, (wanted[key][0], begin, end)) for key, (ranges, _) in views.items() for begin, end in closest(ranges)
        ]
        for key, buckets in (await archive.read_buckets(place, queried)).items():
            _, begin, end = wanted[key]
            if key in views:
                missing = add_archived(agents[key], buckets, *views[key])
            else:
                messages = present(buckets, begin, end)
                missing = end - begin - len(messages)
                agents[key]["messages"] = messages + agents[key]["messages"]
            if missing:
                await archive.raise_if_moved(place, wanted)
                logger.warning(
                    "session_id=<%r>, agent=<%r>, missing=<%d> | restoring an agent without messages that are missing "
                    "in the archive",
                    place.session_id,
                    key,
                    missing,
                )

    async def _create_or_read(self, query: _Query) -> Document:
        """Return the live session with an id; create it if there is none.

        Raises:
            SessionNotFoundError: The session belongs to another owner, or does not exist and must not be created.
            SessionConflictError: The session is being imported or forked.
        """
        session_id, lease, caller = query.session_id, query.lease, query.caller
        for _ in range(ROUNDS):
            document, was_held = None, lease is not None and lease.is_held
            try:
                if lease is None:
                    document = await self._store.collection.send(partial(_find_or_create, self._fresh(query), query))
                elif lease.is_held:
                    document = await self._take(query, lease)
                else:
                    document = await lease.wait(partial(self._take, query, lease), caller)
            except DuplicateKeyError:  # the session is not live, or another process has created it concurrently
                pass
            except InvalidArgumentError:
                if lease is None:
                    raise
                await lease.repair()
                continue
            if document is not None:
                return document
            if lease is not None and lease.is_held and not was_held:  # taken by the last poll of the wait
                continue
            if not query.creates and lease is None:
                raise missing_session(session_id)
            if query.owner is not None:
                found = await self._store.sessions.find(session_id, {"owner": 1})
                if found is not None and found.get("owner") != query.owner:
                    raise missing_session(session_id)
            if lease is None or not lease.is_held:
                with suppress(SessionExistsError):
                    await self._store.deletion.free_id(session_id, _COPY_TIMEOUT)
        raise DatabaseError(f"session {session_id!r} could neither be read nor created")

    def _fresh(self, query: _Query) -> Document:
        return {**self._store.new_session(query.session_id, self._connection.now()), **query.labels}

    async def _take(self, query: _Query, lease: Lease) -> Document | None:
        """Return the live session with an id; the same statement takes its lease."""
        session_id, caller = query.session_id, query.caller
        moment, claim, fresh = self._connection.now(), lease.claim, self._fresh(query)
        condition = {"_id": fresh.pop("_id"), **guard(query.owner), **live_at(moment), **claim.may_open(moment)}
        update = {"$setOnInsert": fresh, "$set": claim.fields(moment), "$inc": {"lease.fence": 1}}
        fields = {**query.fields, "lease": 1}
        document = await self._store.collection.send(
            lambda sessions: find_and_modify(sessions, condition, update, fields, upsert=query.creates)
        )
        if document is not None:
            lease.taken(document)
            if caller is not None:
                caller.check(session_id)
        elif not query.creates:
            if await self._store.sessions.find(session_id, {"_id": 1}, query.owner) is None:
                raise missing_session(session_id)
            raise DuplicateKeyError("busy")  # the error of an upsert, for the same handling
        return document

    async def create(self, session_id: str, moment: datetime, labels: Document) -> None:
        """Create a session.

        Raises:
            SessionExistsError: There is a session with that id.
        """
        document: Document = {}
        sent = 0

        async def insert(sessions: AsyncCollection) -> None:
            nonlocal sent
            sent += 1
            await sessions.insert_one(document)

        store = self._store
        async with self._connection.operation():
            document = {**store.new_session(session_id, moment), **labels}
            for _ in range(ROUNDS):
                try:
                    await store.collection.send(insert)
                    break
                except DuplicateKeyError:
                    # It can be this session, stored by an attempt whose acknowledgement was lost.
                    found = await store.sessions.find(session_id, {"incarnation": 1}) if sent > 1 else None
                    if found is not None and found.get("incarnation") == document["incarnation"]:
                        break
                await store.deletion.free_id(session_id, _COPY_TIMEOUT)
            else:
                raise DatabaseError(f"session {session_id!r} could not be created")
            store.expiry.learn(session_id, document)
            store.ensure_indexes()
