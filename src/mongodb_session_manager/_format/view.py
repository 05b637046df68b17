"""The view of an agent: its live messages, if they are not the stored messages in their order. Pure.

Conversation managers, context strategies and applications edit `agent.messages`. The stored messages keep the original
conversation; the view describes the live messages.

agents.<agent key>.view
    after    the id of the first stored message that follows the items; all later messages follow it
    items    the live messages before it
             {runs: [[first, last], ...]}       stored messages, unedited
             {of, at, uses, message, content}   an edited or inserted message
                 message    its fields, encoded, without `content`
                 content    its blocks, encoded; `[id, n]` is block n of a stored message
                 of         the ids of the stored messages that it shows, in whole or in part
                 at         the `updated_at` of each of them
                 uses       the ids in `of` to which `content` refers

If the content of the message is not a list of blocks, `message` contains it, and `content` is absent. A statement that
replaces the content of a stored message also turns each item that shows a part of it into the runs of its `of`, so that
no redacted text remains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from .codec import decode
from .documents import Document
from .expressions import array_at, is_object, is_view, number_at
from .ids import is_message_id

VIEW_DEPTH = 7  # document, agents, key, view, items, item, message
BLOCK_DEPTH = 8

Run = tuple[int, int]
"""The first and the last id of consecutive stored messages."""


class Item(NamedTuple):
    """An item of a view: runs of stored messages, or a message with other content.

    Attributes:
        runs: The stored messages; empty for a message with other content.
        message: The encoded fields of a message with other content.
        content: Its encoded blocks; a list `[id, n]` is block n of a stored message. `None` if `message` has them.
        of: The ids of the stored messages that it shows.
        at: Their `updated_at`, as known to the writer.
        uses: The ids that `content` refers to.
    """

    runs: tuple[Run, ...] = ()
    message: Document | None = None
    content: list[Any] | None = None
    of: tuple[int, ...] = ()
    at: tuple[Any, ...] = ()
    uses: tuple[int, ...] = ()

    @property
    def loaded(self) -> tuple[Run, ...]:
        """The stored messages that restoring the item needs."""
        return self.runs or tuple((n, n) for n in self.uses)

    def document(self) -> Document:
        """Return the item in its stored form."""
        if self.message is None:
            return {"runs": [list(run) for run in self.runs]}
        content = {} if self.content is None else {"content": self.content}
        of = {"of": list(self.of), "at": list(self.at), "uses": list(self.uses)}
        return {**of, "message": self.message, **content}

    def as_stored(self) -> Item:
        """Return the item that shows the same stored messages, unedited."""
        return self if self.message is None else Item(tuple((n, n) for n in self.of))

    @classmethod
    def parse(cls, stored: Any) -> Self | None:
        """Parse a stored item; return `None` if it is not one."""
        if type(stored) is not dict:
            return None
        message, content = stored.get("message"), stored.get("content")
        if message is None:
            runs: Any = stored.get("runs")
            is_valid = type(runs) is list and all(map(_is_run, runs))
            return cls(tuple((int(a), int(b)) for a, b in runs)) if is_valid else None
        of: Any = stored.get("of")
        at: Any = stored.get("at")
        uses: Any = stored.get("uses")
        if type(message) is not dict or not _are_ids(of) or not _are_ids(uses) or not set(uses) <= set(of):
            return None
        if type(at) is not list or len(at) != len(of) or not isinstance(content, list | None):
            return None
        if not all(_is_block_of(block, uses) for block in content or ()):
            return None
        return cls((), message, content, tuple(map(int, of)), tuple(at), tuple(map(int, uses)))


def _is_run(run: Any) -> bool:
    return type(run) is list and len(run) == 2 and all(map(is_message_id, run)) and run[0] <= run[1]


def _are_ids(ids: Any) -> bool:
    return type(ids) is list and all(map(is_message_id, ids))


def _is_block_of(block: Any, uses: Any) -> bool:
    if type(block) is not list:
        return True
    return len(block) == 2 and all(map(is_message_id, block)) and block[0] in uses


class View(NamedTuple):
    """A view in its parsed form."""

    after: int
    items: tuple[Item, ...] = ()

    @classmethod
    def parse(cls, stored: Any) -> Self | None:
        """Parse a stored view; return `None` if it is not one."""
        if type(stored) is not dict or not is_message_id(stored.get("after")) or type(stored.get("items")) is not list:
            return None
        items = [Item.parse(item) for item in stored["items"]]
        found = tuple(item for item in items if item is not None)
        return cls(int(stored["after"]), found) if len(found) == len(items) else None

    def document(self) -> Document:
        """Return the view in its stored form."""
        return {"after": self.after, "items": [item.document() for item in self.items]}

    def fits(self, next_id: int) -> bool:
        """Return whether the view refers only to messages with ids below the next one."""
        return self.after <= next_id and all(last < next_id for _, last in self.runs)

    def needs(self, message_id: int) -> bool:
        """Return whether restoring the view needs a message."""
        return message_id >= self.after or any(first <= message_id <= last for first, last in self.runs)

    @property
    def runs(self) -> list[Run]:
        """The stored messages before `after` that restoring needs."""
        return [run for item in self.items for run in item.loaded]

    def without_content_of(self, ids: Collection[int]) -> View:
        """Return the view after messages were replaced: it shows the stored messages instead of edited ones."""
        items = (item if set(ids).isdisjoint(item.of) else item.as_stored() for item in self.items)
        return View(self.after, tuple(items))

    def until(self, last: int) -> View | None:
        """Return the view of a conversation that ends with the message `last`; `None` if it does not show it."""
        if last >= self.after:
            return self
        kept: list[Item] = []
        for item in self.items:
            ids = [n for run in item.runs for n in run] or list(item.of)
            if all(n <= last for n in ids):
                kept.append(item)
                continue
            runs: list[Run] = []
            for a, b in item.as_stored().runs:
                runs += [(a, min(b, last))] if a <= last else []
                if b > last:
                    break
            kept += [Item(tuple(runs))] if runs else []
            break
        is_shown = any(a <= last <= b for item in kept for a, b in item.as_stored().runs)
        return View(last + 1, tuple(kept)) if is_shown else None


def replaced_in(stored: Any, ids: Collection[int]) -> Any:
    """Return a stored view after messages were replaced; a malformed one is returned unchanged."""
    view = View.parse(stored)
    return stored if view is None else view.without_content_of(ids).document()


# Restoring.


class Shown(NamedTuple):
    """A live message of a view.

    Attributes:
        message: The message.
        item: The item with its content; `None` for an unedited message.
        message_id: The id of the stored message that it shows; `None` for an inserted message.
    """

    message: Any
    item: Item | None
    message_id: int | None


def shown(view: View, messages: Mapping[int, Any]) -> tuple[list[Shown], int]:
    """Return the live messages that the items of a view show, and the number of stored messages that are missing.

    `messages` are the loaded messages, decoded, by increasing id.
    """
    found: list[Shown] = []
    missing = 0
    for item in view.items:
        made = None if item.message is None else _made(item, messages)
        if made is not None:
            found.append(Shown(made, item, item.of[0] if item.of else None))
            continue
        for first, last in item.as_stored().runs:
            ids = _between(messages, first, last)
            missing += last - first + 1 - len(ids)
            found += [Shown(messages[n], None, n) for n in ids]
    return found, missing


def _between(messages: Mapping[int, Any], first: int, last: int) -> list[int]:
    if last - first < len(messages):
        return [n for n in range(first, last + 1) if n in messages]
    return [n for n in messages if first <= n <= last]


def _made(item: Item, messages: Mapping[int, Any]) -> Any:
    """Return the message of an item; `None` if a stored message that it refers to is missing."""
    message = decode(item.message)
    if item.content is None:
        return message if type(message) is dict else None
    content: list[Any] = []
    for block in item.content:
        if type(block) is not list:
            content.append(decode(block))
            continue
        message_id, n = map(int, block)
        blocks = messages[message_id]["content"] if message_id in messages else ()
        if n >= len(blocks):
            return None
        content.append(shadow(blocks[n]))
    return {**message, "content": content} if type(message) is dict else None


def shadow(value: Any) -> Any:
    """Return a copy of the containers of a value; all other objects are shared, so that comparing the two is fast."""
    if isinstance(value, dict):
        return {key: shadow(item) if type(item) not in _LEAVES else item for key, item in value.items()}
    if isinstance(value, list):
        return [shadow(item) if type(item) not in _LEAVES else item for item in value]
    return tuple(map(shadow, value)) if type(value) is tuple else value


_LEAVES = frozenset((str, int, float, bool, bytes, type(None)))


def positions(view: View, archived: int) -> list[Run]:
    """Return the half-open ranges of archived positions that hold messages of a view."""
    wanted = [(a, min(b + 1, archived)) for a, b in view.runs if a < archived]
    return _joined([*wanted, (view.after, archived)] if view.after < archived else wanted, 0)


def closest(ranges: Iterable[Run]) -> list[Run]:
    """Merge close ranges, because a bucket holds many messages; return a few that cover all of them."""
    joined = _joined(ranges, _CLOSE)
    return joined if len(joined) <= _MOST_RANGES else [(joined[0][0], joined[-1][1])]


def _joined(ranges: Iterable[Run], distance: int) -> list[Run]:
    joined: list[Run] = []
    for begin, end in sorted(ranges):
        if joined and begin - joined[-1][1] <= distance:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


_CLOSE = 64
_MOST_RANGES = 64


# Expressions. Paths begin with `$`.


def needed_before(agent: str) -> Document:
    """Return the expression for the messages in the head, before `after`, that restoring the view needs."""
    bounds = {"$and": [{"$isArray": ["$$run"]}, {"$eq": [{"$size": array_at("$$run")}, 2]}]}
    low, high = ({"$arrayElemAt": [array_at("$$run"), n]} for n in (0, 1))
    is_between = {"$and": [bounds, {"$gte": ["$$message.message_id", low]}, {"$lte": ["$$message.message_id", high]}]}
    in_run = {"$anyElementTrue": [{"$map": {"input": array_at("$$item.runs"), "as": "run", "in": is_between}}]}
    is_used = {"$in": ["$$message.message_id", array_at("$$item.uses")]}
    items = array_at(f"{agent}.view.items")
    is_needed = {"$anyElementTrue": [{"$map": {"input": items, "as": "item", "in": {"$or": [in_run, is_used]}}}]}
    is_earlier = {"$lt": ["$$message.message_id", f"{agent}.view.after"]}
    return {
        "$filter": {
            "input": array_at(f"{agent}.messages"),
            "as": "message",
            "cond": {"$and": [is_object("$$message"), is_earlier, is_needed]},
        }
    }


def view_without(agent: str, ids: Iterable[int]) -> Document:
    """Return the expression for an agent's view after messages were replaced; it stays absent if there is none."""
    view = f"{agent}.view"
    shows = {"$gt": [{"$size": {"$setIntersection": [array_at("$$item.of"), list(ids)]}}, 0]}
    as_stored = {"runs": {"$map": {"input": array_at("$$item.of"), "as": "id", "in": ["$$id", "$$id"]}}}
    items = {
        "$map": {
            "input": array_at(f"{view}.items"),
            "as": "item",
            "in": {"$cond": [{"$and": [is_object("$$item"), shows]}, as_stored, "$$item"]},
        }
    }
    return {"$cond": [is_view(agent), {"$mergeObjects": [view, {"items": items}]}, view]}


