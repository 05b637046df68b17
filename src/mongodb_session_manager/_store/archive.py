"""`Archive`: reading and changing archived messages. `_format.buckets` describes their layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._format.attachment_refs import references_of
from .._format.buckets import change_in_bucket, from_message, holding_message, holding_positions
from .._format.documents import Document
from .._format.ids import agent_key, is_message_id, stored_id
from .._format.labels import guard
from .._format.layout import ARCHIVE, Place
from .._format.pages import Found
from .._format.retention import LIFE, Life
from .._format.statements import REMOVED
from .._io.drivers import AsyncCollection, find_and_modify
from ..errors import DatabaseError, raise_alone
from .attachments import Attachments, parsed
from .migration import Migration
from .mover import Mover
from .sessions import ReadAgainError, Sessions


class Archive:
    def __init__(self, sessions: Sessions, migration: Migration, attachments: Attachments, mover: Mover) -> None:
        self.collection = sessions.collection.part(ARCHIVE)
        self._sessions = sessions
        self._migration = migration
        self._attachments = attachments
        self._mover = mover

    async def read(self, place: Place, wanted: Mapping[str, tuple[Any, int, int]]) -> dict[str, list[Document]]:
        """Return archived messages without their metrics, oldest first, from one query.

        For each agent key, `wanted` has its `created_at`, the first position, and the position after the last.

        Raises:
            DatabaseError: A message is missing.
            ReadAgainError: The session was written back or migrated concurrently.
        """
        found = await self.read_buckets(place, wanted.items())
        try:
            return {key: _joined(place.session_id, found[key], begin, end) for key, (_, begin, end) in wanted.items()}
        except DatabaseError:
            await self.raise_if_moved(place, wanted)
            raise

    async def read_buckets(
        self, place: Place, wanted: Iterable[tuple[str, tuple[Any, int, int]]]
    ) -> dict[str, list[Document]]:
        """Return the buckets that hold archived messages, oldest first, from one query.

        `wanted` are items like those of the argument of `read`; a key can occur several times.
        """
        ranges = list(wanted)
        found: dict[str, dict[int, Document]] = {key: {} for key, _ in ranges}
        condition = {"$or": [holding_positions(place, key, *which) for key, which in ranges]}

        async def read(archive: AsyncCollection) -> None:
            async for bucket in archive.find(condition, {"messages.event_loop_metrics": 0}):
                found[bucket["_id"]["agent"]][bucket["_id"]["first"]] = bucket

        await self.collection.send(read)
        return {key: [buckets[first] for first in sorted(buckets)] for key, buckets in found.items()}

    async def raise_if_moved(self, place: Place, wanted: Mapping[str, tuple[Any, int, int]]) -> None:
        if await self.has_moved(place):
            raise_alone(ReadAgainError())
        for key, (since, _, end) in wanted.items():
            if await self.is_back(place.session_id, key, since, end):
                raise_alone(ReadAgainError())

    async def has_moved(self, place: Place) -> bool:
        """Return whether missing buckets can be found if the session is read again.

        The session was migrated, deleted or created again, or 1.0.0 stored the buckets.
        """
        session = await self._sessions.find(place.session_id, LIFE)
        if session is None or Life.of(session).incarnation != place.incarnation:
            return True
        return place.incarnation is not None and await self._migration.move_late_buckets(place)

    async def is_back(self, session_id: str, key: str, since: Any, archived: int) -> bool:
        """Return whether messages below a position are in the session document again; `False` without the agent."""
        path = f"agents.{key}"
        lower = {f"{path}.created_at": since, f"{path}.archived": {"$not": {"$gte": archived}}}
        condition = {"_id": session_id, path: {"$exists": True}, **lower}
        return await self._sessions.collection.find_one(condition, {"_id": 1}) is not None

    async def find_message(
        self, session_id: str, agent_id: str, message_id: Any, created_at: Any = None, *, owner: str | None = None
    ) -> Document | None:
        """Return a message of the head or the archive, if there is one; `created_at` is its own, if that is known."""
        key = agent_key(agent_id)
        path = f"agents.{key}.messages"
        wanted = {name: f"$agents.{key}.{name}" for name in ("archived", "created_at")} | {
            "incarnation": "$incarnation"
        }
        meant = {"message_id": message_id} | ({} if created_at is None else {"created_at": created_at})
        condition = {"_id": session_id, **guard(owner), path: {"$elemMatch": meant}}
        while True:
            document = await self._sessions.collection.find_one(condition, {f"{path}.$": 1})
            if document is not None:
                message: Document = document["agents"][key]["messages"][0]
                return message
            stored = await self._sessions.get_agent(session_id, agent_id, wanted, owner)
            if not (archived := stored.get("archived")):
                return None
            since, place = stored.get("created_at"), Place(session_id, Life.of(stored).incarnation)
            found = await self.find_archived(place, key, message_id, since, archived, created_at)
            if found is not None:
                return found
            if not await self.has_moved(place) and not await self.is_back(session_id, key, since, archived):
                return None

    async def place_of(self, session_id: str, message: Document, owner: str | None = None) -> Place:
        """Return the place of the attachments of a message; without attachments, no command is sent."""
        if not references_of(message):
            return Place(session_id, None)
        return Place(session_id, Life.of(await self._sessions.get(session_id, LIFE, owner)).incarnation)

    async def read_bucket(self, place: Place, key: str, since: Any, begin: int, end: int) -> list[Document]:
        """Return the messages from `begin` to the end of its bucket or to `end`; raise `DatabaseError` if missing."""
        condition = holding_positions(place, key, since, begin, end)
        buckets = await self.collection.find(condition, sort=[("_id", 1)], limit=1)
        reach = min(end, begin + 1 if not buckets else int(buckets[0]["last"]) + 1)
        return _joined(place.session_id, buckets, begin, reach)

    async def position_of(self, place: Place, key: str, since: Any, message_id: int, found: Found) -> int:
        """Return the position of the first archived message whose id is not lower than `message_id`.

        Without gaps in the ids it needs no command.
        """
        if not found.gap:
            return min(message_id, found.archived)
        condition = from_message(place, key, since, message_id, found.gap)
        for bucket in await self.collection.find(condition, {"messages.message_id": 1}, sort=[("_id", 1)], limit=1):
            ids: list[Any] = list(map(stored_id, bucket["messages"]))
            is_from = [is_message_id(each) and each >= message_id for each in ids]
            return min(int(bucket["_id"]["first"]) + is_from.index(True), found.archived)
        return found.archived

    async def find_archived(
        self, place: Place, key: str, message_id: int, since: Any, archived: int, created_at: Any = None
    ) -> Document | None:
        at_its_position, anywhere = holding_message(place, key, message_id, since, created_at, archived)
        bucket = await self.collection.find_one(at_its_position, {"messages.$": 1})
        if bucket is None and not await self._is_regular(place.session_id, key):
            bucket = await self.collection.find_one(anywhere, {"messages.$": 1})
        return None if bucket is None else bucket["messages"][0]

    async def _is_regular(self, session_id: str, key: str) -> bool:
        """Return whether every id is the position of its message, so that no other bucket needs to be searched."""
        head = self._mover.head(session_id, key) or await self._mover.read_head(session_id, key)
        return head is None or head.is_regular

    async def find_bucket(self, place: Place, key: str, message_id: int, since: Any, archived: int) -> Document | None:
        """Return the complete bucket that holds a message."""
        for condition in holding_message(place, key, message_id, since, below=archived):
            if (bucket := await self.collection.find_one(condition)) is not None:
                return bucket
        return None

    async def change(self, place: Place, key: str, message_id: int, fields: Document, created_at: Any = None) -> None:
        head = self._mover.head(place.session_id, key) or await self._mover.read_head(place.session_id, key)
        if head is None:
            return
        conditions = holding_message(place, key, message_id, head.since, created_at)
        for condition in conditions[: 1 if head.is_regular else 2]:
            change = change_in_bucket(condition, message_id, fields, created_at)
            changed = await self.collection.send(
                lambda archive: find_and_modify(archive, change.filter, change.update, {REMOVED: 1})  # noqa: B023
            )
            if changed is not None:
                if listed := changed.get(REMOVED):
                    await self._attachments.remove_unnamed(place, parsed(listed))
                    await self.collection.update_one({"_id": changed["_id"]}, {"$pullAll": {REMOVED: listed}})
                return


def _joined(session_id: str, buckets: Iterable[Document], begin: int, end: int) -> list[Document]:
    messages: list[Any] = []
    for bucket in buckets:
        first = bucket["_id"]["first"]
        if first > begin + len(messages):
            break
        messages += bucket["messages"][begin + len(messages) - first : end - first]
    if len(messages) < end - begin:
        raise DatabaseError(f"session {session_id!r}: message {begin + len(messages)} is missing in its archive")
    return messages


def present(buckets: Iterable[Document], begin: int, end: int) -> list[Document]:
    """Return the messages at positions from `begin` to below `end`; missing ones are left out."""
    messages: list[Document] = []
    for bucket in buckets:
        first = bucket["_id"]["first"]
        messages += bucket["messages"][max(begin - first, 0) : max(end - first, 0)]
        begin = max(begin, first + len(bucket["messages"]))
    return messages
