"""`Match`: the stored message that each live message of an agent shows, unedited or with other content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from .._format.codec import encode
from .._format.documents import Document
from .._format.view import BLOCK_DEPTH, VIEW_DEPTH, Item, Shown
from ..errors import EncodingError

KEPT = 512
"""The number of stored messages to keep although they are not live: an application can insert them again."""

_QUOTE = 32
"""Two texts are related if one contains the first characters of the other, at most this number."""


def are_equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal; values that cannot be compared count as different."""
    try:
        return bool(one == other)
    except Exception:  # for example NumPy arrays that an application has put into a message
        return False


class KnownMessages:
    """The stored messages of an agent that are in memory, by id.

    Attributes:
        messages: The current stored messages.
        former: Earlier versions of replaced messages.
        redacted: The ids of redacted messages, whose live messages can still have the original content.
    """

    def __init__(self) -> None:
        self.messages: dict[int, Any] = {}
        self.former: dict[int, list[Any]] = {}
        self.redacted: set[int] = set()

    def is_same(self, live: Any, message_id: int) -> bool:
        """Return whether a live message is a stored one, or an earlier version of it.

        A stored message without tracking id gets one when its agent is invoked.
        """
        known = self.messages.get(message_id)
        if known is not None and type(live) is dict and "tracking_id" in live and "tracking_id" not in known:
            without_id = {name: value for name, value in live.items() if name != "tracking_id"}
            if are_equal(without_id, known):
                known["tracking_id"] = live["tracking_id"]
                return True
        return are_equal(live, known) or any(are_equal(live, old) for old in self.former.get(message_id, ()))

    def versions(self, message_id: int) -> Iterator[Any]:
        """Yield the current and the earlier versions of a stored message."""
        if (current := self.messages.get(message_id)) is not None:
            yield current
        yield from self.former.get(message_id, ())


class Match:
    """Finds the stored message of each live one.

    Attributes:
        found: The stored messages that the live messages show, in the order of the live messages.
        unstorable: The ids of messages that were edited with a value that cannot be stored.
    """

    def __init__(
        self,
        known: KnownMessages,
        shown: Sequence[Shown],
        messages: Sequence[Any],
        id_of: Callable[[str], int | None],
        version_of: Callable[[int], Any],
    ) -> None:
        self._known = known
        self.unstorable: set[int] = set()
        self._id_of = id_of
        self._version_of = version_of
        self._live_ids = {message.get("tracking_id") for message in messages if type(message) is dict} - {None}
        self._used: set[int] = set()
        self._by_tracking_id: dict[Any, list[int]] = {}
        for n, message in known.messages.items():
            self._by_tracking_id.setdefault(message.get("tracking_id"), []).append(n)
        self._made: dict[Any, list[Shown]] = {}
        for each in shown:
            if each.item is not None:
                self._made.setdefault(each.message.get("tracking_id"), []).append(each)
        self.found = [shown for message in messages if type(message) is dict for shown in self._shown(message)]

    def _shown(self, message: Document) -> list[Shown]:
        tracking_id = message.get("tracking_id")
        if type(tracking_id) not in (str, type(None)):
            tracking_id = None
        own = self._by_tracking_id.get(tracking_id, [])
        candidates = own if tracking_id is None else [*own, *self._by_tracking_id.get(None, ())]
        same = [n for n in candidates if self._known.is_same(message, n)]
        if same:
            return [self._stored(next((n for n in same if n not in self._used), same[0]))]
        for each in self._made.get(tracking_id, ()):
            if are_equal(each.message, message):
                return [each]
        if tracking_id is None:
            return self._edited(message, None)
        stored = next((n for n in own if n not in self._used), own[0] if own else self._id_of(tracking_id))
        try:
            return self._edited(message, stored)
        except EncodingError:
            if stored is None:
                raise
        self.unstorable.add(stored)
        return [Shown(self._known.messages.get(stored, message), None, stored)]

    def _stored(self, message_id: int) -> Shown:
        self._used.add(message_id)
        return Shown(self._known.messages[message_id], None, message_id)

    def _edited(self, message: Document, own: int | None) -> list[Shown]:
        """Return a message with other content, or the stored messages if it shows a redacted one."""
        item = self._item(message, own)
        at = tuple(map(self._version_of, item.of))
        if ... not in at and self._known.redacted.isdisjoint(item.of):
            if own is not None:
                self._used.add(own)
            return [Shown(message, item._replace(at=at), own)]
        return [Shown(self._known.messages.get(n, message), None, n) for n in item.of]

    def _item(self, message: Document, own: int | None) -> Item:
        content = message.get("content")
        if type(content) is not list or not all(type(block) is dict for block in content):
            encoded = encode(message, depth=VIEW_DEPTH, name="message")
            return Item(message=encoded, of=() if own is None else (own,))
        fields = {name: value for name, value in message.items() if name != "content"}
        encoded = encode(fields, depth=VIEW_DEPTH, name="message")
        blocks: list[Any] = []
        uses: set[int] = set()
        of = set() if own is None else {own}
        for position, block in enumerate(content):
            place = self._place_of(block, position, own)
            if place is not None:
                uses.add(place[0])
                blocks.append(list(place))
            else:
                blocks.append(
                    encode(block, depth=BLOCK_DEPTH, name="message.content")
                )  # refuses a block that contains itself
                of.update(self._related(block))
        of |= uses
        first = [] if own is None else [own]
        ids = (*first, *sorted(of - set(first)))
        return Item(message=encoded, content=blocks, of=ids, uses=tuple(sorted(uses)))

    def _place_of(self, block: Any, position: int, own: int | None) -> tuple[int, int] | None:
        """Return where a block is stored: the id of a message, and the position in its content."""
        others = (n for n in reversed(self._known.messages) if n != own)
        for n in (*(() if own is None else (own,)), *islice(others, KEPT)):
            stored = self._known.messages.get(n)
            content = () if stored is None else stored.get("content", ())
            if n == own and position < len(content) and are_equal(content[position], block):
                return n, position
            for at, other in enumerate(content):
                if are_equal(other, block):
                    return n, at
        return None

    def _related(self, block: Document) -> Iterator[int]:
        """Yield the messages whose text or tool result a block seems to quote, if they are redacted or not live."""
        texts = list(_texts_of(block))
        for n, stored in self._known.messages.items():
            is_redacted = n in self._known.redacted
            if not is_redacted and stored.get("tracking_id") in self._live_ids:
                continue
            least = 4 if is_redacted else _QUOTE
            if any(_is_quoted(texts, version.get("content"), least) for version in self._known.versions(n)):
                yield n


def _is_quoted(texts: Sequence[str], content: Any, least: int) -> bool:
    quoted = (text[:_QUOTE] for text in _texts_of(content) if len(text) >= least)
    return any(quote in text for quote in quoted for text in texts)


def _texts_of(value: Any) -> Iterator[str]:
    if type(value) is str:
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_of(item)
