"""The methods that list, count and find sessions.

A page begins after the date and id in the cursor of the page before, and the indexes have the same order. So every
page costs the same, and a session that exists from the first page to the last is listed once.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from .._format.dates import date_from, to_date
from .._format.documents import USAGE, Document, usable_numbers
from .._format.expressions import array_at, entries_at, number_at
from .._format.ids import agent_id_of, checked_id, checked_text
from .._format.labels import NO_LIST, checked_tags, labels_of, owner_of, tags_of, title_of
from .._format.layout import LIVE, UNFINISHED
from .._format.malformed import usable_field
from .._format.metadata import checked_metadata, decode_values, encoded, name_of
from .._format.sizes import MAX_DOCUMENT_BYTES, least_size
from .._io.threads import compute
from ..errors import DatabaseError, EncodingError, InvalidArgumentError, raise_alone
from .base import RepositoryMethods

Order: TypeAlias = Literal["-updated_at", "updated_at", "-created_at", "created_at"]

MAX_PAGE = 1000
"""The maximum number of sessions of a page."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = datetime(1, 1, 1, tzinfo=UTC)
_LAST = datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)
_VALUE_DEPTH = 2  # document, metadata, value
_BAD_VALUE = 2  # the error code for a hint that names no index

_SUMMARY_OF_AGENT: Document = {
    "key": "$$this.k",
    "usage": "$$this.v.usage",
    "messages": {"$add": [number_at("$$this.v.archived"), {"$size": array_at("$$this.v.messages")}]},
}
_SUMMARY: Document = {
    **dict.fromkeys(("application_name", "owner", "title", "tags", "created_at", "updated_at", "metadata"), 1),
    "agents": {"$map": {"input": entries_at("$agents"), "in": _SUMMARY_OF_AGENT}},
}


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """The entry of a session in a list.

    Attributes:
        session_id: The session.
        application_name: The name that it was created with.
        created_at: The time of its creation, UTC.
        updated_at: The time of its last write, UTC.
        agents: The ids of its agents.
        message_counts: The number of all messages that an agent has stored, by agent id.
        usage: The running totals of all its agents, as in `UsageReport`.
        metadata: Its metadata.
        owner: Its owner; `None` if it has none.
        title: Its title; `None` if it has none.
        tags: Its tags.
    """

    session_id: str
    application_name: str | None
    created_at: datetime
    updated_at: datetime
    agents: tuple[str, ...]
    message_counts: dict[str, int]
    usage: dict[str, int]
    metadata: dict[str, Any] = field(repr=False)
    owner: str | None = None
    title: str | None = field(default=None, repr=False)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionPage:
    """A page of a list of sessions.

    Attributes:
        sessions: The sessions of the page, in the requested order.
        next_cursor: The `cursor` of the next page; `None` for the last page.
    """

    sessions: tuple[SessionSummary, ...]
    next_cursor: str | None


def criteria(
    application_name: object,
    metadata: object,
    created_after: object,
    updated_after: object,
    owner: str | None,
    tags: object,
) -> Document:
    """Return the filter for the sessions that meet every criterion: values, never operators."""
    meant: Document = labels_of(owner)
    if tags is not None and (wanted := checked_tags(tags)):
        meant["tags"] = {"$all": wanted}
    if application_name is not None:
        if not isinstance(application_name, str):
            raise InvalidArgumentError(f"application_name must be a str, not {type(application_name).__name__}")
        meant["application_name"] = {"$eq": checked_text(application_name, "application_name")}
    if metadata is not None:
        if isinstance(metadata, dict) and least_size(metadata, MAX_DOCUMENT_BYTES) > MAX_DOCUMENT_BYTES:
            raise InvalidArgumentError(f"metadata must be a filter of at most {MAX_DOCUMENT_BYTES} bytes")
        for key, value in checked_metadata(metadata).items():
            _refuse_operators(value, f"metadata[{key!r}]")
            try:
                meant[f"metadata.{key}"] = {"$eq": encoded(value, _VALUE_DEPTH + key.count("."), name_of(key))}
            except EncodingError as error:
                raise_alone(InvalidArgumentError(f"metadata[{key!r}] cannot be searched for: {error}"))
    for name, moment in (("created_at", created_after), ("updated_at", updated_after)):
        if moment is not None:
            meant[name] = {"$gt": _checked_date(moment, name.replace("_at", "_after"))}
    return meant


