"""Copying sessions: out of the database, into one, and within one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping

from ._exports import SessionExports
from ._forks import SessionForks
from ._imports import SessionImports, feed
from ._loop import portal_to


class SessionCopying(SessionExports, SessionImports, SessionForks):
    """The part of the repository that copies sessions."""

    async def export_session(self, session_id: str) -> AsyncGenerator[str, None]:
        """Yield a session as lines of JSON, which `import_session` reads; the user guide describes them.

        However long the session is, little of it is in memory. It may be written to meanwhile: what it holds when the
        first line is asked for is exported, each message once, as it is when it is reached. One that was redacted
        before that is exported redacted, without its attachments. Who stops early leaves nothing open.

        Raises:
            SessionNotFoundError: The session does not exist (any more).
            AttachmentError: An attachment is missing or damaged.
        """
        export = self._export(session_id)
        while lines := await export.pull():
            for line in lines:
                yield line

    async def import_session(
        self, stream: Iterable[str | bytes] | AsyncIterable[str | bytes], session_id: str | None = None
    ) -> str:
        """Store an exported session and return its id; nothing of it is visible before all of it is stored.

        The stream can come from an untrusted source. An import that fails, is cancelled or refused leaves nothing. What
        a killed process has stored is invisible, and other processes remove it when its lease of a minute is over.
        Dates stay. A session that expires has its whole time to live ahead, however long the import takes.

        Args:
            stream: The lines that `export_session` yielded: an open file, or an iterable of `str` or `bytes`, each of
                them a line or any part of the text. An iterable that is not asynchronous is read in threads where an
                event loop must not wait.
            session_id: The new session; `None` for the id it was exported with.

        Raises:
            InvalidArgumentError: The stream is damaged, truncated, or not an exported session of a known version; the
                message names the line.
            SessionExistsError: There is a session of that id; it is left as it is.
            MessageTooLargeError: It does not fit into documents of MongoDB.
        """
        return await feed(portal_to(asyncio.get_running_loop()), self._import(session_id), stream)

    async def fork_session(
        self, session_id: str, new_id: str, at_message: int | Mapping[str, int] | None = None
    ) -> None:
        """Make another session with the same content, or its beginning, to try another continuation.

        Messages and attachments are copied on the server. Messages keep their dates and ids; the fork is created now.
        It has the metadata and the guardrail events of its messages, but no feedback, which was given for another
        continuation. Running totals are those of its messages.

        An agent that is cut has the state of its session now, but no pending interrupt and no state of its model. Its
        conversation manager shows as many messages as now, if there are so many; a summary that tells of later ones is
        removed. Orchestrators are as they are now. A fork of a session that expires does so, too.

        The session is left as it is; one of a version before 1.0 gets its message numbers, as by being opened.

        Args:
            session_id: The session.
            new_id: The fork.
            at_message: The id of the last message of the fork, or ids by agent id where the session has several
                agents; one that is not named is not cut. `None` for everything.

        Raises:
            InvalidArgumentError: An argument cannot be used, or `at_message` is one id for several agents.
            SessionNotFoundError: The session does not exist (any more).
            SessionExistsError: There is a session `new_id`; it is left as it is.
            AgentNotFoundError: The session holds no such agent.
            MessageNotFoundError: The agent holds no such message.
            AttachmentError: An attachment is missing.
        """
        await portal_to(asyncio.get_running_loop()).run(self._fork, session_id, new_id, at_message)