def guarded_view(agent: str, stored: Mapping[str, Any], new: Collection[int], archive_revision: int) -> Document:
    """Return the expression for a new view; it shows the stored messages if another writer has replaced them.

    Args:
        agent: The path of the agent.
        stored: The view in its stored form.
        new: The ids of the messages that the same statement stores.
        archive_revision: The agent's `archive_revision` when the writer read it; replacing an archived message
            increments it.
    """
    items = [_guarded(agent, item, new, archive_revision) for item in stored["items"]]
    return {"$mergeObjects": [{"after": {"$literal": stored["after"]}, "items": items}]}


def _guarded(agent: str, item: Document, new: Collection[int], archive_revision: int) -> Document:
    known = [(n, at) for n, at in zip(item.get("of", ()), item.get("at", ()), strict=True) if n not in new]
    if not known:
        return {"$literal": item}
    is_archive_same = {"$eq": [number_at(f"{agent}.archive_revision"), archive_revision]}
    conditions = []
    for message_id, at in known:
        has_id = {"$eq": ["$$this.message_id", message_id]}
        found = {"$filter": {"input": array_at(f"{agent}.messages"), "cond": has_id}}
        updated_at = {"$ifNull": [{"$arrayElemAt": ["$$found.updated_at", 0]}, None]}
        is_same = {"$eq": [updated_at, {"$literal": at}]}
        is_known = {"$cond": [{"$eq": [{"$size": "$$found"}, 0]}, is_archive_same, is_same]}
        conditions.append({"$let": {"vars": {"found": found}, "in": is_known}})
    as_stored = {"runs": [[n, n] for n in item["of"]]}
    return {"$cond": [{"$and": conditions}, {"$literal": item}, {"$literal": as_stored}]}


def shows_content(stored: Mapping[str, Any]) -> bool:
    """Return whether a stored view shows edited content of stored messages."""
    return any(item.get("of") for item in stored.get("items", ()))


def runs_of(ids: Sequence[int]) -> tuple[Run, ...]:
    """Return ids as runs, in their order."""
    runs: list[Run] = []
    for n in ids:
        if runs and n == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return tuple(runs)
