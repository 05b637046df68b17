"""The references of a message to bytes in GridFS, and the limits of its size. Pure.

If the bytes of a message together exceed a limit, it is recorded with `attachments`, a list of `Attachment`. When the
message is stored, the bytes are in GridFS, and its element of `messages` has

    message, redact_message   {"__msm__": "attachment", "v": <reference>} in the place of the bytes
    attachments               [<reference>]

A reference is text, `<SHA-256>:<length>:<token>`. Each attachment of each recorded message has its own token, the
hexadecimal digits of an ObjectId, so no two messages share a file. In messages that 1.0.0 has stored, the token is a
decimal number, and several messages of a session can have the same reference. A copy of a session keeps the references.
The codec escapes values of a message that look like a marker. A marker is replaced by bytes only if `attachments` lists
its reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self, TypeVar, cast

from bson import ObjectId

from ..errors import ConfigurationError, MessageTooLargeError
from .codec import MARKER
from .documents import Document
from .sizes import stored_size

T = TypeVar("T", bound=Mapping[str, Any])

MAX_INLINE_ATTACHMENT_BYTES = 256 * 1024
"""Images, documents and videos of one message are stored in the document if their total size is at most this."""

MAX_MESSAGE_BYTES = 15 * 1024 * 1024
"""The maximum number of bytes of BSON of one message, without its attachments.

A document of MongoDB has at most 16 MiB. The rest is for the other fields of the document.
"""

_TAG = "attachment"
_WORTHWHILE = 128
"""The size in bytes of the longest reference; smaller values stay in the message."""
_TOKEN_LENGTH = 24
_FORM = re.compile(r"([0-9a-f]{64}):([0-9]{1,18}):([0-9a-f]{24}|[0-9]{1,18})")


class Reference(NamedTuple):
    sha256: str
    length: int
    token: str

    def __str__(self) -> str:
        return f"{self.sha256}:{self.length}:{self.token}"

    @classmethod
    def parse(cls, text: object) -> Self | None:
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        return None if match is None else cls(match[1], int(match[2]), match[3])

    @property
    def is_of_v1(self) -> bool:
        return self.token.isdecimal() and len(self.token) < _TOKEN_LENGTH


class Attachment(NamedTuple):
    """Bytes of a recorded message that will be stored in GridFS, and their token."""

    token: str
    data: bytes


def checked_inline_bytes(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_MESSAGE_BYTES:
        raise ConfigurationError(
            f"max_inline_attachment_bytes must be an int from 0 to {MAX_MESSAGE_BYTES}, got {value!r}"
        )
    return value


def set_aside(fields: T, max_inline: int) -> tuple[T, int]:
    """Return the fields of a message, and their size in bytes; `attachments` lists the bytes that go to GridFS.

    The size does not include the attachments.

    Raises:
        MessageTooLargeError: The rest is larger than `MAX_MESSAGE_BYTES`.
    """
    found = _bytes_in(fields.values())
    if sum(map(len, found.values())) > max_inline:
        references = {key: str(Reference("0" * 64, len(data), "0" * 24)) for key, data in found.items()}
        fields = cast(T, {**fields, "attachments": [Attachment(str(ObjectId()), data) for data in found.values()]})
        size = stored_size(detached(fields, references))
    else:
        size = stored_size(fields)
    if size > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(
            f"a message of {size} bytes, its attachments not counted, exceeds the maximum of "
            f"{MAX_MESSAGE_BYTES} bytes; it was not stored"
        )
    return fields, size


def replacement(fields: Document, max_inline: int) -> tuple[Document, int]:
    """Return the fields that replace the content and all attachments of a message, as `set_aside` does."""
    fields, size = set_aside(fields, max_inline)
    return {"attachments": [], **fields}, size


def _bytes_in(values: Iterable[Any]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    left = list(values)
    while left:
        value = left.pop()
        kind = type(value)
        if kind is dict:
            left.extend(value.values())
        elif kind is list:
            left.extend(value)
        elif kind is bytes and len(value) > _WORTHWHILE:
            found[id(value)] = value
    return found


def detached(fields: Mapping[str, Any], references: Mapping[int, str]) -> Document:
    """Return the fields of a message with references, by identity of the bytes, instead of its `attachments`."""

    def refer(value: Any) -> Any:
        if type(value) is bytes and (reference := references.get(id(value))) is not None:
            return {MARKER: _TAG, "v": reference}
        return value

    listed = sorted({references[id(attachment.data)] for attachment in fields["attachments"]})
    return {**_exchanged(fields, refer), "attachments": listed}


def references_of(stored: object) -> list[Reference]:
    listed = stored.get("attachments") if isinstance(stored, Mapping) else None
    found = map(Reference.parse, listed if isinstance(listed, list) else ())
    return [reference for reference in found if reference is not None]


def attached(stored: Mapping[str, Any], blobs: Mapping[str, bytes]) -> Document:
    """Return a stored message with bytes instead of its references; the inverse of `detached`."""

    def fetch(value: Any) -> Any:
        if type(value) is dict and value.get(MARKER) == _TAG and type(value.get("v")) is str:
            return blobs.get(value["v"], value)
        return value

    return _exchanged(stored, fetch)


def _exchanged(fields: Mapping[str, Any], exchange: Callable[[Any], Any]) -> Document:
    def walk(value: Any) -> Any:
        new = exchange(value)
        if new is not value:
            return new
        if type(value) is dict:
            return {key: walk(item) for key, item in value.items()}
        return list(map(walk, value)) if type(value) is list else value

    content = {name: walk(fields[name]) for name in ("message", "redact_message") if name in fields}
    return {**fields, **content}
