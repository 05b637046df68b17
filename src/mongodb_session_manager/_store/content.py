"""`Content`: the values of `manager.storage`, in `<collection>_content`. They are parts of the session.

    {_id: {incarnation, key}, session_id, size, updated_at, block_id, data or file}
    {_id: {incarnation, file, n}, session_id, block_id, data}    a piece of a large value

`block_id` is the id of the message or tool call whose content the key names, if it has the form of the keys of Strands'
context manager. A statement that redacts a message adds its ids to `removed_content` of the session document; then the
values with these ids are removed, by the next opening at the latest.

A writer first sets `has_content` in the session document, then stores the value, and then reads the document: if the
session is gone, or lists the id of the value, the writer removes the value. So no value outlives its session or its
message, in whatever order the commands of several processes arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from datetime import datetime
from itertools import takewhile

from bson import ObjectId

from .._format.bounded import Bounded
from .._format.content import CONTENT_BEGINS, REMOVED_CONTENT, copied_key_at, is_removed, removed_ids
from .._format.documents import Document
from .._format.keys import block_id_of, copied_key, prefix_range
from .._format.labels import guard
from .._format.layout import CONTENT, Place
from .._format.retention import LIFE, Dates, Life
from .._format.statements import Update
from .._io.collection import Collection
from .._io.indexes import ensure_indexes
from ..errors import DatabaseError, SessionNotFoundError
from . import values
from .attachments import copy_parts, insert_part
from .expiry import Expiry
from .sessions import Sessions, missing_session
from .values import Values

PIECE_BYTES = 2 * 1024 * 1024

_AT_ONCE = 4
"""The number of pieces that one command reads."""

_COPIED_AT_ONCE = 1024

_KNOWN = 256

_VALUE: Document = {name: f"${name}" for name in ("size", "updated_at", "block_id", "data")}
"""The fields of a small value that are copied unchanged."""


class Content:
    """Its methods must be called within an `operation()` of the connection."""

    def __init__(self, sessions: Sessions, expiry: Expiry) -> None:
        self._sessions = sessions
        self._expiry = expiry
        self._collection = sessions.collection.part(CONTENT)
        self._begun: Bounded[ObjectId | None, bool] = Bounded(_KNOWN)

    async def place(self, session_id: str, owner: str | None) -> Place:
        """Return the place of the content of a session, or raise `SessionNotFoundError`."""
        return Place(session_id, (await self._expiry.read_life(session_id, owner)).incarnation)

    async def read(self, place: Place, key: str) -> bytes | None:
        return await _values(self._collection, place).read(place.value_id(key))

    async def keys(self, place: Place, prefix: str) -> list[str]:
        bounds = {"_id": place.values(prefix_range(prefix))}
        return [found["_id"]["key"] for found in await self._collection.find(bounds, {"_id": 1}, sort=[("_id", 1)])]

    async def write(self, place: Place, key: str, data: bytes, owner: str | None) -> None:
        """Store a value; a value whose message was redacted is not stored.

        Raises:
            SessionNotFoundError: The session no longer exists, or belongs to another owner.
        """
        dates = self._expiry.dates(await self._begin(place, owner))
        file = await self.put(place, key, data, dates.expires_at)
        await self._confirm(place, key, file, dates, owner)
        if file is not None:
            await self._remove_damaged(place, key, file)

    async def delete(self, place: Place, key: str) -> None:
        await _values(self._collection, place).remove(place.value_id(key))

    async def remove(self, place: Place, block_ids: Iterable[str]) -> None:
        """Remove the values with these ids, including incomplete ones."""
        await self._collection.delete_many({"_id": place.content(), "block_id": {"$in": sorted(block_ids)}})

    async def removed(self, place: Place) -> set[str]:
        """Return the ids whose values are removed, or will be; raise `SessionNotFoundError` if the session is gone."""
        document = await self._sessions.find(place.session_id, {"incarnation": 1, REMOVED_CONTENT: 1})
        if document is None or document.get("incarnation") != place.incarnation:
            raise SessionNotFoundError(f"session {place.session_id!r} no longer exists")
        return set(removed_ids(document))

    # Copying.

    async def copy(self, source: Place, target: Place, left_out: Set[str]) -> None:
        """Copy values to another session, except those with an id in `left_out`; small values on the server."""
        keys = [key for key in await self.keys(source, "") if block_id_of(key) not in left_out]
        for begin in range(0, len(keys), _COPIED_AT_ONCE):
            batch = {"_id": {"$in": [source.value_id(key) for key in keys[begin : begin + _COPIED_AT_ONCE]]}}
            new_id = {
                "incarnation": target.incarnation,
                "key": copied_key_at("$_id.key", source.session_id, target.session_id),
            }
            await copy_parts(self._collection, {**batch, "file": None}, target, {"_id": new_id, **_VALUE})
            for found in await self._collection.find({**batch, "file": {"$type": "objectId"}}, {"_id": 1}):
                key = found["_id"]["key"]
                if (data := await self.read(source, key)) is not None:
                    await self.put(target, copied_key(key, source.session_id, target.session_id), data)

    # Storing.

    async def put(self, place: Place, key: str, data: bytes, date: datetime | None = None) -> ObjectId | None:
        """Store a value with an expiry date; return the file of a large one."""
        upload = Upload(self._collection, place, key, len(data), date)
        await upload.add(data)
        await upload.finish()
        return upload.file

    def upload(self, place: Place, key: str, size: int) -> Upload:
        """Return an upload, for a value that arrives in parts; the value has no expiry date."""
        return Upload(self._collection, place, key, size, None)

    async def _begin(self, place: Place, owner: str | None) -> Life:
        """Set `has_content` in the session document before the first value is stored."""
        life = await self._expiry.life(place.session_id, owner)
        if life.incarnation != place.incarnation:
            life = await self._expiry.read_life(place.session_id, owner)
        if life.incarnation == place.incarnation and place.incarnation not in self._begun:
            condition = {"_id": place.session_id, "incarnation": place.incarnation, **guard(owner)}
            if await self._sessions.update(Update(condition, CONTENT_BEGINS, None)):
                self._begun[place.incarnation] = True
        if place.incarnation not in self._begun or life.incarnation != place.incarnation:
            self._expiry.forget(place.session_id)
            raise missing_session(place.session_id)
        return life

    async def _confirm(self, place: Place, key: str, file: ObjectId | None, dates: Dates, owner: str | None) -> None:
        """Remove a value if its session is gone or its message was redacted; extend its expiry date if necessary."""
        block_id, session_id = block_id_of(key), place.session_id
        fields = {**LIFE, "is_removed": is_removed(block_id or "")}
        for _ in range(values.ROUNDS):
            document = await self._sessions.find(session_id, fields, owner)
            if document is None or document.get("incarnation") != place.incarnation:
                self._expiry.forget(session_id)
                await self._discard(place, key, file)
                raise SessionNotFoundError(f"session {session_id!r} no longer exists")
            if document["is_removed"] and block_id is not None:
                await self.remove(place, [block_id])
                return
            life = self._expiry.learn(session_id, document)
            if not life.outlives(dates):
                return
            dates = self._expiry.dates(life)
            if dates.expires_at is not None:
                update = {"$max": {"expires_at": dates.expires_at}}
                await self._collection.update_many({"$or": _stored(place, key, file)}, update)
        raise DatabaseError(f"session {session_id!r} kept changing while its content was written: try again later")

    async def _remove_damaged(self, place: Place, key: str, file: ObjectId) -> None:
        """Remove a large value if a rewind has removed its first pieces before the value was stored."""
        if await self._collection.find_one({"_id": place.piece_id(file, 0)}, {"_id": 1}) is None:
            own = [{"_id": place.value_id(key), "file": file}, {"_id": place.pieces_of(file)}]
            await self._collection.delete_many({"$or": own})

    async def _discard(self, place: Place, key: str, file: ObjectId | None) -> None:
        await self._collection.delete_many({"$or": _stored(place, key, file)})


class Upload:
    """Stores a value of a known size; `file` is the file of a large one."""

    def __init__(self, collection: Collection, place: Place, key: str, size: int, date: datetime | None) -> None:
        self.file = ObjectId() if size > values.INLINE_LIMIT else None
        self._collection = collection
        self._place = place
        self._key = key
        self._date = date
        self._size = size
        self._data = bytearray()
        self._count = 0

    async def add(self, data: bytes) -> None:
        self._data += data
        while self.file is not None and len(self._data) >= PIECE_BYTES:
            await self._store_piece(self.file)

    async def _store_piece(self, file: ObjectId) -> None:
        data = bytes(self._data[:PIECE_BYTES])
        del self._data[:PIECE_BYTES]
        piece = {"_id": self._place.piece_id(file, self._count), "session_id": self._place.session_id}
        await insert_part(self._collection, {**piece, **_block(self._key), "data": data}, self._date)
        self._count += 1

    async def finish(self) -> None:
        if self.file is not None and self._data:
            await self._store_piece(self.file)
        ensure_indexes(self._collection, [("block_id",)])
        place, moment = self._place, self._collection.connection.now()
        value = {"session_id": place.session_id, "size": self._size, "updated_at": moment, **_block(self._key)}
        value |= {"data": bytes(self._data)} if self.file is None else {"file": self.file}
        if self._date is not None:
            value["expires_at"] = self._date
        await _values(self._collection, place).put(place.value_id(self._key), value)


def _values(collection: Collection, place: Place) -> Values:
    return Values(collection, _Pieces(collection, place))


def _block(key: str) -> Document:
    block_id = block_id_of(key)
    return {} if block_id is None else {"block_id": block_id}


def _stored(place: Place, key: str, file: ObjectId | None) -> list[Document]:
    """Return the filters of the documents of a value."""
    pieces = [] if file is None else [{"_id": place.pieces_of(file)}]
    return [{"_id": place.value_id(key)}, *pieces]


class _Pieces:
    """The files of the large values of a session."""

    def __init__(self, collection: Collection, place: Place) -> None:
        self._collection = collection
        self._place = place

    async def download(self, file: ObjectId, size: int) -> bytes | None:
        pieces: list[bytes] = []
        while sum(map(len, pieces)) < size:
            ids = [self._place.piece_id(file, n) for n in range(len(pieces), len(pieces) + _AT_ONCE)]
            found = {piece["_id"]["n"]: piece["data"] for piece in await self._collection.find({"_id": {"$in": ids}})}
            following = [*takewhile(bool, (found.get(each["n"], b"") for each in ids))]
            if not following:
                return None
            pieces += following
        data = b"".join(pieces)
        return data if len(data) == size else None

    async def unname(self, file: ObjectId) -> None: ...

    async def delete(self, file: ObjectId) -> None:
        await self._collection.delete_many({"_id": self._place.pieces_of(file)})
