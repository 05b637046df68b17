"""The statement that rewinds agents of a session: it removes their messages after a given one. Pure.

It matches the agents as they were read, and changes all of them at once. If the removed messages of an agent are all in
the session document, the head is shortened. If some are archived, the kept messages of one bucket become the head; that
bucket and the later ones are removed afterwards, see `_format.buckets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson import ObjectId

from .._format.buckets import revision_above
from .._format.changes import Loaded
from .._format.content import HAS_CONTENT, REMOVED_CONTENT, with_removed_content
from .._format.documents import Document, is_number, number, usable
from .._format.expressions import array_at
from .._format.ids import agent_id_of
from .._format.layout import Place
from .._format.statements import NOT_REWOUND, REMOVED, Update, with_removed
from .fork_document import agent_fields, cut_fields

_NUMBERS = ("archived", "revision", "archive_revision", "stale_below")


@dataclass(frozen=True)
class Cut:
    """An agent that is rewound.

    Attributes:
        key: The key of the agent.
        stored: The agent as it was read.
        last: The id of the last message that stays, -1 if all are removed.
        kept: The number of messages that stay.
        usage: The usage of the removed messages.
        references: The attachments of the removed messages.
        block_ids: The ids of the removed messages whose content is in the storage of the session.
        returned: The archived messages that become its head; `None` if no archived message is removed.
        revision: The highest revision of its head and of the buckets to remove.
    """

    key: str
    stored: Document
    last: int
    kept: int
    usage: Mapping[str, Any]
    references: Sequence[str]
    block_ids: Sequence[str]
    returned: list[Any] | None = None
    revision: int = 0

    @property
    def head(self) -> list[Any]:
        """The messages in the session document."""
        return self.stored.get("messages") or []

    @property
    def count(self) -> int:
        """The number of messages of the agent, before the rewind."""
        return number(self.stored, "archived") + len(self.head)

    @property
    def archived(self) -> int:
        """The number of messages that stay in the archive."""
        return number(self.stored, "archived") if self.returned is None else self.kept - len(self.returned)

    @property
    def stale_below(self) -> int:
        """The new revision of the head if buckets are to be removed: higher than theirs; 0 otherwise."""
        return 0 if self.returned is None else revision_above(self.revision)

    @property
    def identity(self) -> tuple[Any, ...]:
        """The values that every appended message and every rewind change."""
        return self.stored["next_message_id"], self.stored.get("rewound"), self.count, self.stored.get("created_at")

    @property
    def content(self) -> tuple[Any, ...]:
        """The values that every replaced message changes."""
        return number(self.stored, "revision"), number(self.stored, "archive_revision")


def compile_rewind(
    place: Place, session: Mapping[str, Any], cuts: Iterable[Cut], rewound: ObjectId, moment: datetime
) -> Update:
    """Return the statement that rewinds agents, unless they have changed or a manager holds the lease.

    Args:
        place: The session.
        session: Its document.
        cuts: The agents.
        rewound: The id of the rewind.
        moment: The current time.
    """
    condition: Document = {
        "_id": place.session_id,
        "incarnation": place.incarnation,
        "lease.until": {"$not": {"$gt": moment}},
        HAS_CONTENT: True if session.get(HAS_CONTENT) is True else {"$ne": True},
    }
    sets: Document = {"updated_at": moment}
    same: list[Document] = []
    left_out: list[Document] = []
    references: set[str] = set()
    block_ids: set[str] = set()
    for cut in cuts:
        path = f"agents.{cut.key}"
        condition |= _unchanged(path, cut)
        sets |= _changed(path, cut, moment) | {f"{path}.rewound": rewound}
        same += [_is_same(f"{path}.{name}", cut.stored, name) for name in (_STATE, "view")]
        left_out.append(_is_left_out("$$this", cut))
        references.update(cut.references)
        block_ids.update(cut.block_ids)
    condition["$expr"] = {"$and": same}
    kept = {"$filter": {"input": "$guardrail_events", "cond": {"$not": [{"$or": left_out}]}}}
    sets["guardrail_events"] = {"$cond": [{"$isArray": ["$guardrail_events"]}, kept, "$guardrail_events"]}
    if references:
        sets[REMOVED] = with_removed([sorted(references)])
    if block_ids:
        sets[REMOVED_CONTENT] = with_removed_content([sorted(block_ids)])
    return Update(condition, [{"$set": sets | _orchestrator_revisions(session, rewound)}], None)


_STATE = "agent_data.conversation_manager_state"


def _unchanged(path: str, cut: Cut) -> Document:
    """Return the condition that no message of an agent has been appended, changed or moved since it was read."""
    stored, length = cut.stored, len(cut.head)
    return {
        f"{path}.created_at": stored.get("created_at"),
        f"{path}.next_message_id": stored["next_message_id"],
        f"{path}.rewound": Loaded.of(stored).rewound or NOT_REWOUND,
        **{f"{path}.{name}": number(stored, name) or {"$not": {"$gt": 0}} for name in _NUMBERS},
        # A version before 1.0 appends a message without changing a number.
        f"{path}.messages": {"$size": length} if length else {"$in": [None, []]},
    }


def _changed(path: str, cut: Cut, moment: datetime) -> Document:
    removed = cut_fields(agent_fields(cut.stored), cut.last, cut.kept, cut.count, cut.usage)
    fields: Document = {
        "updated_at": moment,
        "next_message_id": cut.last + 1,
        "revision": cut.stale_below or number(cut.stored, "revision") + 1,
        "agent_data._internal_state": {},
    }
    if type(data := cut.stored.get("agent_data")) is dict and "conversation_manager_state" in data:
        fields[_STATE] = removed["agent_data"]["conversation_manager_state"]
    fields |= {name: removed[name] for name in ("view", "usage") if name in removed}
    if cut.returned is not None:
        fields |= {"messages": cut.returned, "archived": cut.archived, "stale_below": cut.stale_below}
    sets: Document = {f"{path}.{name}": {"$literal": value} for name, value in fields.items()}
    if cut.returned is None:
        kept = cut.kept - cut.archived
        sets[f"{path}.messages"] = {"$slice": [array_at(f"${path}.messages"), kept]} if kept else {"$literal": []}
    if "view" not in removed:
        sets[f"{path}.view"] = "$$REMOVE"
    return sets


def _is_same(path: str, stored: Any, name: str) -> Document:
    """Return the expression for whether a value of an agent is unchanged since it was read."""
    *outer, last = name.split(".")
    for part in outer:
        stored = usable(dict, stored.get(part))
    if last not in stored:
        return {"$eq": [{"$type": f"${path}"}, "missing"]}
    return {"$eq": [f"${path}", {"$literal": stored[last]}]}


def _is_left_out(event: str, cut: Cut) -> Document:
    message_id = f"{event}.message_id"
    return {
        "$and": [
            {"$eq": [f"{event}.agent_id", {"$literal": agent_id_of(cut.key)}]},
            {"$isNumber": message_id},
            {"$gt": [message_id, cut.last]},
        ]
    }


def _orchestrator_revisions(session: Mapping[str, Any], rewound: ObjectId) -> Document:
    """Return new revisions of the orchestrators, so that a manager that has loaded one can no longer write it."""
    sets: Document = {}
    for key, stored in usable(dict, session.get("multi_agents")).items():
        is_path = key and "." not in key and not key.startswith("$")
        if is_path and type(stored) is dict and is_number(stored.get("revision")):
            path = f"multi_agents.{key}"
            sets[f"{path}.revision"] = {"$add": [f"${path}.revision", 1]}
            sets[f"{path}.writer"] = str(rewound)
    return sets
