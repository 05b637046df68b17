"""The export format of a session: JSON lines with values in canonical MongoDB Extended JSON. Pure.

    {"format": "mongodb-session-manager", "version": 1, "session_id": ..., "exported_at": ...}
    {"session": {...}}                  the fields of the document, except its agents
    {"agent": <id>, "fields": {...}}    an agent without its messages, which follow, oldest first
    {"attachment": <reference>, "at": <offset>, "data": <base64>}
    {"message": {...}}                  the stored message, its attachments as references
    {"content": <key>, "size": ..., "at": <offset>, "data": <base64>}    a value of the session's storage
    {"end": {"agents": ..., "messages": ..., "attachments": ..., "sha256": ...}}

The values of the storage follow the last message, in the order of their keys; each can have several pieces. Without
values, the last line does not count them.

The pieces of an attachment precede the first message that refers to it. A later message with the same bytes refers to
that attachment, even if its own reference has another token, unless there are `REMEMBERED` others between them. An
attachment ends with the piece that completes the length in its reference. An attachment without its last piece must be
ignored: its message was redacted during the export. The last line counts the agents, the messages and the complete
attachments; `sha256` is the digest of all lines before it, each with one line feed. It is optional, so that lines can
be edited.

In Extended JSON, keys that begin with `$` have a meaning, so a dict with such a key is written as
`{"$literal": [[<key>, <value>], ...]}`. A line that would be longer than `MAX_LINE` bytes, or have more than
`MAX_ELEMENTS` elements, is written as `{"bson": <the line as binary>}`. All lines are ASCII, so no encoding and no line
ending can damage them.

Message ids that do not increase are replaced, as opening a session does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

import bson
from bson import json_util
from bson.binary import UuidRepresentation
from bson.errors import BSONError

from .._format.attachment_refs import Reference, attached, references_of
from .._format.bounded import Bounded
from .._format.codec import CODEC_OPTIONS, MARKER
from .._format.dates import to_iso
from .._format.documents import Document
from .._format.ids import ExportedIds, checked_id
from .._format.keys import normalized_key
from .._format.sizes import MAX_DOCUMENT_BYTES, stored_size
from ..errors import InvalidArgumentError, raise_alone
from .import_checks import checked_agent, checked_message, checked_session, require

FORMAT = "mongodb-session-manager"
VERSION = 1

MAX_LINE = 32 * 1024 * 1024
"""The maximum number of bytes of a line; the largest document of MongoDB has 22 million as base64."""

MAX_ELEMENTS = 2**22
"""The maximum number of objects, arrays and commas of a line, outside of strings.

The largest MongoDB document has this number: the densest values that this format writes as JSON are empty arrays with
names of one character, 8 bytes of BSON each.
"""

MAX_RECORD = MAX_DOCUMENT_BYTES + 16 * 1024
"""The maximum number of bytes of BSON of a line."""

_SLICE = 256 * 1024

PIECE_BYTES = 512 * 1024
"""The maximum number of bytes of an attachment in an exported line."""

REMEMBERED = 1024
"""How many recent attachments reader and writer remember, by SHA-256, so that the same bytes are exported once."""

_MAX_LEVELS = 120
"""The maximum number of levels of a line; the server accepts 180, and a message in a bucket has 4 levels above it."""

_OPTIONS = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL, tz_aware=True, tzinfo=UTC, uuid_representation=UuidRepresentation.STANDARD
)
# Read values are stored unchanged: a `Binary` keeps its subtype.
_READ_OPTIONS = _OPTIONS.with_options(uuid_representation=UuidRepresentation.UNSPECIFIED)
_REFUSALS = (BSONError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""The errors that damaged Extended JSON can raise."""


# Writing.


def _escaped(value: Any) -> Any:
    if type(value) is dict:
        if any(key.startswith("$") for key in value):
            return {"$literal": [[key, _escaped(item)] for key, item in value.items()]}
        return {key: _escaped(item) for key, item in value.items()}
    return list(map(_escaped, value)) if type(value) is list else value


def line_of(record: Document) -> str:
    """Return the line, with its end, of a record whose keys do not begin with `$`."""
    line = json_util.dumps(_escaped(record), json_options=_OPTIONS, separators=(",", ":"))
    if len(line) >= MAX_LINE or (len(line) > MAX_ELEMENTS and not _has_few_elements(line.encode())):
        packed = base64.b64encode(bson.encode(record, codec_options=CODEC_OPTIONS)).decode()
        line = json.dumps({"bson": {"$binary": {"base64": packed, "subType": "00"}}})
    return f"{line}\n"


