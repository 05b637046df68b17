"""The methods that export, import, fork, rewind and write back sessions."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .._format.labels import checked_owner
from .._io.loop import portal_to
from .base import RepositoryMethods

if TYPE_CHECKING:
    from .._copying.copier import Copier


_LAST = re.compile(rb'\s*{\s*"end"\s*:')


def split_export(lines: Iterable[str | bytes]) -> Iterator[Iterator[str | bytes]]:
    """Split the lines that `export_owner` yielded by session; `import_session` reads the lines of one session.

    Lines are read lazily, so memory does not grow with the export. Advancing to the next session skips the unread lines
    of the previous one.

    Args:
        lines: An open file, or another iterable of whole lines.

    Yields:
        The lines of a session; those of the last one are incomplete if the export was truncated.
    """
    number = 0

    def number_of(line: str | bytes) -> int:
        nonlocal number
        current = number
        number += _LAST.match(line[:64].encode(errors="replace") if isinstance(line, str) else line) is not None
        return current

    for _, session in itertools.groupby((line for line in lines if line.strip()), number_of):
        yield session


class CopyingMethods(RepositoryMethods):
    def _copier_blocking(self) -> Copier:
        """Return the copier, which is imported on first use, because the application pays for imports at its start."""
        from .._copying.copier import Copier

        return Copier(self._store)

    async def _copier(self) -> Copier:
        """Return the copier, imported in a thread."""
        return await asyncio.to_thread(self._copier_blocking)

    async def export_session(self, session_id: str, *, owner: str | None = None) -> AsyncGenerator[str, None]:
        """Yield a session as lines of JSON, which `import_session` reads; the user guide describes them.

        Memory does not grow with the session. The session can be written to during an export: it contains the messages
        that were stored when the first line was requested, each exactly once, in its state when the export reaches it.
        A message that was redacted before that is exported redacted, without its attachments. Stopping early leaks no
        cursor.

        Args:
            session_id: The session.
            owner: Only a session of this owner is exported.

        Raises:
            SessionNotFoundError: The session does not exist, was removed during the call, or belongs to another owner.
            SessionConflictError: The session was rewound during the call.
            AttachmentError: An attachment is missing or damaged.
        """
        export = (await self._copier()).export(session_id, self._owner(owner))
        while lines := await export.pull():
            for line in lines:
                yield line

    async def export_owner(self, owner: str) -> AsyncGenerator[str, None]:
        """Yield all sessions of an owner, oldest first, each as `export_session` yields it.

        `split_export` splits the lines by session; `import_session` reads the lines of one session. The export contains
        the sessions that exist when the first line is requested, except those that are deleted or expire before the
        export reaches them. Memory grows only with the number of sessions.

        Args:
            owner: The owner; sessions of other owners, or of none, are not exported.

        Raises:
            InvalidArgumentError: `owner` is not a valid owner.
            MongoDBSessionError: A session cannot be exported, as `export_session` describes; the error names it.
        """
        export = (await self._copier()).export_owner(checked_owner(owner))
        while lines := await export.pull():
            for line in lines:
                yield line

    async def import_session(
        self,
        stream: Iterable[str | bytes] | AsyncIterable[str | bytes],
        session_id: str | None = None,
        *,
        owner: str | None = None,
    ) -> str:
        """Store an exported session and return its id; the session is invisible until it is complete.

        The stream can come from an untrusted source. An import that fails, is refused or is cancelled leaves no
        session. The incomplete copy of a killed process is invisible, and other processes remove it when its lease of
        one minute has expired. The session and its messages keep their dates. With `session_ttl`, the time to live of
        the session starts when the import is complete.

        Args:
            stream: The lines that `export_session` yielded: an open file, or an iterable or asynchronous iterable of
                `str` or `bytes`. Its items can be lines, or chunks that are split at any point. Asynchronous code reads
                a file or a plain iterable in threads, so that the event loop does not wait for it.
            session_id: The id of the new session; `None` for the id it was exported with.
            owner: The owner of the new session; `None` for the owner it was exported with. Pass it if the stream comes
                from a user.

        Raises:
            InvalidArgumentError: The stream is damaged, truncated, or not an exported session of a known version; the
                message names the line.
            SessionExistsError: A session with that id exists and stays unchanged, or is being copied.
            SessionConflictError: Another process has removed the copy, because its lease had expired.
            MessageTooLargeError: The session does not fit into documents of MongoDB.
        """
        copier = await self._copier()
        portal = portal_to(asyncio.get_running_loop())
        return await copier.import_session(portal, stream, session_id, self._owner(owner))

    async def fork_session(
        self,
        session_id: str,
        new_id: str,
        at_message: int | Mapping[str, int] | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """Create a session with the same content, or with its beginning, to try another continuation.

        Attachments are copied on the server; messages pass through this process, a few megabytes at a time. They keep
        their dates and ids; `created_at` of the fork is the current time. The fork has the owner, title, tags and
        metadata of the session, the guardrail events and usage totals of the copied messages, and no feedback, because
        that refers to another continuation.

        A cut agent has its current state, without pending interrupts and without the state of its model. Its
        conversation manager keeps the size of its window, if the fork has enough messages; a summary that covers later
        messages is removed. Orchestrators have their current states. The fork of an expiring session expires, too.

        The session stays unchanged, except that a session of an earlier version is migrated as if it was opened.

        Args:
            session_id: The session.
            new_id: The id of the fork.
            at_message: The id of the last message of the fork. For a session with several agents, a mapping of agent
                ids to message ids; agents that it does not name are not cut. `None` copies everything.
            owner: Only a session of this owner is forked.

        Raises:
            InvalidArgumentError: An argument is invalid, or `at_message` is one id for several agents.
            SessionNotFoundError: The session does not exist, was removed during the call, or belongs to another owner.
            SessionExistsError: The session `new_id` exists and stays unchanged, or another copy into it is in progress.
            SessionConflictError: Another process has removed the copy, because its lease had expired.
            AgentNotFoundError: The session has no agent that `at_message` names.
            MessageNotFoundError: The agent has no message with that id.
            AttachmentError: An attachment is missing.
        """
        copier, wanted = await self._copier(), self._owner(owner)
        await portal_to(asyncio.get_running_loop()).run(copier.fork, session_id, new_id, at_message, wanted)

    async def rewind_session(
        self,
        session_id: str,
        at_message: int | Mapping[str, int],
        *,
        keep_as: str | None = None,
        owner: str | None = None,
    ) -> None:
        """Remove the messages of a session after a given one, to edit a question or to have it answered again.

        The session then equals a fork that ends with that message: usage totals, guardrail events, live messages and
        states are truncated as `fork_session` describes. The archived copies and the attachments of the removed
        messages are deleted. Metadata and feedback stay. Message ids are used again.

        The session is rewound as a whole or not at all. Agents and orchestrators that were loaded before get
        `SessionConflictError` at their next write. A session whose lease is held is not rewound, so rewind it before
        you open a manager with `on_busy="wait"` or `"refuse"`.

        Args:
            session_id: The session.
            at_message: The id of the last message that stays; -1 removes all messages. For a session with several
                agents, a mapping of agent ids to message ids; agents that it does not name are not changed.
            keep_as: The id of a new session with all messages as they were, of the same owner; `None` keeps no copy. If
                the call is interrupted, there is either no copy and the session is unchanged, or the copy is complete.
                In the latter case, a further call raises `SessionExistsError`; repeat it without `keep_as`.
            owner: Only a session of this owner is rewound.

        Raises:
            InvalidArgumentError: An argument is invalid, or `at_message` is one id for several agents.
            SessionNotFoundError: The session does not exist, was removed during the call, or belongs to another owner.
            SessionExistsError: The session `keep_as` exists; nothing is changed.
            SessionBusyError: A manager holds the lease of the session.
            SessionConflictError: Another writer has appended a message during the call; nothing is changed.
            AgentNotFoundError: The session has no agent that `at_message` names.
            MessageNotFoundError: The agent has no message with that id.
            AttachmentError: An attachment is missing, so that the session cannot be copied.
        """
        copier, wanted = await self._copier(), self._owner(owner)
        await portal_to(asyncio.get_running_loop()).run(copier.rewind, session_id, at_message, keep_as, wanted)

    async def write_back(self, session_id: str, *, owner: str | None = None) -> None:
        """Write the archived messages and the attachments of a session back into its document.

        Versions 0.5 to 0.9 then restore the whole session. Call it after the last write of this version to the session:
        the next append that exceeds the limits moves old messages to the archive again, and the next large attachment
        goes to GridFS.

        The session is written back as a whole or not at all. Messages that are appended, replaced or redacted during
        the call are kept. If the call is interrupted, another call removes left-over buckets and attachments. A session
        that is already written back stays unchanged.

        Args:
            session_id: The session.
            owner: Only a session of this owner is written back.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
            StateTooLargeError: The document would exceed 16 MiB; the session stays unchanged.
            AttachmentError: An attachment is missing or damaged; the session stays unchanged.
            DatabaseError: An archived message is missing, or other writers kept changing the session.
        """
        await (await self._copier()).write_back(session_id, self._owner(owner))
