"""The lease of a session: the manager whose turn it is, and the statements that take, check and release it. Pure.

lease
    token          the manager that holds the lease; absent while the lease is free
    until          the end of the lease, by the server's clock; absent while the lease is free
    fence          the number of times that the lease was taken
    line           the connections whose managers wait for it, oldest first: `{by, until}`

The lease is free if `until` is absent or has passed. A manager that has waited takes it only if its connection is the
first in `line`; a manager that has not waited takes it only if `line` is empty. Entries of `line` expire at their
`until`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from bson import ObjectId

from .documents import Document
from .expressions import array_at, number_at
from .statements import Update

LINE_SECONDS = 2.0
"""Seconds after which a waiting connection that does not poll loses its place in the line."""


class Claim(NamedTuple):
    """A manager that takes a lease.

    Attributes:
        token: The manager.
        by: Its connection.
        lease: The time after which the lease expires if it is not renewed.
    """

    token: ObjectId
    by: ObjectId
    lease: timedelta

    @classmethod
    def of(cls, by: ObjectId, seconds: float) -> Claim:
        """Return the claim of a new manager."""
        return cls(ObjectId(), by, timedelta(seconds=seconds))

    def may_open(self, moment: datetime) -> Document:
        """Return the condition for opening a session: this manager holds the lease, or it is free with no line."""
        has_passed = {"$not": {"$gt": moment}}
        return {"$or": [{"lease.token": self.token}, {"lease.until": has_passed, "lease.line.0.until": has_passed}]}

    def may_write(self, moment: datetime) -> Document:
        """Return the condition for writing without taking the lease: no other manager holds it."""
        return {"$or": [{"lease.token": self.token}, {"lease.until": {"$not": {"$gt": moment}}}]}

    def fields(self, moment: datetime) -> Document:
        """Return the fields that a statement sets to take or renew the lease."""
        return {"lease.token": self.token, "lease.until": moment + self.lease}

    def taking(self, update: Update, moment: datetime) -> Update:
        """Return a statement that also takes the lease; it matches nothing if the lease cannot be taken."""
        return _with(update, self.may_open(moment), self.fields(moment), takes=True)

    def holding(self, update: Update, moment: datetime) -> Update:
        """Return a statement that matches only while this manager holds the lease, and renews the lease."""
        return _with(update, {"lease.token": self.token}, {"lease.until": moment + self.lease})

    def releasing(self, update: Update) -> Update:
        """Return a statement that matches only while this manager holds the lease, and releases it."""
        return _with(update, {"lease.token": self.token}, {}, releases=True)

    def passing(self, update: Update, moment: datetime) -> Update:
        """Return a statement that matches only while no other manager holds the lease."""
        return _with(update, self.may_write(moment), {})

    def renewal(self, session_id: str, moment: datetime) -> Update:
        """Return the statement that only renews the lease."""
        return Update({"_id": session_id, "lease.token": self.token}, {"$set": self.fields(moment)}, None)

    def release(self, session_id: str) -> Update:
        """Return the statement that only releases the lease."""
        return Update({"_id": session_id, "lease.token": self.token}, {"$unset": dict.fromkeys(_HELD, "")}, None)

    def poll(self, session_id: str, moment: datetime) -> Update:
        """Return the statement that takes the lease, or renews the place of this connection in the line.

        The lease is taken if it is free and this connection is the first in the line. A `lease` that
        is neither absent, `null` nor an object is not matched.
        """
        queued: Document = {
            "$filter": {"input": array_at("$lease.line"), "cond": {"$gt": ["$$this.until", moment]}},
        }
        others = {"$filter": {"input": "$$line", "cond": {"$ne": ["$$this.by", self.by]}}}
        mine = {"by": self.by, "until": moment + timedelta(seconds=LINE_SECONDS)}
        renewed = {"$map": {"input": "$$line", "in": {"$cond": [{"$eq": ["$$this.by", self.by]}, mine, "$$this"]}}}
        appended = {"$concatArrays": ["$$line", [mine]]}
        is_queued = {"$in": [self.by, "$$line.by"]}
        is_first = {"$eq": [{"$ifNull": [{"$arrayElemAt": ["$$line.by", 0]}, self.by]}, self.by]}
        is_ours = {"$eq": ["$lease.token", self.token]}
        is_held = {"$gt": ["$lease.until", moment]}
        taken = {
            "token": self.token,
            "until": moment + self.lease,
            "fence": {"$add": [number_at("$lease.fence"), 1]},
            "line": others,
        }
        waiting = {"$mergeObjects": ["$lease", {"line": {"$cond": [is_queued, renewed, appended]}}]}
        may_take = {"$or": [is_ours, {"$and": [{"$not": [is_held]}, is_first]}]}
        value = {"$let": {"vars": {"line": queued}, "in": {"$cond": [may_take, taken, waiting]}}}
        condition = {"_id": session_id, "$or": [{"lease": None}, {"lease": {"$type": "object"}}]}
        return Update(condition, [{"$set": {"lease": value}}], None)

    def leave_line(self, session_id: str) -> Update:
        """Return the statement that removes this connection from the line."""
        update = {"$pull": {"lease.line": {"by": self.by}}}
        return Update({"_id": session_id, "lease.line.by": self.by}, update, None)


_HELD = ("lease.token", "lease.until")


class StoredLease(NamedTuple):
    """The `lease` of a session document. Values of other types are read as absent.

    Attributes:
        token: The manager that holds it.
        until: The end of the lease.
        fence: The number of times that it was taken.
        next_until: The time at which the first connection in the line loses its place.
    """

    token: ObjectId | None
    until: datetime | None
    fence: int | None
    next_until: datetime | None

    @classmethod
    def of(cls, document: Mapping[str, Any] | None) -> StoredLease:
        """Return the lease of a session document."""
        lease = (document or {}).get("lease")
        lease = lease if isinstance(lease, dict) else {}
        token, until, fence, line = (lease.get(name) for name in ("token", "until", "fence", "line"))
        first = line[0] if isinstance(line, list) and line else None
        return cls(
            token if isinstance(token, ObjectId) else None,
            until if isinstance(until, datetime) else None,
            fence if type(fence) is int else None,
            first["until"] if isinstance(first, dict) and isinstance(first.get("until"), datetime) else None,
        )

    def is_held_by_another(self, claim: Claim, moment: datetime) -> bool:
        """Return whether another manager holds the lease."""
        return self.token != claim.token and self.until is not None and self.until > moment

    def has_line(self, moment: datetime) -> bool:
        """Return whether a connection is in the line."""
        return self.next_until is not None and self.next_until > moment


def _with(
    update: Update, condition: Document, sets: Document, *, takes: bool = False, releases: bool = False
) -> Update:
    """Return a statement with a further condition that also changes the lease."""
    guarded = update._replace(filter={**update.filter, "$and": [*update.filter.get("$and", []), condition]})
    if isinstance(update.update, list):
        first, *rest = update.update
        sets = {path: {"$literal": value} for path, value in sets.items()}
        if takes:
            sets["lease.fence"] = {"$add": [number_at("$lease.fence"), 1]}
        if releases:
            rest = [*rest, {"$unset": list(_HELD)}]
        return guarded._replace(update=[{**first, "$set": {**first["$set"], **sets}}, *rest])
    operators: Document = dict(update.update)
    if sets:
        operators["$set"] = {**operators.get("$set", {}), **sets}
    if takes:
        operators["$inc"] = {**operators.get("$inc", {}), "lease.fence": 1}
    if releases:
        operators["$unset"] = {**operators.get("$unset", {}), **dict.fromkeys(_HELD, "")}
    return guarded._replace(update=operators)