class Writer:
    def __init__(self) -> None:
        self._recent: Bounded[str, Reference] = Bounded(REMEMBERED)
        self._counts = {"agents": 0, "messages": 0, "attachments": 0}
        self._values = 0
        self._digest = hashlib.sha256()

    def knows(self, reference: Reference) -> bool:
        return reference.sha256 in self._recent

    def _digested(self, line: str) -> str:
        self._digest.update(line.encode())
        return line

    def head(self, session_id: str, fields: Document, moment: datetime) -> list[str]:
        header = {"format": FORMAT, "version": VERSION, "session_id": session_id, "exported_at": to_iso(moment)}
        return [self._digested(f"{json.dumps(header)}\n"), self._digested(line_of({"session": fields}))]

    def agent(self, agent_id: str, fields: Document) -> str:
        self._counts["agents"] += 1
        return self._digested(line_of({"agent": agent_id, "fields": fields}))

    def message(self, message: Mapping[str, Any]) -> str:
        self._counts["messages"] += 1
        return self._digested(line_of({"message": dict(message)}))

    def pieces(self, reference: Reference, at: int, data: bytes) -> Iterator[str]:
        for start in range(0, len(data), PIECE_BYTES):
            encoded = base64.b64encode(data[start : start + PIECE_BYTES]).decode()
            line = json.dumps({"attachment": str(reference), "at": at + start, "data": encoded})
            yield self._digested(f"{line}\n")

    def whole(self, reference: Reference) -> None:
        self._counts["attachments"] += 1
        self._recent[reference.sha256] = reference

    def value(self, key: str, data: bytes) -> Iterator[str]:
        """Yield the lines of a value of the storage."""
        for start in range(0, len(data) or 1, PIECE_BYTES):
            encoded = base64.b64encode(data[start : start + PIECE_BYTES]).decode()
            line = json.dumps({"content": key, "size": len(data), "at": start, "data": encoded})
            yield self._digested(f"{line}\n")
        self._values += 1

    def end(self) -> str:
        counts = self._counts | ({"content": self._values} if self._values else {})
        return f"{json.dumps({'end': {**counts, 'sha256': self._digest.hexdigest()}})}\n"


# Reading.


class SessionRead(NamedTuple):
    """A session without its agents; `session_id` is the id of the exported session."""

    session_id: str
    fields: Document


class AgentRead(NamedTuple):
    """An agent, without its messages."""

    agent_id: str
    fields: Document


class MessageRead(NamedTuple):
    """A message of the last agent that was read, and its size in bytes.

    Each of its references belongs to a complete attachment that was read before.
    """

    message: Document
    size: int


class PieceRead(NamedTuple):
    """Bytes of an attachment, from the offset `at`; `whole` if they are the last ones and the attachment is intact."""

    reference: Reference
    at: int
    data: bytes
    whole: bool


class ValueRead(NamedTuple):
    """Bytes of a value of the storage, from the offset `at`; `whole` if they are the last ones."""

    key: str
    size: int
    at: int
    data: bytes
    whole: bool


Read: TypeAlias = SessionRead | AgentRead | MessageRead | PieceRead | ValueRead


