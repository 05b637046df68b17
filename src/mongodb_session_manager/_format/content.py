"""The fields of a session document about the content of its storage, see `_store.content`. Pure.

has_content        true once the storage has been used; set before the first value is stored
removed_content    the ids of messages and tool calls whose content was removed, and must not be stored again; also in a
                   session without content, because an agent that was loaded before can store the first value

Strands' context manager stores each block of a message under a key that contains the `tracking_id` of the message; of a
tool result, under a key that contains the `toolUseId` of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .documents import Document, usable
from .expressions import array_at, entries_at, is_object
from .keys import stash_prefix

HAS_CONTENT = "has_content"
REMOVED_CONTENT = "removed_content"


def block_ids_of(stored: object) -> list[str]:
    """Return the ids under which the context manager stores the blocks of a stored message, as in `block_id_of`."""
    message = usable(dict, usable(dict, stored).get("message"))
    blocks = [usable(dict, block) for block in usable(list, message.get("content"))]
    found = [message.get("tracking_id"), *(usable(dict, block.get("toolResult")).get("toolUseId") for block in blocks)]
    return [each.rpartition("/")[2] for each in found if type(each) is str]


def block_ids(messages: Document) -> Document:
    """Return the expression for the `block_ids_of` several messages."""
    use_ids = array_at("$$this.message.content.toolResult.toolUseId")
    ids = {"$concatArrays": ["$$value", ["$$this.message.tracking_id"], use_ids]}
    found = {"$reduce": {"input": messages, "initialValue": [], "in": ids}}
    texts = {"$filter": {"input": found, "cond": {"$eq": [{"$type": "$$this"}, "string"]}}}
    return {"$map": {"input": texts, "in": {"$arrayElemAt": [{"$split": ["$$this", "/"]}, -1]}}}


_REDACTED: Document = {"$filter": {"input": array_at("$$agent.v.messages"), "cond": is_object("$$this.redact_message")}}
_REDACTED_OF_AGENTS: Document = {
    "$reduce": {
        "input": {"$map": {"input": entries_at("$agents"), "as": "agent", "in": block_ids(_REDACTED)}},
        "initialValue": [],
        "in": {"$concatArrays": ["$$value", "$$this"]},
    }
}


def with_removed_content(lists: Sequence[Document | list[str]]) -> Document:
    """Return the expression for `REMOVED_CONTENT` with further ids."""
    more = [{"$literal": each} if isinstance(each, list) else each for each in lists]
    union = {"$setUnion": [array_at(f"${REMOVED_CONTENT}"), *more]}
    return {"$let": {"vars": {"ids": union}, "in": {"$cond": [{"$eq": ["$$ids", []]}, "$$REMOVE", "$$ids"]}}}


CONTENT_BEGINS: list[Document] = [
    {"$set": {HAS_CONTENT: True, REMOVED_CONTENT: with_removed_content([_REDACTED_OF_AGENTS])}}
]
"""The update before the first value is stored; it records the ids of messages that earlier versions have redacted."""

CONTENT_TO_REMOVE: Document = {
    REMOVED_CONTENT: {"$cond": [{"$eq": [f"${HAS_CONTENT}", True]}, array_at(f"${REMOVED_CONTENT}"), []]}
}
"""The projection of the ids in `REMOVED_CONTENT` of a session that has content."""


def without_removed_content(ids: Sequence[str]) -> list[Document]:
    """Return the update that removes ids from `REMOVED_CONTENT`."""
    left = {"$setDifference": [array_at(f"${REMOVED_CONTENT}"), {"$literal": list(ids)}]}
    rest: Document = {"$let": {"vars": {"ids": left}, "in": {"$cond": [{"$eq": ["$$ids", []]}, "$$REMOVE", "$$ids"]}}}
    return [{"$set": {REMOVED_CONTENT: rest}}]


def is_removed(block_id: str) -> Document:
    """Return the expression for whether the content with an id was removed."""
    return {"$in": [{"$literal": block_id}, array_at(f"${REMOVED_CONTENT}")]}


def removed_ids(document: Mapping[str, Any]) -> list[str]:
    """Return the ids that a session document lists in `REMOVED_CONTENT`."""
    return [each for each in usable(list, document.get(REMOVED_CONTENT)) if type(each) is str]


def all_block_ids(messages: Iterable[object]) -> set[str]:
    return {each for message in messages for each in block_ids_of(message)}


def copied_key_at(path: str, source: str, target: str) -> Document | str:
    """Return the expression for the `copied_key` of the key at a path."""
    old, new = stash_prefix(source), stash_prefix(target)
    if old is None or new is None:
        return path
    rest = {"$substrBytes": [path, len(old.encode()), -1]}
    is_old = {"$eq": [{"$indexOfBytes": [path, {"$literal": old}]}, 0]}
    return {"$cond": [is_old, {"$concat": [{"$literal": new}, rest]}, path]}