class Position(NamedTuple):
    """The position before a page: the date and id of the last session of the page before."""

    order: Order
    date: datetime
    session_id: str

    def cursor(self) -> str:
        """Return the cursor for the position; it needs no quoting in a URL."""
        milliseconds = (self.date - _EPOCH) // timedelta(milliseconds=1)
        text = json.dumps([self.order, milliseconds, self.session_id], separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()

    @classmethod
    def of(cls, cursor: object, order: Order) -> Position:
        """Return the position of a cursor; raise `InvalidArgumentError` if it is invalid, or of another order."""
        if not isinstance(cursor, str):
            raise InvalidArgumentError(f"cursor must be a str, not {type(cursor).__name__}")
        try:
            fields = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
            found, milliseconds, session_id = fields
            position = cls(found, _EPOCH + timedelta(milliseconds=milliseconds), checked_id(session_id, "cursor"))
            genuine = position.cursor() == cursor
        except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError):
            genuine = False
        if not genuine:
            raise InvalidArgumentError("cursor must be the next_cursor of a page of list_sessions")
        if position.order != order:
            raise InvalidArgumentError(f"cursor belongs to a list in another order than {order!r}")
        return position


class Query(NamedTuple):
    """The arguments of `find` for a page; `hint` is `None` if no index answers the query, or several can help."""

    filter: Document
    sort: list[tuple[str, int]]
    hint: list[tuple[str, int]] | None


def page_query(wanted: Document, order: Order, position: Position | None, metadata_fields: Sequence[str]) -> Query:
    date = order.removeprefix("-")
    backwards = order.startswith("-")
    meant = dict(wanted)
    # The order includes only sessions with the date, and only if a cursor can hold the date.
    bounds: Document = {"$gte": _FIRST, "$lte": _LAST, **meant.pop(date, {})}
    if position is None:
        query = {**meant, date: bounds, **LIVE}
    else:
        beyond = "$lt" if backwards else "$gt"
        # Each branch is one range of the index, so that neither reads sessions of earlier pages again.
        same = {**meant, date: {**bounds, "$eq": position.date}, "_id": {beyond: position.session_id}}
        further = {**meant, date: {**bounds, beyond: position.date}}
        query = {"$or": [same, further], **LIVE}
    direction = -1 if backwards else 1
    hint = None
    if "owner" in meant:  # its index has the order, and an owner has few sessions
        query |= NO_LIST  # not in the branches, where it would be checked before they are merged
        hint = [(path, 1) for path in ("owner", date, "_id")]
    elif len(meant) < 2:
        indexed = {"application_name", *(f"metadata.{field}" for field in metadata_fields)}
        if not meant.keys() - indexed:
            hint = [(path, 1) for path in (*meant, date, "_id")]
    return Query(query, [(date, direction), ("_id", direction)], hint)


def checked_order(order: object) -> Order:
    orders: tuple[Order, ...] = get_args(Order)
    if not isinstance(order, str) or order not in orders:
        raise InvalidArgumentError(f"order must be one of {', '.join(orders)}")
    return orders[orders.index(order)]


def checked_limit(limit: object) -> int:
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_PAGE:
        raise InvalidArgumentError(f"limit must be an int from 1 to {MAX_PAGE}")
    return limit


def summary_from(document: Mapping[str, Any]) -> SessionSummary:
    session_id, name = document["_id"], document.get("application_name")
    agents = {agent_id_of(agent["key"]): agent for agent in document.get("agents") or []}
    totals = [usable_numbers(agent.get("usage")) for agent in agents.values()]
    metadata: Document = usable_field(dict, document.get("metadata"), session_id, "metadata")
    return SessionSummary(
        session_id=session_id,
        application_name=name if isinstance(name, str) else None,
        created_at=date_from(document.get("created_at")),
        updated_at=date_from(document.get("updated_at")),
        agents=tuple(agents),
        message_counts={agent_id: agent["messages"] for agent_id, agent in agents.items()},
        usage={name: sum(total.get(name, 0) for total in totals) for name in USAGE},
        metadata=decode_values(metadata),
        owner=owner_of(document),
        title=title_of(document),
        tags=tags_of(document),
    )


def _summaries_from(documents: Sequence[Mapping[str, Any]]) -> tuple[SessionSummary, ...]:
    return tuple(map(summary_from, documents))


