"""`Page`: selects messages of an agent by their position, in the head and in the archive. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..errors import InvalidArgumentError
from .documents import Document
from .expressions import ALL, array_at, number_at
from .ids import checked_count, is_message_id


@dataclass(frozen=True, slots=True)
class Page:
    """The arguments of `list_messages`."""

    limit: int | None
    offset: int
    newest_first: bool
    before: int | None

    @classmethod
    def checked(cls, limit: object, offset: object, newest_first: object, before: object) -> Self:
        """Return a valid page, or raise `InvalidArgumentError`."""
        if not isinstance(newest_first, bool):
            raise InvalidArgumentError(f"newest_first must be a bool, not {type(newest_first).__name__}")
        return cls(
            limit=None if limit is None else min(checked_count(limit, "limit"), ALL),
            offset=min(checked_count(offset, "offset"), ALL),
            newest_first=newest_first,
            before=None if before is None else min(checked_count(before, "before"), ALL),
        )

    def bounds(self, upper: int) -> tuple[int, int]:
        """Return the begin and the exclusive end of the page, within the positions below `upper`."""
        if self.newest_first:
            end = max(0, upper - self.offset)
            return 0 if self.limit is None else max(0, end - self.limit), end
        begin = min(self.offset, upper)
        return begin, upper if self.limit is None else min(upper, begin + self.limit)

    def _bounds(self, upper: Any) -> tuple[Any, Any]:
        """Return the expressions for `bounds`."""
        if self.newest_first:
            end = {"$max": [0, {"$subtract": [upper, self.offset]}]}
            return 0 if self.limit is None else {"$max": [0, {"$subtract": [end, self.limit]}]}, end
        begin = {"$min": [self.offset, upper]}
        return begin, upper if self.limit is None else {"$min": [upper, {"$add": [begin, self.limit]}]}

    def expressions(self, path: str) -> Document:
        """Return the expressions that `Found.of` reads; `path` leads to the agent and begins with `$`."""
        messages, archived = array_at(f"{path}.messages"), number_at(f"{path}.archived")
        total, above = {"$add": [archived, {"$size": messages}]}, self._above(messages, archived)
        upper = {"$cond": [{"$lt": [above, 0]}, total, {"$add": [archived, above]}]}
        begin, end = self._bounds(total if self.before is None else upper)
        count = {"$subtract": [end, {"$max": [begin, archived]}]}
        first = {"$max": [0, {"$subtract": [begin, archived]}]}
        return {
            "created_at": f"{path}.created_at",
            "incarnation": "$incarnation",
            "archived": archived,
            "count": {"$size": messages},
            "above": above,
            "next_message_id": f"{path}.next_message_id",
            "begin": begin,
            "end": end,
            "messages": {"$cond": [{"$gt": [count, 0]}, {"$slice": [messages, first, {"$max": [1, count]}]}, []]},
        }

    def _above(self, messages: Document, archived: Document) -> Any:
        """Return the expression for the index of the first message in the head that the page must not show.

        It is -1 if there is none. A message without an id has its position as its id.
        """
        if self.before is None:
            return -1
        message = {"$arrayElemAt": ["$$messages", "$$n"]}
        stored = {"$let": {"vars": {"message": message}, "in": "$$message.message_id"}}
        message_id = {"$cond": [{"$isNumber": stored}, stored, {"$add": ["$$n", archived]}]}
        positions = {"$range": [0, {"$size": "$$messages"}]}
        are_above = {"$map": {"input": positions, "as": "n", "in": {"$gte": [message_id, self.before]}}}
        return {"$let": {"vars": {"messages": messages}, "in": {"$indexOfArray": [are_above, True]}}}


@dataclass(frozen=True, slots=True)
class Found:
    """The positions of a page, and the values that locate `before` in the archive.

    Attributes:
        begin: The position of the first message.
        end: The position after the last message.
        archived: The position of the first message in the head.
        gap: The number of unused ids below the head; 0 if the id of every message is its position.
        is_below: Whether all messages of the page are in the archive; `begin` and `end` are then not valid yet.
    """

    begin: int
    end: int
    archived: int
    gap: int
    is_below: bool

    @classmethod
    def of(cls, stored: Mapping[str, Any], before: int | None) -> Self:
        archived, count, following = int(stored["archived"]), int(stored["count"]), stored.get("next_message_id")
        gap = int(following) - count - archived if is_message_id(following) else 0  # type: ignore[arg-type]
        is_above = stored["above"] > 0 or (stored["above"] < 0 and count > 0)
        is_below = before is not None and archived > 0 and not is_above
        return cls(int(stored["begin"]), int(stored["end"]), archived, max(0, gap), is_below)
