"""`Migration`: gives the parts of sessions of 1.0.0 their new ids, and agents of earlier versions their new form.

A migration adds a new incarnation to the list `migrating` of the session document. It copies the buckets and files of
the session to the ids of that incarnation, on the server. One update then sets `incarnation`, if the agents are
unchanged. It increments their revisions, so that a move of messages that 1.0.0 has begun no longer matches, and records
the copied parts in `moved`.

The copied parts are then removed from the old ids, and all parts of the other incarnations in `migrating`: unfinished
migrations left them behind. `moved` and `migrating` are removed last. A process that opens the session, or writes to
it, while it has one of these fields, continues there.

1.0.0 can write to the session afterwards, during a rolling deployment. A reader that misses a message looks for buckets
that 1.0.0 has stored since, and moves them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from bson import ObjectId

from .._format.documents import Document, config_set, has_old_config_set
from .._format.expressions import array_at, entries_at, number_at, stored_config_set, with_ids
from .._format.ids import agent_key, numbered
from .._format.layout import ARCHIVE, CHUNKS, FILES, LIVE, OF_V1, Place
from .._format.retention import LIFE, MAX_SECONDS, Life, next_date
from .._format.statements import Update
from ..errors import DatabaseError, SessionNotFoundError
from .attachments import Attachments
from .deletion import Deletion, incarnations_of
from .expiry import Expiry
from .mover import Mover
from .sessions import ROUNDS, Sessions

logger = logging.getLogger(__name__)

_NUMBERS = ("archived", "revision", "archive_revision")


def is_of_v1(document: Document) -> bool:
    return not isinstance(document.get("incarnation"), ObjectId) or bool(document.keys() & OF_V1)


_REFERS: Document = {"$isArray": ["$$message.attachments"]}
_REFER: Document = {"$map": {"input": array_at("$$this.v.messages"), "as": "message", "in": _REFERS}}
_HAS_OWN: Document = {"$or": [{"$gt": [number_at("$$this.v.archived"), 0]}, {"$anyElementTrue": _REFER}]}

HAS_PARTS: Document = {"$anyElementTrue": {"$map": {"input": entries_at("$agents"), "in": _HAS_OWN}}}
"""The expression for whether a session has archived messages, or attachments in GridFS."""


_OF_V1: Document = {
    **dict.fromkeys(("attachments_generation", *OF_V1), 1),
    **LIFE,
    "has_parts": HAS_PARTS,
    "agents": {
        "$map": {
            "input": entries_at("$agents"),
            "in": {
                "key": "$$this.k",
                "since": "$$this.v.created_at",
                "next_message_id": "$$this.v.next_message_id",
                **{name: number_at(f"$$this.v.{name}") for name in _NUMBERS},
            },
        }
    },
}


class Migration:
    def __init__(
        self, sessions: Sessions, expiry: Expiry, deletion: Deletion, attachments: Attachments, mover: Mover
    ) -> None:
        self._sessions = sessions
        self._connection = sessions.connection
        self._archive = sessions.collection.part(ARCHIVE)
        self._expiry = expiry
        self._deletion = deletion
        self._attachments = attachments
        self._mover = mover

    async def migrate(self, session_id: str) -> Life:
        """Migrate a session, or finish its migration; raise `SessionNotFoundError` if it does not exist."""
        for _ in range(ROUNDS):
            document = await self._sessions.find(session_id, _OF_V1)
            if document is None:
                self._expiry.forget(session_id)
                raise SessionNotFoundError(f"session {session_id!r} does not exist")
            if not is_of_v1(document):
                return self._expiry.learn(session_id, document)
            if isinstance(document.get("incarnation"), ObjectId) and document.keys() & {"moved", "migrating"}:
                await self._remove_moved(session_id, document)
            else:
                await self._migrate_once(session_id, document)
        raise DatabaseError(f"session {session_id!r} kept changing while it was migrated: try again later")

    async def _migrate_once(self, session_id: str, document: Document) -> None:
        known = document.get("incarnation")
        old, new = Place(session_id, None), Place(session_id, known if isinstance(known, ObjectId) else ObjectId())
        agents: list[Document] = [agent for agent in document["agents"] if agent["key"] and "." not in agent["key"]]
        if document["has_parts"]:
            noted: Document = {"_id": session_id, "incarnation": known, **LIVE}
            note: Document = {"$addToSet": {"migrating": new.incarnation}}
            if not isinstance(unusable := document.get("migrating", []), list):
                noted |= {"migrating": {"$eq": unusable}}
                note = {"$set": {"migrating": [new.incarnation]}}
            if not await self._sessions.collection.update_one(noted, note):
                return
            if condition := _buckets_of(old, agents):
                await self._copy_buckets(condition, new, "replace")
            await self._attachments.copy_from_v1(old, new)
        seconds = document.get("session_ttl")
        sets: Document = {"incarnation": new.incarnation}
        if isinstance(seconds, int | float) and 1 <= seconds <= MAX_SECONDS:
            until = next_date(self._connection.now(), int(seconds))
            await self._expiry.date_parts(new, until)
            sets |= {"time_to_live": int(seconds), "expires_at": until}
        generation = document.get("attachments_generation")
        if document["has_parts"]:
            copied = [{name: agent.get(name) for name in ("key", "since", "archived")} for agent in agents]
            generations = generation if isinstance(generation, int) else 0
            sets |= {"moved": {"agents": copied, "generation": generations}, "attachments_generation": generations + 1}
        condition = {"_id": session_id, "incarnation": known, "attachments_generation": generation}
        condition["session_ttl"] = document.get("session_ttl")
        for agent in agents:
            path = f"agents.{agent['key']}"
            condition[path] = {"$exists": True}
            condition[f"{path}.next_message_id"] = agent.get("next_message_id")
            condition |= {f"{path}.{name}": agent[name] or {"$not": {"$gt": 0}} for name in _NUMBERS}
            sets[f"{path}.revision"] = agent["revision"] + 1
        unset = dict.fromkeys(("session_ttl", "kept_until", "keep_until"), "")
        matched = await self._mover.update_with_room(Update(condition, {"$set": sets, "$unset": unset}, None))
        if not matched and document["has_parts"] and known is None:
            current = await self._sessions.find(session_id, {"incarnation": 1})
            if (current or {}).get("incarnation") != new.incarnation:  # otherwise, an acknowledgement was lost
                await self._deletion.remove_parts(new)

    async def _copy_buckets(self, condition: Document, new: Place, when_matched: str) -> None:
        names = ("revision", "last", "messages")
        bucket = {
            "_id": {"incarnation": new.incarnation, "agent": "$_id.agent", "first": "$_id.first"},
            "session_id": {"$literal": new.session_id},
            **{name: f"${name}" for name in names},
        }
        into = {"into": self._archive.name, "whenMatched": when_matched, "whenNotMatched": "insert"}
        await self._archive.aggregate([{"$match": condition}, {"$replaceWith": bucket}, {"$merge": into}])

    async def _remove_moved(self, session_id: str, document: Document) -> None:
        """Remove the former parts, and those of unfinished migrations; then `moved` and `migrating`."""
        moved, migrating = document.get("moved"), document.get("migrating")
        for incarnation in incarnations_of(document):
            if incarnation != document["incarnation"]:
                await self._deletion.remove_parts(Place(session_id, incarnation))
        generation = moved.get("generation") if isinstance(moved, dict) else None
        if isinstance(generation, int):  # otherwise, an application has stored it
            old = Place(session_id, None)
            generations = {"$not": {"$gt": generation}}
            await self._archive.delete_many({"_id": old.buckets(), "generation": generations})
            chunks, files = (self._sessions.collection.part(suffix) for suffix in (CHUNKS, FILES))
            await files.delete_many({"_id": old.files(), "_id.generation": generations})
            await chunks.delete_many({"_id": old.chunks(), "files_id.generation": generations})
        condition = {"_id": session_id, "moved": moved, "migrating": migrating}
        await self._sessions.update(Update(condition, {"$unset": {"moved": "", "migrating": ""}}, None))

    async def move_late_buckets(self, place: Place) -> bool:
        """Move buckets that 1.0.0 has stored since the migration of a session; return whether there were any."""
        document = await self._sessions.find(place.session_id, _OF_V1)
        if document is None or document.get("incarnation") != place.incarnation:
            return False
        if not (condition := _buckets_of(Place(place.session_id, None), document["agents"])):
            return False
        # A bucket of an earlier generation is left over from an interrupted move.
        condition["generation"] = {"$gte": document.get("attachments_generation") or 0}
        if await self._archive.find_one(condition, {"_id": 1}) is None:
            return False
        await self._copy_buckets(condition, place, "keepExisting")
        if (life := self._expiry.learn(place.session_id, document)).expires_at is not None:
            await self._expiry.date_parts(place, life.expires_at)
        await self._archive.delete_many(condition)
        return True

    async def migrate_agents(
        self, session_id: str, agents: dict[str, Document], keys: Iterable[str], gained: Document | None = None
    ) -> bool:
        """Migrate agents to the current form in one command; return `False` after a concurrent change.

        Their messages get increasing ids, and each agent gets the `next_message_id` that follows: versions before 1.0
        store none, and keep their own counter. Those versions did not encode agent ids either, so an agent without
        `next_message_id` whose id contains `%` or `$` moves to its encoded key.

        Args:
            session_id: The session.
            agents: By key, the result of `head_numbers`; messages and numbers are updated in place.
            keys: The agents to migrate.
            gained: The field `incarnation` for a session that has none.
        """
        condition: Document = {"_id": session_id}
        if gained:
            condition["incarnation"] = {"$not": {"$type": "objectId"}}
        sets: Document = dict(gained or {})
        unsets: list[str] = []
        moved = []
        for old in keys:
            agent, new = agents[old], old
            ids, following, archived = agent["ids"], agent.get("next_message_id"), int(agent["archived"])
            if following is None and (new := agent_key(old)) != old:
                if new in agents:  # the original did not find the agent under its key and created a second agent
                    logger.warning(
                        "session_id=<%r>, agent=<%r> | agent not migrated: another agent has its key", session_id, old
                    )
                    del agents[old]
                    continue
                condition[f"agents.{new}"] = {"$exists": False}
                moved.append(old)
            path = f"agents.{old}"
            condition[path] = {"$exists": True}
            condition[f"{path}.next_message_id"] = following
            condition[f"{path}.messages"] = {"$size": len(ids)} if ids else {"$in": [None, []]}
            for name in ("archived", "revision"):
                condition[f"{path}.{name}"] = agent[name] or {"$not": {"$gt": 0}}
            sequence, agent["next_message_id"] = numbered(ids, archived, following)
            new_fields: Document = {"next_message_id": agent["next_message_id"]}
            if sequence != ids:
                agent["ids"], agent["revision"] = sequence, agent["revision"] + 1
                new_fields |= {"messages": with_ids(f"${path}.messages", sequence), "revision": agent["revision"]}
                loaded = agent.get("messages") or []
                for message, message_id in zip(loaded, sequence[len(ids) - len(loaded) :], strict=True):
                    if type(message) is dict:
                        message["message_id"] = message_id
            if has_old_config_set(agent):
                agent["config_set"] = sorted(config_set(agent))
                del agent["agent_data"]["config_set"]
                new_fields["config_set"] = stored_config_set(f"${path}")
                unsets.append(f"agents.{new}.agent_data.config_set")
            sets[f"agents.{new}"] = {"$mergeObjects": [f"${path}", new_fields]}
        unsets += [f"agents.{old}" for old in moved]
        for old in moved:
            agents[agent_key(old)] = agents.pop(old)
        if not sets:
            return True
        stages: list[Document] = [{"$set": sets}, *([{"$unset": unsets}] if unsets else [])]
        return await self._mover.update_with_room(Update(condition, stages, None))


def _buckets_of(old: Place, agents: Sequence[Document]) -> Document:
    """Return the filter for the buckets of agents under the ids of 1.0.0; empty if there can be none."""
    archived = [
        {"_id.agent": agent["key"], "_id.since": agent.get("since"), "_id.first": {"$lt": agent["archived"]}}
        for agent in agents
        if agent["archived"]
    ]
    return {"_id": old.buckets(), "$or": archived} if archived else {}