def _checked_date(value: object, name: str) -> datetime:
    if not isinstance(value, datetime):
        raise InvalidArgumentError(f"{name} must be a datetime, not {type(value).__name__}")
    try:
        return to_date(value)
    except InvalidArgumentError:  # the first or last day of the calendar, in another zone
        raise_alone(InvalidArgumentError(f"{name} must be a moment that UTC can express"))


def _refuse_operators(value: object, name: str) -> None:
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:  # a cycle, or a value that occurs twice
            continue
        seen.add(id(found))
        match found:
            case Mapping():
                if any(isinstance(key, str) and key.startswith("$") for key in found):
                    raise InvalidArgumentError(
                        f"{name} contains a key that begins with $: give a value, not an operator"
                    )
                waiting += found.values()
            case list() | tuple() | set() | frozenset():
                waiting += found


class ListingMethods(RepositoryMethods):
    async def list_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
        order: Order = "-updated_at",
        limit: int = 50,
        cursor: str | None = None,
        *,
        owner: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> SessionPage:
        """Return a page of the sessions that meet every criterion, without loading a message.

        The server reads only the sessions of the page and the next one, if the criteria name at most one of `owner`,
        `application_name` and the `metadata_fields`, and no date other than that of `order`. With an `owner`, it reads
        no session of another owner, regardless of the other criteria. A session that is written to between two pages
        ordered by `updated_at` moves in the list.

        Args:
            application_name: The name that the session was created with; `None` for any.
            metadata: Values by key, `a.b` for `b` within `a`. A stored list matches if it contains the value.
            created_after: The session was created later; a moment without a zone is UTC.
            updated_after: The session was written to later; a moment without a zone is UTC.
            order: The date to sort by, with `-` for the latest first. Sessions with the same date are sorted by id.
            limit: The maximum number of sessions to return, at most 1000.
            cursor: The `next_cursor` of the page before; the other arguments must be the same.
            owner: The owner of the sessions; `None` for any.
            tags: The session has all of these tags.

        Raises:
            InvalidArgumentError: An argument is invalid, or contains an operator.
        """
        given = (application_name, metadata, created_after, updated_after)
        meant = await compute(criteria, *given, self._owner(owner), tags)
        order, limit = checked_order(order), checked_limit(limit)
        position = None if cursor is None else Position.of(cursor, order)
        query = page_query(meant, order, position, self._store.metadata_fields)
        async with self._connection.operation():
            self._store.ensure_indexes()
            found = await self._page(query, limit + 1)
        sessions = await compute(_summaries_from, found[:limit])
        if len(found) <= limit:
            return SessionPage(sessions, None)
        last = found[limit - 1]
        return SessionPage(sessions, Position(order, last[order.removeprefix("-")], last["_id"]).cursor())

    async def count_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
        *,
        owner: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> int:
        """Return the number of sessions that meet every criterion; those are the same as for `list_sessions`.

        Raises:
            InvalidArgumentError: An argument is invalid, or contains an operator.
        """
        given = (application_name, metadata, created_after, updated_after)
        meant = await compute(criteria, *given, self._owner(owner), tags)
        # Without a condition the server would read every document; the ids are enough.
        options = {} if meant else {"hint": "_id_"}
        unfinished = {**meant, **UNFINISHED}  # counted separately, so that an index answers each query
        async with self._connection.operation():
            self._store.ensure_indexes()
            count = await self._store.collection.send(lambda collection: collection.count_documents(meant, **options))
            return count - await self._store.collection.send(lambda collection: collection.count_documents(unfinished))

    async def get_session_summary(self, session_id: str, *, owner: str | None = None) -> SessionSummary:
        """Return the list entry of a session, in one command that loads no messages.

        Raises:
            SessionNotFoundError: The session does not exist, or belongs to another owner.
        """
        return await compute(summary_from, await self._store.sessions.get(session_id, _SUMMARY, self._owner(owner)))

    async def session_exists(self, session_id: str, *, owner: str | None = None) -> bool:
        """Return whether a session with that id exists, and belongs to `owner` if there is one.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
        """
        return await self._store.sessions.find(session_id, {"_id": 1}, self._owner(owner)) is not None

    async def _page(self, query: Query, length: int) -> list[Document]:
        find, options = self._store.collection.find, {"sort": query.sort, "limit": length}
        try:
            return await find(query.filter, _SUMMARY, hint=query.hint, **options)
        except DatabaseError as error:
            if query.hint is None or error.code != _BAD_VALUE:
                raise
        return await find(query.filter, _SUMMARY, **options)  # the index does not exist (yet)
