"""The methods for sessions, agents and messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bson import ObjectId
from strands.types.session import Session, SessionAgent, SessionMessage

from .._format import documents
from .._format.attachment_refs import replacement, set_aside
from .._format.changes import AppendMessage, Change, CreateAgent, Identity, Loaded, ReplaceMessage, UpdateAgent
from .._format.dates import now, to_date
from .._format.documents import Document
from .._format.ids import agent_key, checked_id, checked_message_id, is_message_id
from .._format.labels import labels_of
from .._format.layout import OF_V1, Place
from .._format.malformed import MalformedField, messages_from, usable_field
from .._format.pages import Found, Page
from .._format.retention import LIFE, Life
from .._io.threads import compute
from .._store.lease import Lease
from .._store.lease_queue import Caller
from .._store.migration import is_of_v1
from .._store.opening import Opening
from .._store.sessions import read_consistently
from .._store.writes import Writer
from ..errors import InvalidArgumentError, MongoDBSessionError
from .base import RepositoryMethods


class ConversationMethods(RepositoryMethods):
    # The operations of a session manager, in one command each.

    async def open_session(self, session_id: str, *, owner: str | None = None, must_exist: bool = False) -> Document:
        """Return the parts of a session that restoring needs; create the session if it is new.

        The document has no metadata, feedback, guardrail events or metrics of messages, nor the messages that the
        agents' conversation managers have removed; `first` is the position of an agent's first message in it.

        It takes one command. A second one reads the archived messages that restoring needs, and a third one the
        attachments. One more migrates agents that a version before 1.0 has written to, and fields of 1.0.0.

        Args:
            session_id: The session.
            owner: The owner of a new session; no session of another owner is opened.
            must_exist: Whether a session that does not exist is an error; if not, it is created.

        Raises:
            SessionNotFoundError: The session belongs to another owner, or does not exist although `must_exist` is true.
            AttachmentError: An attachment is missing or damaged.
        """
        labels = labels_of(self._owner(owner))
        return await Opening(self._store).open(
            checked_id(session_id, "session_id"), creates=not must_exist, labels=labels
        )

    async def _open(
        self,
        session_id: str,
        lease: Lease | None,
        caller: Caller | None,
        *,
        creates: bool = True,
        title: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> Document:
        """Open a session as `open_session` does, and take its lease; `title` and `tags` are those of a new session.

        Raises:
            SessionNotFoundError: The session belongs to another owner, or does not exist and `creates` is `False`.
        """
        labels, opening = labels_of(self._store.owner, title, tags), Opening(self._store)
        return await opening.open(checked_id(session_id, "session_id"), lease, caller, creates=creates, labels=labels)

    async def _apply(
        self,
        session_id: str,
        changes: Iterable[Change],
        incarnation: ObjectId | None = None,
        lease: Lease | None = None,
        releases: bool = False,
        loaded: Mapping[str, Loaded] | None = None,
        owner: str | None = None,
    ) -> dict[str, MongoDBSessionError]:
        """Store recorded changes exactly once, in one command unless another writer interferes.

        Args:
            session_id: The session.
            changes: The recorded changes, oldest first.
            incarnation: The incarnation of the session that was opened; `None` writes to the session that has the id
                now.
            lease: The lease of the manager, which must hold it or take it; `None` writes regardless of leases.
            releases: Whether the last statement releases the lease.
            loaded: The agents as they were loaded, by id. The changes of an agent that was rewound since are refused.
            owner: Only a session of this owner is changed; needed without an `incarnation`.

        Returns:
            The errors of agents whose changes could not be stored, by agent id: `SessionConflictError`,
            `AgentNotFoundError`, `MessageNotFoundError`, `SessionNotFoundError` or `MessageTooLargeError`. The changes
            of all other agents are stored. With `StateTooLargeError` the agent's messages are stored too, unless the
            error is `pending`.

        Raises:
            MongoDBSessionError: It is unknown whether the changes are stored. The same changes can be applied again.
        """
        checked_id(session_id, "session_id")
        return await Writer(self._store).apply(session_id, changes, incarnation, lease, releases, loaded, owner)

    async def _apply_one(self, session_id: str, change: Change, owner: str | None) -> None:
        for error in (await self._apply(session_id, (change,), owner=owner)).values():
            raise error

    # The methods of Strands' `SessionRepository`. With an `owner`, they treat sessions of others as missing.

    async def create_session(self, session: Session, *, owner: str | None = None, **kwargs: Any) -> Session:
        """Create a session; `owner` becomes its owner.

        Raises:
            SessionExistsError: A session with that id exists.
        """
        session_id, moment = checked_id(session.session_id, "session_id"), to_date(session.created_at)
        await Opening(self._store).create(session_id, moment, labels_of(self._owner(owner)))
        return session

    async def read_session(self, session_id: str, *, owner: str | None = None, **kwargs: Any) -> Session | None:
        """Return a session, or `None` if it does not exist."""
        fields = dict.fromkeys(("session_type", "created_at", "updated_at", *OF_V1), 1)
        document = await self._store.sessions.find(session_id, {**LIFE, **fields}, self._owner(owner))
        if document is None:
            return None
        if not is_of_v1(document):
            self._store.expiry.learn(session_id, document)
        return documents.session_from(document)

    async def delete_session(self, session_id: str, *, owner: str | None = None, **kwargs: Any) -> bool:
        """Delete a session: its document, its archived messages, its attachments and the content of its storage.

        The first command removes the content of the document. If the call is interrupted after that, the session does
        not exist any more. A call with the same id, or a process that opens its first session in the collection a
        minute later or more, removes the rest. A manager that has the session open gets `SessionNotFoundError` from its
        next write.

        Args:
            session_id: The session.
            owner: Only a session of this owner is deleted.
            **kwargs: Unused; Strands' own repositories accept them, too.

        Returns:
            Whether the session existed. `False` also for a session that has expired, and for an id that is being
            imported or forked; that copy continues.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
        """
        return await self._store.deletion.delete(checked_id(session_id, "session_id"), self._owner(owner))

    async def create_agent(
        self, session_id: str, session_agent: SessionAgent, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        """Create an agent without messages; an existing agent stays unchanged.

        Raises:
            SessionNotFoundError: The session does not exist.
            StateTooLargeError: The session document has no room for the state; the stored state stays.
        """
        wanted, document = self._owner(owner), await compute(documents.new_agent, session_agent)
        await self._apply_one(session_id, CreateAgent(session_agent.agent_id, document), wanted)

    async def read_agent(
        self, session_id: str, agent_id: str, *, owner: str | None = None, **kwargs: Any
    ) -> SessionAgent | None:
        """Return an agent, or `None` if the session has no such agent.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        key = agent_key(agent_id)
        names = ("agent_data", "created_at", "updated_at")
        fields = {f"agents.{key}.{name}": 1 for name in names}
        document = await self._store.sessions.get(session_id, fields, self._owner(owner))
        agents: Document = usable_field(dict, document.get("agents"), session_id, "agents")
        stored = agents.get(key)
        if not isinstance(stored, dict | None):
            raise MalformedField(f"agents.{key}", stored, dict).error(session_id)
        return None if stored is None else await compute(documents.agent_from, agent_id, stored)

    async def update_agent(
        self, session_id: str, session_agent: SessionAgent, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        """Store an agent's state; its creation date and configuration stay.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such agent.
            StateTooLargeError: The session document has no room for the state; the stored state stays.
        """
        wanted, state = self._owner(owner), await compute(documents.agent_state, session_agent)
        async with self._connection.operation():
            change = UpdateAgent(session_agent.agent_id, None, state, self._connection.now())
            await self._apply_one(session_id, change, wanted)

    async def create_message(
        self,
        session_id: str,
        agent_id: str,
        session_message: SessionMessage,
        *,
        owner: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a message. Its `message_id` must follow that of the last message; the first message can have any id.

        Raises:
            InvalidArgumentError: The message's id is not an int >= 0 and < 2**31.
            SessionConflictError: The message's id does not follow that of the agent's last message.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such agent.
            MessageTooLargeError: The message, without its attachments, is larger than 15 MiB.
            StateTooLargeError: Parts of the session other than messages fill its document.
        """
        message_id, wanted = checked_message_id(session_message.message_id), self._owner(owner)
        if not is_message_id(message_id):  # the next opening would renumber the message
            raise InvalidArgumentError("message_id of a new message must be an int >= 0 and < 2**31")
        message = await compute(documents.stored_message, session_message, message_id)
        message, size = set_aside(message, self._store.max_inline)
        await self._apply_one(session_id, AppendMessage(agent_id, message, by_id=True, size=size), wanted)

    async def read_message(
        self, session_id: str, agent_id: str, message_id: int, *, owner: str | None = None, **kwargs: Any
    ) -> SessionMessage | None:
        """Return a message, or `None` if the agent has no such message.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        checked_id(session_id, "session_id")
        wanted, archive, of_owner = checked_message_id(message_id), self._store.archive, self._owner(owner)

        async def read() -> Document | None:
            message = await archive.find_message(session_id, agent_id, wanted, owner=of_owner)
            if message is None:
                return None
            messages = [message]
            place = await archive.place_of(session_id, message, of_owner)
            await self._store.attachments.restore(place, {agent_id: messages})
            return messages[0]

        async with self._connection.operation():
            message = await read_consistently(session_id, read)
        if message is None:
            return None
        found = await compute(documents.message_from, message, message_id)
        if found is None:
            field = f"agents.{agent_key(agent_id)}.messages"
            raise MalformedField(field, message.get("message"), dict).error(session_id)
        return found

    async def update_message(
        self,
        session_id: str,
        agent_id: str,
        session_message: SessionMessage,
        *,
        owner: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace the content of a stored message. With `redact_message`, the original content is removed.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such agent.
            MessageNotFoundError: The agent has no such message.
            MessageTooLargeError: The message, without its attachments, is larger than 15 MiB.
        """
        checked_id(session_id, "session_id")
        checked_id(agent_id, "agent_id")
        message_id, wanted = checked_message_id(session_message.message_id), self._owner(owner)
        body = {**(await compute(documents.message_body, session_message)), "updated_at": now()}
        fields, size = replacement(body, self._store.max_inline)
        given = Identity(to_date(session_message.created_at), session_message.message.get("tracking_id"))
        change = ReplaceMessage(agent_id, message_id, fields, given, by_id=True, size=size)
        await self._apply_one(session_id, change, wanted)

    async def list_messages(
        self,
        session_id: str,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        *,
        newest_first: bool = False,
        before: int | None = None,
        owner: str | None = None,
        **kwargs: Any,
    ) -> list[SessionMessage]:
        """Return messages of an agent, oldest first, without elements of `messages` that are not messages.

        The cost depends on the number of returned messages, not on their place in the conversation. To page from the
        end, pass `newest_first=True`, and as `before` the id of the last message of the previous page.

        Args:
            session_id: The session.
            agent_id: The agent.
            limit: The maximum number of messages to return; `None` for all.
            offset: The number of messages to skip at the beginning of the list.
            newest_first: Whether the list begins with the newest message.
            before: Only messages with a lower id than this one.
            owner: Only messages of a session of this owner are returned.
            **kwargs: Unused; later versions of Strands can pass more.

        Raises:
            InvalidArgumentError: An argument is invalid.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
            AgentNotFoundError: The session has no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        page, wanted = Page.checked(limit, offset, newest_first, before), self._owner(owner)
        key, archive = agent_key(agent_id), self._store.archive
        fields = page.expressions(f"$agents.{key}")

        async def read() -> tuple[int, list[Document]]:
            stored = await self._store.sessions.get_agent(session_id, agent_id, fields, wanted)
            found, since = Found.of(stored, page.before), stored.get("created_at")
            place = Place(session_id, Life.of(stored).incarnation)
            begin, end = found.begin, found.end
            if found.is_below:
                begin, end = page.bounds(await archive.position_of(place, key, since, page.before or 0, found))
            end = min(end, found.archived)
            older = (await archive.read(place, {key: (since, begin, end)}))[key] if begin < end else []
            messages = [*older, *stored["messages"]]
            await self._store.attachments.restore(place, {agent_id: messages})
            return begin, messages

        async with self._connection.operation():
            begin, messages = await read_consistently(session_id, read)
        listed = await compute(_messages_of, messages, begin, session_id, agent_id)
        return listed[::-1] if page.newest_first else listed


def _messages_of(stored: Sequence[Any], first: int, session_id: str, agent_id: str) -> list[SessionMessage]:
    found = messages_from(stored, first, session_id, agent_id, restoring=False)
    return [message for message, _ in found if message is not None]
