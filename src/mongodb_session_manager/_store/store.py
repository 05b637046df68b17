"""`SessionStore`: builds and holds the objects that keep the sessions of a collection."""

from __future__ import annotations

from datetime import datetime
from typing import Unpack

from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES, checked_inline_bytes
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES, Limits
from .._format.documents import Document, new_session
from .._format.labels import checked_owner
from .._format.retention import checked_ttl, next_date
from .._io.collection import Collection
from .._io.connection import Connection
from .._io.indexes import ensure_indexes, session_indexes
from .._io.names import checked_fields, checked_name, checked_text, given
from .._io.options import ContentOptions
from .archive import Archive
from .attachments import Attachments
from .content import Content
from .deletion import Deletion
from .expiry import Expiry
from .migration import Migration
from .mover import Mover
from .room import Room
from .sessions import Sessions


class SessionStore:
    """The sessions of a collection; raises `ConfigurationError`, or `InvalidArgumentError` for an invalid owner."""

    def __init__(
        self,
        connection: Connection,
        database_name: str | None = None,
        collection_name: str | None = None,
        **options: Unpack[ContentOptions],
    ) -> None:
        self.connection = connection
        self.collection = Collection(
            connection,
            checked_name(connection.database_name(database_name), "database_name"),
            checked_name(given(collection_name, "agent_sessions"), "collection_name"),
        )
        name = options.get("application_name")
        self.application_name = None if name is None else checked_text(name, "application_name")
        owner = options.get("owner")
        self.owner = None if owner is None else checked_owner(owner)
        self.metadata_fields = checked_fields(options.get("metadata_fields"))
        max_inline = given(options.get("max_inline_attachment_bytes"), MAX_INLINE_ATTACHMENT_BYTES)
        self.max_inline = checked_inline_bytes(max_inline)
        limits = Limits.checked(
            given(options.get("max_embedded_messages"), MAX_EMBEDDED_MESSAGES),
            given(options.get("max_embedded_bytes"), MAX_EMBEDDED_BYTES),
        )
        ttl = checked_ttl(options.get("session_ttl"))
        self.sessions = Sessions(self.collection)
        self.expiry = Expiry(self.sessions, ttl, lambda session_id: self.migration.migrate(session_id))
        self.deletion = Deletion(self.sessions, self.expiry)
        self.attachments = Attachments(self.collection)
        self.content = Content(self.sessions, self.expiry)
        self.mover = Mover(self.sessions, self.expiry, limits)
        self.room = Room(self.sessions, self.expiry, self.mover)
        self.migration = Migration(self.sessions, self.expiry, self.deletion, self.attachments, self.mover)
        self.archive = Archive(self.sessions, self.migration, self.attachments, self.mover)
        self._indexes = session_indexes(self.metadata_fields)

    def ensure_indexes(self) -> None:
        """Build missing indexes and finish unfinished deletions and copies, in the background, once per process."""
        ensure_indexes(self.collection, self._indexes)
        if self.expiry.session_ttl is not None:
            self.expiry.ensure_indexes()
        self.deletion.search_unfinished()

    def new_session(self, session_id: str, moment: datetime) -> Document:
        document: Document = dict(new_session(session_id, self.application_name, moment))
        if (seconds := self.expiry.session_ttl) is not None:
            now = self.connection.now()
            document |= {"time_to_live": seconds, "expires_at": next_date(now, seconds), "updated_at": now}
        return document
