"""The newest messages of one agent in their stored form, for reads through an open manager. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from strands.types.session import SessionMessage

from .._format.documents import StoredMessage
from .._format.ids import message_id_of
from .._format.malformed import messages_from


class StoredMessages:
    """The newest messages of one agent, stored or recorded, in their stored form.

    The loaded and the recorded elements are kept without encoding or copying them again. Editing the messages of the
    live agent does not change them.

    Args:
        first: The position of the oldest of the messages in the conversation.
        elements: The loaded elements of `messages`.
    """

    def __init__(self, first: int, elements: Iterable[Any]) -> None:
        # Replaced as a whole, except for appending: other threads can read concurrently.
        self._known: tuple[int, list[Any]] = (first, list(elements))

    def append(self, element: StoredMessage) -> None:
        """Add a recorded message."""
        self._known[1].append(element)

    def replace(self, message_id: int, fields: Mapping[str, Any]) -> None:
        """Change fields of a message; does nothing if the message is not in memory."""
        first, elements = self._known
        for index, found in self._newest_first():
            if found == message_id:
                changed = {**elements[index], **fields}
                self._known = (first, [*elements[:index], changed, *elements[index + 1 :]])
                return

    def keep(self, count: int) -> None:
        """Drop all but the `count` newest messages."""
        first, elements = self._known
        if (dropped := len(elements) - count) > 0:
            self._known = (first + dropped, elements[dropped:])

    def knows(self, message_id: int) -> bool:
        """Return whether memory has the message, or shows that it does not exist."""
        return self._known[0] == 0 or any(found <= message_id for _, found in self._newest_first())

    def find(self, session_id: str, agent_id: str, message_id: int) -> SessionMessage | None:
        """Return a copy of a message; `None` if it is not in memory."""
        first, elements = self._known
        for index, found in self._newest_first():
            if found == message_id:
                return next(_messages(elements[index : index + 1], first + index, session_id, agent_id), None)
        return None

    def copies(self, session_id: str, agent_id: str, limit: int | None, offset: int) -> list[SessionMessage] | None:
        """Return copies of messages, oldest first; `None` if some of them are not in memory.

        Args:
            session_id: The session, for log lines.
            agent_id: The agent, for log lines.
            limit: The maximum number of messages; `None` returns all.
            offset: The number of oldest messages of the conversation to leave out.
        """
        first, elements = self._known
        if offset < first and limit != 0:
            return None
        begin = offset - first
        chosen = elements[begin:] if limit is None else elements[begin : begin + limit]
        return list(_messages(chosen, offset, session_id, agent_id))

    def _newest_first(self) -> Iterator[tuple[int, int]]:
        """Yield the index and the id of each message, newest first."""
        first, elements = self._known
        for index in range(len(elements) - 1, -1, -1):
            yield index, message_id_of(elements[index], first + index)


def _messages(elements: Iterable[Any], first: int, session_id: str, agent_id: str) -> Iterator[SessionMessage]:
    found = messages_from(elements, first, session_id, agent_id, restoring=False)
    return (message for message, _ in found if message is not None)