class Reader:
    """Reads lines from an untrusted source; the results can be stored, opened, listed, restored and exported."""

    def __init__(self) -> None:
        self.is_complete = False
        self._number = 0
        self._digest = hashlib.sha256()
        self._counts = {"agents": 0, "messages": 0, "attachments": 0}
        self._recent: Bounded[str, Reference] = Bounded(REMEMBERED)
        self._header: str | None = None
        self._has_session = False
        self._agents: set[str] = set()
        self._sequence = ExportedIds()
        self._room = MAX_DOCUMENT_BYTES
        self._attachment: tuple[Reference, int, Any] | None = None
        self._values = 0
        self._value: tuple[str, int, int] | None = None
        self._last_key = ""

    def read(self, line: object) -> Read | None:
        """Return the content of a line, or `None` if it has none; raise `InvalidArgumentError` if it is invalid."""
        self._number += 1
        try:
            data = _stripped(line)
            if not data:
                return None
            record = _record(data)
            found = self._content(record)
        except InvalidArgumentError as error:
            raise_alone(InvalidArgumentError(f"line {self._number} cannot be imported: {error}"))
        if "end" not in record:
            self._digest.update(data)
            self._digest.update(b"\n")
        return found

    def check_end(self) -> None:
        """Raise `InvalidArgumentError` if the last line is missing."""
        if not self.is_complete:
            where = f"after line {self._number}" if self._number else "before its first line"
            raise InvalidArgumentError(f"the export is truncated: it ends {where}, without the last line")

    def _content(self, record: Document) -> Read | None:
        if self._header is None:
            self._header = _checked_header(record)
            return None
        require(not self.is_complete, "it follows the last line of the export")
        if type(record.get("session")) is dict:
            require(not self._has_session, "it is a second session")
            self._has_session = True
            return SessionRead(self._header, self._fitting(checked_session(record["session"])))
        require(self._has_session, "the line of the session must come first")
        match record:
            case {"agent": agent_id, "fields": dict() as fields}:
                return self._agent(_plain_id(agent_id, "the agent's id"), fields)
            case {"message": dict() as message}:
                return self._message(message)
            case {"attachment": text, "at": int() as at, "data": str() as data}:
                return self._piece(Reference.parse(text), at, data)
            case {"content": key, "size": int() as size, "at": int() as at, "data": str() as data}:
                return self._value_piece(key, size, at, data)
            case {"end": dict() as numbers}:
                self._end(numbers)
                return None
        raise InvalidArgumentError("unknown record type")

    def _fitting(self, fields: Document) -> Document:
        self._room -= stored_size(fields)
        require(self._room >= 0, f"the fields of the session and its agents exceed {MAX_DOCUMENT_BYTES} bytes")
        return fields

    def _agent(self, agent_id: str, fields: Document) -> AgentRead:
        require(agent_id not in self._agents, "it is a second agent with that id")
        self._agents.add(agent_id)
        self._counts["agents"] += 1
        self._sequence = ExportedIds()
        return AgentRead(agent_id, self._fitting(checked_agent(fields)))

    def _message(self, message: Document) -> MessageRead:
        require(bool(self._agents), "it is a message without an agent")
        renamed: dict[str, Any] = {}
        for reference in references_of(message):
            known = self._recent.get(reference.sha256)
            require(
                known is not None and known.length == reference.length, "it refers to an attachment that is missing"
            )
            if known != reference:
                renamed[str(reference)] = {MARKER: "attachment", "v": str(known)}
        if renamed:
            listed = {renamed[text]["v"] if text in renamed else text for text in message["attachments"]}
            message = {**attached(message, renamed), "attachments": sorted(listed)}
        message, size = checked_message(message, self._sequence.next(message.get("message_id")))
        self._counts["messages"] += 1
        return MessageRead(message, size)

    def _piece(self, reference: Reference | None, at: int, text: str) -> PieceRead:
        require(bool(self._agents), "it is an attachment without an agent")
        require(reference is not None and reference.length > 0, "its reference is invalid")
        assert reference is not None
        data = _bytes_of(text)
        if at == 0:
            self._attachment = (reference, 0, hashlib.sha256())
        known, length, digest = self._attachment or (None, 0, hashlib.sha256())
        require(known == reference and length == at and bool(data), "it does not continue its attachment")
        digest.update(data)
        length += len(data)
        require(length <= reference.length, "its attachment is longer than the length in its reference")
        self._attachment = (reference, length, digest)
        if whole := length == reference.length:
            require(digest.hexdigest() == reference.sha256, "its attachment does not match its SHA-256")
            self._attachment = None
            self._recent[reference.sha256] = reference
            self._counts["attachments"] += 1
        return PieceRead(reference, at, data, whole)

    def _value_piece(self, key: object, size: int, at: int, text: str) -> ValueRead:
        data = _bytes_of(text)
        if at == 0:
            require(self._value is None, "the value before it is not complete")
            require(type(key) is str and normalized_key(key) == key, "its key is not valid")
            require(str(key) > self._last_key, "its key does not follow the key before it")
            require(size >= 0, "its size must be an int >= 0")
            self._value = (str(key), size, 0)
        known, expected, length = self._value or ("", -1, -1)
        require(key == known and size == expected and length == at, "it does not continue its value")
        length += len(data)
        require(length <= size and bool(data or not size), "its value does not have the given size")
        self._value = (known, size, length)
        if whole := length == size:
            self._value, self._last_key = None, known
            self._values += 1
        return ValueRead(known, size, at, data, whole)

    def _end(self, numbers: Document) -> None:
        require(self._value is None, "the value before it is not complete")
        counted = {name: numbers.get(name) for name in self._counts} | {"content": numbers.get("content", 0)}
        require(
            counted == self._counts | {"content": self._values},
            "its counts do not match the lines: some are missing or repeated",
        )
        if "sha256" in numbers:
            require(numbers["sha256"] == self._digest.hexdigest(), "a line before it was changed")
        self.is_complete = True


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise_alone(InvalidArgumentError("its data is not base64"))


