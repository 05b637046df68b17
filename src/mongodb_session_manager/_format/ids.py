"""The ids of sessions, agents and messages: checks of arguments, keys of agents, and stored message ids. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidArgumentError, raise_alone

_MAX_IDS = 2**31

_RESERVED = re.compile(r"[%.$]")

NO_MESSAGE: list[Any] = []
"""The placeholder in lists of stored ids for an element of `messages` that is not a message and gets no id."""


def checked_id(value: object, name: str) -> str:
    """Return a valid session id or agent id, or raise `InvalidArgumentError`."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a str, not {type(value).__name__}")
    if not value:
        raise InvalidArgumentError(f"{name} must not be empty")
    if "\0" in value:
        raise InvalidArgumentError(f"{name} must not contain a NUL character")
    return checked_text(value, name)


def checked_text(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise_alone(InvalidArgumentError(f"{name} must be valid Unicode without lone surrogates"))
    return text


def checked_message_id(value: object) -> int:
    return checked_count(value, "message_id")


def checked_count(value: object, name: str) -> int:
    """Return a valid number of messages, or raise `InvalidArgumentError`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be an int >= 0, not {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise InvalidArgumentError(f"{name} must be an int >= 0 and < 2**63")
    return int(value)


def agent_key(agent_id: str) -> str:
    """Return the key of an agent: its id, with `%`, `.` and `$` percent-encoded."""
    return _RESERVED.sub(lambda match: f"%{ord(match[0]):02X}", checked_id(agent_id, "agent_id"))


def agent_id_of(key: str) -> str:
    return re.sub(r"%(25|2E|24)", lambda match: chr(int(match[1], 16)), key)


def is_message_id(value: object) -> bool:
    """Return whether a stored value is a message id; some versions before 1.0 stored whole floats."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_number or (isinstance(value, float) and value.is_integer())
    return is_number and 0 <= value < _MAX_IDS  # type: ignore[operator]


def message_id_of(stored: Any, position: int) -> int:
    """Return the id of an element of `messages`, or its position if the stored id is unusable."""
    message_id = stored.get("message_id") if type(stored) is dict else None
    return int(message_id) if is_message_id(message_id) else position  # type: ignore[arg-type]


def stored_id(message: object) -> Any:
    """Return the id of an element of `messages`: `None` for a message without a valid one."""
    if not isinstance(message, dict):
        return NO_MESSAGE
    message_id = message.get("message_id")
    return message_id if is_message_id(message_id) else None


def following_id(stored: Any, position: int, last: int) -> int:
    """Return the id of the message at `position`, which follows the id `last`; `stored` is its stored id."""
    return int(stored) if is_message_id(stored) and stored > last else max(position, last + 1)


class ExportedIds:
    """The exported ids of an agent's messages: the stored ids, unless these do not increase."""

    def __init__(self) -> None:
        self.position = 0
        self._last = -1

    def next(self, stored: object) -> int:
        self._last = following_id(stored, self.position, self._last)
        self.position += 1
        return self._last


def numbered(ids: list[Any], archived: int = 0, following: Any = None) -> tuple[list[Any], int]:
    """Return strictly increasing ids for the messages of a head, and the id that follows them.

    Gaps are allowed. A message gets another id only if its id is invalid, or not greater than the id before it. That
    happens if a version before 1.0, which keeps its own counter, has also written. `archived` messages are below the
    head, and `following`, the stored `next_message_id`, is above them all.
    """
    last = archived - 1
    if archived and is_message_id(following) and not any(is_message_id(each) and each > last for each in ids):
        last = max(last, following - 1)
    sequence = []
    for position, each in enumerate(ids, archived):
        if each == NO_MESSAGE:
            sequence.append(each)
            continue
        last = following_id(each, position, last)
        sequence.append(last)
    return sequence, last + 1


def is_numbered(numbers: Mapping[str, Any]) -> bool:
    """Return whether the ids of an agent's head need no change; `numbers` are the values of `head_numbers`."""
    ids, following, archived = numbers["ids"], numbers.get("next_message_id"), int(numbers["archived"])
    if type(following) is not int:
        return False
    # As versions since 1.0 store them. The length comes first: a range up to a damaged number can take gigabytes.
    are_as_many = 0 < len(ids) == following - archived
    if are_as_many and following <= _MAX_IDS and ids == list(range(archived, following)):
        return True
    return numbered(ids, archived, following) == (ids, following)
