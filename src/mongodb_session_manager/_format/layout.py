"""The ids of the parts of a session that are stored outside its document. Pure.

<collection>_archive               buckets of old messages, see `buckets`
<collection>_attachments.files     large attachments, see `_store.attachments`
<collection>_attachments.chunks
<collection>_content              the values of `manager.storage`, see `_store.content`

The `_id` of each of these documents begins with the session's `incarnation`, an ObjectId that is set when the session
is created. A session that is deleted and created again shares nothing with its predecessor, and all parts of a session
are in one range of the `_id` index. Each document also holds `session_id`.

1.0.0 began these ids with the session id. `Place.incarnation` is `None` for a session that is not migrated yet, see
`_store.migration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from bson import MaxKey, ObjectId

from .attachment_refs import Reference
from .documents import Document

ARCHIVE = "_archive"
FILES = "_attachments.files"
CHUNKS = "_attachments.chunks"
CONTENT = "_content"

OUTSIDE = (ARCHIVE, FILES, CHUNKS, CONTENT)
"""The suffixes of the collections that hold parts, in the order in which a deletion removes the parts.

Files are removed before their chunks, and copied after them: so a file that was copied has all its chunks.
"""

UNFINISHED: Document = {"state": {"$in": ["copying", "deleting"]}, "state_until": {"$type": "date"}}
"""The filter for sessions that are being copied or deleted.

A document can hold a `state` that an application has stored. Such a document has no `state_until`, and is live.
"""

LIVE: Document = {"$nor": [UNFINISHED]}
"""The filter for live sessions."""


def live_at(moment: datetime) -> Document:
    """Return the filter for live sessions that have not expired; the server removes an expired one a little later."""
    return {"$nor": [UNFINISHED, {"time_to_live": {"$exists": True}, "expires_at": {"$lte": moment}}]}


def is_unfinished(document: Mapping[str, Any]) -> bool:
    return document.get("state") in ("copying", "deleting") and isinstance(document.get("state_until"), datetime)


OF_V1 = frozenset({"session_ttl", "migrating", "moved"})
"""The fields of a session whose migration from 1.0.0 is not complete."""


class Place(NamedTuple):
    """The ids of a session's parts; the incarnation of parts that 1.0.0 has stored is `None`."""

    session_id: str
    incarnation: ObjectId | None

    @property
    def _prefix(self) -> Document:
        return {"session_id": self.session_id} if self.incarnation is None else {"incarnation": self.incarnation}

    def _range(self, following: str) -> Document:
        return {"$gte": self._prefix, "$lte": {**self._prefix, following: MaxKey()}}

    def bucket_id(self, key: str, first: int, since: Any = None) -> Document:
        """Return the `_id` of a bucket. The ids of an agent's buckets sort in the order of its messages.

        The `created_at` of the agent, `since`, is a part of the ids of 1.0.0.
        """
        agent = {"agent": key} if self.incarnation is not None else {"agent": key, "since": since}
        return {**self._prefix, **agent, "first": first}

    def buckets(self) -> Document:
        return self._range("agent")

    def file_id(self, reference: Reference) -> Document:
        if self.incarnation is None:
            return {**self._prefix, "sha256": reference.sha256, "generation": int(reference.token)}
        return {**self._prefix, "sha256": reference.sha256, "token": reference.token}

    def chunk_id(self, reference: Reference, n: int) -> Document:
        return {"file": self.file_id(reference), "n": n}

    def chunks_of(self, reference: Reference) -> Document:
        file = self.file_id(reference)
        return {"$gte": {"file": file}, "$lte": {"file": file, "n": MaxKey()}}

    def files(self) -> Document:
        return self._range("sha256")

    def chunks(self) -> Document:
        return {operator: {"file": bound} for operator, bound in self.files().items()}

    def value_id(self, key: str) -> Document:
        return {**self._prefix, "key": key}

    def values(self, keys: Document) -> Document:
        """Return the range of the values whose keys are in a range of strings."""
        bounds = {operator: self.value_id(bound) for operator, bound in keys.items()}
        return {"$lt": {**self._prefix, "key": {}}, **bounds}  # objects sort after strings

    def piece_id(self, file: ObjectId, n: int) -> Document:
        """Return the `_id` of a piece of a large value."""
        return {**self._prefix, "file": file, "n": n}

    def pieces_of(self, file: ObjectId) -> Document:
        prefix = {**self._prefix, "file": file}
        return {"$gte": prefix, "$lte": {**prefix, "n": MaxKey()}}

    def content(self) -> Document:
        return self._range("key")

    def outside(self) -> list[tuple[str, Document]]:
        ranges = {ARCHIVE: self.buckets(), CHUNKS: self.chunks(), FILES: self.files(), CONTENT: self.content()}
        return [(suffix, {"_id": ranges[suffix]}) for suffix in OUTSIDE]