def _stripped(line: object) -> bytes:
    if not isinstance(line, str | bytes):
        raise InvalidArgumentError(f"it must be str or bytes, not {type(line).__name__}")
    require(len(line) <= MAX_LINE + 2, f"it is longer than {MAX_LINE} bytes")
    try:
        data = line.encode() if isinstance(line, str) else line
    except UnicodeError:
        raise_alone(InvalidArgumentError("it is not UTF-8"))
    return data.strip(b" \t\r\n")


def _record(data: bytes) -> Document:
    require(_has_few_elements(data), f"it contains more than {MAX_ELEMENTS} values")
    try:
        text = data.decode()
    except UnicodeError:
        raise_alone(InvalidArgumentError("it is not UTF-8"))
    try:
        record = json.loads(text, object_pairs_hook=_value, parse_constant=_no_constant)
        if type(record) is dict and record.keys() == {"bson"} and type(record["bson"]) is bytes:
            require(len(record["bson"]) <= MAX_RECORD, "it exceeds the maximum size of a MongoDB document")
            record = bson.decode(record["bson"], CODEC_OPTIONS)
        if type(record) is not dict:
            raise ValueError
        _check_levels(record, _MAX_LEVELS)
        stored = bson.encode(record, codec_options=CODEC_OPTIONS)
        require(len(stored) <= MAX_RECORD, "it exceeds the maximum size of a MongoDB document")
        return bson.decode(stored, CODEC_OPTIONS)  # the checks see the values as they will be read
    except InvalidArgumentError:
        raise
    except _REFUSALS:
        raise_alone(InvalidArgumentError("it is damaged, or not Extended JSON"))


def _has_few_elements(data: bytes) -> bool:
    """Return whether a line has at most `MAX_ELEMENTS`; parsing an element takes about 64 bytes and 100 ns."""
    if _elements(data) <= MAX_ELEMENTS:
        return True
    # Elements inside strings do not count; without escapes, each quote begins or ends a string.
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = is_within = 0
    for begin in range(0, len(data), _SLICE):
        parts = data[begin : begin + _SLICE].split(b'"')
        count += _elements(b"".join(parts[is_within::2]))
        is_within = (is_within + len(parts) - 1) % 2
    return count <= MAX_ELEMENTS


def _elements(data: bytes) -> int:
    return sum(map(data.count, (b"{", b"[", b",")))


def _value(pairs: list[tuple[str, Any]]) -> Any:
    if len(pairs) == 1 and pairs[0][0] == "$literal":
        pairs = [(key, value) for key, value in pairs[0][1] if isinstance(key, str)]
        value: Any = dict(pairs)
    else:
        value = json_util.object_pairs_hook(pairs, _READ_OPTIONS)
        if type(value) is dict and any(key.startswith("$") for key in value):
            raise ValueError("an operator")
    if type(value) is dict and len(value) != len(pairs):
        raise ValueError("a key twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _check_levels(value: Any, left: int) -> None:
    if type(value) in (dict, list):
        if not left:
            raise ValueError("nested too deep")
        for item in value.values() if type(value) is dict else value:
            _check_levels(item, left - 1)


def _checked_header(record: Document) -> str:
    require(record.get("format") == FORMAT, "it is not the first line of an exported session")
    version = record.get("version")
    require(type(version) is int, f"the export version must be {VERSION}")
    require(version == VERSION, f"unsupported export version {version!r} (expected {VERSION})")
    return _plain_id(record.get("session_id"), "session_id")


def _plain_id(value: object, name: str) -> str:
    """Return an id that is a plain `str`; `Code` is a subclass of `str`."""
    require(not isinstance(value, str) or type(value) is str, f"{name} must be a str, not {type(value).__name__}")
    return checked_id(value, name)
