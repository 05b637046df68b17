"""The methods that export, import, fork and write back sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from typing import TYPE_CHECKING

from .._io.loop import portal_to
from .base import RepositoryMethods

if TYPE_CHECKING:
    from .._copying.copier import Copier


class CopyingMethods(RepositoryMethods):
    def _copier_blocking(self) -> Copier:
        """Return the copier, which is imported on first use, because the application pays for imports at its start."""
        from .._copying.copier import Copier

        return Copier(self._store)

    async def _copier(self) -> Copier:
        """Return the copier, imported in a thread."""
        return await asyncio.to_thread(self._copier_blocking)

    async def export_session(self, session_id: str) -> AsyncGenerator[str, None]:
        """Yield a session as lines of JSON, which `import_session` reads; the user guide describes them.

        Memory does not grow with the session. The session can be written to during an export: it contains the messages
        that were stored when the first line was requested, each exactly once, in its state when the export reaches it.
        A message that was redacted before that is exported redacted, without its attachments. Stopping early leaks no
        cursor.

        Raises:
            SessionNotFoundError: The session does not exist, or was removed during the call.
            AttachmentError: An attachment is missing or damaged.
        """
        export = (await self._copier()).export(session_id)
        while lines := await export.pull():
            for line in lines:
                yield line

    async def import_session(
        self, stream: Iterable[str | bytes] | AsyncIterable[str | bytes], session_id: str | None = None
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

        Raises:
            InvalidArgumentError: The stream is damaged, truncated, or not an exported session of a known version; the
                message names the line.
            SessionExistsError: A session with that id exists and stays unchanged, or is being copied.
            SessionConflictError: Another process has removed the copy, because its lease had expired.
            MessageTooLargeError: The session does not fit into documents of MongoDB.
        """
        copier = await self._copier()
        return await copier.import_session(portal_to(asyncio.get_running_loop()), stream, session_id)

    async def fork_session(
        self, session_id: str, new_id: str, at_message: int | Mapping[str, int] | None = None
    ) -> None:
        """Create a session with the same content, or with its beginning, to try another continuation.

        Attachments are copied on the server; messages pass through this process, a few megabytes at a time. They keep
        their dates and ids; `created_at` of the fork is the current time. The fork has the metadata of the session, the
        guardrail events and usage totals of the copied messages, and no feedback, because that refers to another
        continuation.

        A cut agent has its current state, without pending interrupts and without the state of its model. Its
        conversation manager keeps the size of its window, if the fork has enough messages; a summary that covers later
        messages is removed. Orchestrators have their current states. The fork of an expiring session expires, too.

        The session stays unchanged, except that a session of an earlier version is migrated as if it was opened.

        Args:
            session_id: The session.
            new_id: The id of the fork.
            at_message: The id of the last message of the fork. For a session with several agents, a mapping of agent
                ids to message ids; agents that it does not name are not cut. `None` copies everything.

        Raises:
            InvalidArgumentError: An argument is invalid, or `at_message` is one id for several agents.
            SessionNotFoundError: The session does not exist, or was removed during the call.
            SessionExistsError: The session `new_id` exists and stays unchanged, or another copy into it is in progress.
            SessionConflictError: Another process has removed the copy, because its lease had expired.
            AgentNotFoundError: The session has no agent that `at_message` names.
            MessageNotFoundError: The agent has no message with that id.
            AttachmentError: An attachment is missing.
        """
        copier = await self._copier()
        await portal_to(asyncio.get_running_loop()).run(copier.fork, session_id, new_id, at_message)

    async def write_back(self, session_id: str) -> None:
        """Write the archived messages and the attachments of a session back into its document.

        Versions 0.5 to 0.9 then restore the whole session. Call it after the last write of this version to the session:
        the next append that exceeds the limits moves old messages to the archive again, and the next large attachment
        goes to GridFS.

        The session is written back as a whole or not at all. Messages that are appended, replaced or redacted during
        the call are kept. If the call is interrupted, another call removes left-over buckets and attachments. A session
        that is already written back stays unchanged.

        Args:
            session_id: The session.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
            SessionNotFoundError: The session does not exist.
            StateTooLargeError: The document would exceed 16 MiB; the session stays unchanged.
            AttachmentError: An attachment is missing or damaged; the session stays unchanged.
            DatabaseError: An archived message is missing, or other writers kept changing the session.
        """
        await (await self._copier()).write_back(session_id)
