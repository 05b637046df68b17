"""`LiveMessages`: the messages that a restart would restore, and the view to store if the live messages differ.

A turn makes one comparison, in O(window). It is fast because a shadow of a message shares all leaves with the message:
comparing a string with itself takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .._format.documents import Document
from .._format.view import Item, Shown, View, runs_of, shadow
from .message_match import KEPT, KnownMessages, Match, are_equal

_NO_MESSAGE = -1


class _Expected(NamedTuple):
    """Messages that would be restored, and their ids; `None` for a message that is not stored."""

    messages: list[Any]
    ids: list[int | None]


class LiveMessages:
    """The messages that would be restored for an agent, after its recorded changes.

    Args:
        first: The position of the first stored message that is known.

    Attributes:
        unstorable: The ids of messages that were edited with a value that cannot be stored; they are shown unedited.
    """

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self._order: list[int] = []
        self._known = KnownMessages()
        self._apart: set[int] = set()  # ids of messages that were appended without being live; they are restored too
        self.unstorable: set[int] = set()
        self._repaired: list[Any] | None = None
        self._view: View | None = None
        self._shown: list[Shown] = []

    @classmethod
    def of(cls, first: int, messages: Iterable[tuple[int, Any] | None]) -> LiveMessages:
        """Return the live messages of an agent that is restored without a view.

        Args:
            first: The position of the first message.
            messages: Ids and messages; `None` for an element that is not restored.
        """
        live = cls(first)
        for found in messages:
            if found is None:
                live._order.append(_NO_MESSAGE)
            else:
                live.append(*found)
        return live

    def show(self, view: View, shown: Iterable[Shown], stored: Mapping[int, Any]) -> None:
        """Start with a view and the messages that its items show; `stored` are the loaded messages before `after`."""
        self._view = view
        self._known.messages = {n: shadow(message) for n, message in stored.items()} | self._known.messages
        self._shown = [each._replace(message=shadow(each.message)) for each in shown]

    def repaired(self, messages: Sequence[Any]) -> None:
        """Keep the restored messages if Strands has repaired broken tool calls in them.

        The repair is stored with the next change of the live messages; restoring an agent stores nothing.
        """
        if list(messages) != list(self._known.messages.values()):
            self._repaired = shadow(list(messages))

    def append(self, message_id: int, message: Any, *, is_live: bool = True) -> None:
        """Add an appended message. A message that is not live is restored too."""
        self._order.append(message_id)
        if not is_live:
            self._apart.add(message_id)
        self._known.messages[message_id] = shadow(message)

    def extend(self, message_id: int, message: Any) -> None:
        """Replace a message that its agent has continued."""
        self._known.messages[message_id] = shadow(message)

    def replace(self, message_id: int, message: Any, *, redacts: bool) -> None:
        """Replace the content of a message; from then on, the view shows the stored message.

        The live message can still have the former content.
        """
        new = shadow(message)
        if redacts:
            self._known.redacted.add(message_id)
        former = self._known.former.setdefault(message_id, [])
        if (old := self._known.messages.get(message_id)) is not None:
            former.append(old)
            self._known.messages[message_id] = new
        if self._view is None:
            return
        found: list[Shown] = []
        for each in self._shown:
            if each.item is not None and message_id in each.item.of:
                former.append(each.message)
                found += [Shown(self._known.messages.get(n), None, n) for n in each.item.of]
            elif each.item is None and each.message_id == message_id:
                found.append(each._replace(message=new))
            else:
                found.append(each)
        self._shown = found
        self._view = self._view.without_content_of({message_id})

    # Comparing.

    def change(
        self,
        messages: Sequence[Any],
        base: tuple[Sequence[Any], int] | None,
        next_id: int,
        id_of: Callable[[str], int | None],
        version_of: Callable[[int], Any],
    ) -> Document | None:
        """Return the view to store, `{}` to remove the stored view, or `None` if the live messages would be restored.

        Args:
            messages: The live messages.
            base: A restore without a view: the messages that the conversation manager prepends, and the number of
                oldest stored messages that it leaves out; `None` if that is unknown.
            next_id: The id of the next message.
            id_of: Returns the id of the stored message with a tracking id.
            version_of: Returns the stored `updated_at` of a message, `...` if it is unknown. A message of an unknown
                version is never shown in another form, because another writer might have redacted it.

        Raises:
            EncodingError: An inserted message holds a value that cannot be stored.
        """
        if self._repaired is not None and are_equal(messages, self._repaired):
            return None
        self._repaired = None
        without_view = None if base is None else self._without_view(*base)
        expected = without_view if self._view is None else self._with_view(self._view)
        if expected is not None and self._are_same(messages, expected):
            if base is not None and self._view is None:
                self._drop_before(base[1])
            return None
        if without_view is not None and self._are_same(messages, without_view):
            self._view, self._shown = None, []
            return {}
        match = Match(self._known, self._shown, messages, id_of, version_of)
        self.unstorable |= match.unstorable
        found = self._with_apart(match.found, 0 if base is None else base[1])
        count = self._count_tail(found)
        view = View(found[-count].message_id or 0 if count else next_id, _items_of(found[: len(found) - count]))
        if view == self._view:
            return None
        self._view = view
        self._shown = [each._replace(message=shadow(each.message)) for each in found[: len(found) - count]]
        self._drop_unused(view)
        return view.document()

    def _without_view(self, prepended: Sequence[Any], removed: int) -> _Expected | None:
        at = removed - self._first
        if not 0 <= at <= len(self._order):
            return None
        ids: list[int | None] = [n for n in (self._order[at:] if at else self._order) if n != _NO_MESSAGE]
        found = list(map(self._known.messages.get, ids)) if ids else []  # type: ignore[arg-type]
        if None in found:
            return None
        return (
            _Expected([*prepended, *found], [*(None for _ in prepended), *ids]) if prepended else _Expected(found, ids)
        )

    def _with_view(self, view: View) -> _Expected:
        tail = [n for n in self._order if n >= view.after]
        messages = [each.message for each in self._shown]
        ids = [None if each.item is not None else each.message_id for each in self._shown]
        return _Expected([*messages, *(self._known.messages[n] for n in tail)], [*ids, *tail])

    def _with_apart(self, found: list[Shown], removed: int) -> list[Shown]:
        """Insert the messages that were never live at their places, except those that a window has removed."""
        self._apart.intersection_update(self._order[max(0, removed - self._first) :])
        self._apart.difference_update(each.message_id for each in found)
        for n in sorted(self._apart):
            later = (at for at, each in enumerate(found) if each.message_id is not None and each.message_id > n)
            found.insert(next(later, len(found)), Shown(self._known.messages[n], None, n))
        return found

    def _are_same(self, messages: Sequence[Any], expected: _Expected) -> bool:
        """Return whether the expected messages are the live ones and those that were never live."""
        if self._are_all_same(messages, expected):
            self._apart.difference_update(expected.ids)
            return True
        if not self._apart:
            return False
        kept = [at for at, n in enumerate(expected.ids) if n not in self._apart]
        return self._are_all_same(messages, _Expected(*([values[at] for at in kept] for values in expected)))

    def _are_all_same(self, messages: Sequence[Any], expected: _Expected) -> bool:
        if are_equal(messages, expected.messages):
            return True
        return len(messages) == len(expected.messages) and all(
            are_equal(live, known) or (n is not None and self._known.is_same(live, n))
            for live, known, n in zip(messages, *expected, strict=True)
        )

    def _count_tail(self, found: Sequence[Shown]) -> int:
        """Return the number of last live messages that are the last stored messages, in order."""
        newest = (n for n in reversed(self._order) if n != _NO_MESSAGE)
        count = 0
        for each in reversed(found):
            if each.item is not None or each.message_id != next(newest, None):
                break
            count += 1
        return count

    def _drop_before(self, removed: int) -> None:
        """Forget the oldest messages, which the conversation manager has removed."""
        if (count := removed - self._first) > 0:
            for n in self._order[:count]:
                self._known.messages.pop(n, None)
                self._known.former.pop(n, None)
                self._apart.discard(n)
            del self._order[:count]
            self._first = removed

    def _drop_unused(self, view: View) -> None:
        """Forget stored messages that the view does not show, except the newest ones."""
        used = {n for item in view.items for a, b in item.loaded for n in range(a, b + 1)}
        unused = [n for n in self._known.messages if n < view.after and n not in used]
        for n in unused[:-KEPT]:
            del self._known.messages[n]
            self._known.former.pop(n, None)
        # The original of a message that is only shown with other content can be large, because it was shortened.
        for n in {n for item in view.items for n in item.of if n < view.after} - used:
            self._known.messages.pop(n, None)
        unknown = (at for at, n in enumerate(self._order) if n != _NO_MESSAGE and n not in self._known.messages)
        count = 1 + max(unknown, default=-1)  # from before there, a restore without a view is unknown
        del self._order[:count]
        self._first += count


def _items_of(found: Iterable[Shown]) -> tuple[Item, ...]:
    items: list[Item] = []
    ids: list[int] = []
    for each in found:
        if each.item is None:
            assert each.message_id is not None
            ids.append(each.message_id)
            continue
        if ids:
            items.append(Item(runs_of(ids)))
            ids = []
        items.append(each.item)
    return (*items, Item(runs_of(ids))) if ids else tuple(items)
