"""The texts of notifications: templates, subjects, bodies within a size limit, and JSON. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from string import Formatter
from typing import Any

from .._format.metadata import is_within

logger = logging.getLogger(__name__)

SNS_LIMIT = SQS_LIMIT = 256 * 1024
"""The maximum number of bytes of a message of SNS or SQS, including its attributes."""

WEBSOCKET_LIMIT = 128 * 1024
"""The maximum number of bytes of a WebSocket message of API Gateway."""

_SUBJECT_LIMIT = 100
_GROUP = re.compile(r"[A-Za-z0-9!-/:-@\[-`{-~]{1,128}")
_BREAK = re.compile(r" *[^\S ]\s*")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CUT = " [truncated]"

RATINGS = {"up": "positive", "down": "negative"}


def rating_of(feedback: Mapping[str, Any]) -> str:
    rating = feedback.get("rating")
    return RATINGS.get(rating, "neutral") if isinstance(rating, str) else "neutral"


def timestamp() -> str:
    return datetime.now(UTC).isoformat()


class Template:
    """A prefix with placeholders.

    A text with an unknown placeholder, a conversion (`!r`) or an unmatched brace is used literally, and logged as a
    warning.
    """

    def __init__(self, text: str | None, name: str, placeholders: Sequence[str]) -> None:
        self._text = text or ""
        self._is_plain = False
        try:
            for _, field, form, conversion in Formatter().parse(self._text):
                if field is not None and (field not in placeholders or conversion):
                    raise ValueError(f"unknown placeholder {field}")
                format("", form or "")
        except ValueError:
            self._is_plain = True
            known = ", ".join(f"{{{placeholder}}}" for placeholder in placeholders)
            logger.warning("template=<%r>, placeholders=<%r> | the template is invalid and used literally", name, known)

    def render(self, **values: str) -> str:
        return self._text if self._is_plain else self._text.format(**values)


def subject(text: str) -> str:
    """Return a valid SNS subject: one line of at most 100 printable ASCII characters."""
    decomposed = unicodedata.normalize("NFKD", _BREAK.sub(" ", text))
    ascii_only = "".join(
        character if " " <= character <= "~" else "?" if character.isalnum() else "" for character in decomposed
    ).strip()
    return ascii_only if len(ascii_only) <= _SUBJECT_LIMIT else f"{ascii_only[: _SUBJECT_LIMIT - 3]}..."


def feedback_body(prefix: str, session_id: str, comment: object, limit: int) -> str:
    shown = "" if comment is None else comment if isinstance(comment, str) else dumped(comment)
    body = text(f"{prefix}Session: {session_id}\n\n{shown}")
    encoded = body.encode()
    return body if len(encoded) <= limit else encoded[: limit - len(_CUT)].decode(errors="ignore") + _CUT


def metadata_body(
    session_id: str, operation: str, metadata: Mapping[str, Any], limit: int, *, first: str = "session_id"
) -> str:
    """Return the body for a metadata change: ASCII JSON that begins with the field `first`.

    If it exceeds `limit` bytes, `metadata` is the list of the keys that fit, and the field `truncated` is `true`.
    """
    head = {"session_id": session_id, "event": "metadata_update"}
    message: dict[str, Any] = {
        first: head.pop(first),
        **head,
        "operation": operation,
        "metadata": metadata,
        "timestamp": timestamp(),
    }
    body = dumped(message)
    if len(body) <= limit:
        return body
    keys: list[str] = []
    message |= {"metadata": keys, "truncated": True}
    left = limit - len(dumped(message))
    for key in metadata:
        left -= len(dumped(key)) + len(", ")
        if left < 0:
            break
        keys.append(key)
    return dumped(message)


def selected(metadata: Mapping[str, Any], fields: Sequence[str] | None, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """Return the changed metadata to send: without `hidden`, and only `fields`, in their order, if given.

    Keys and fields can be dotted paths: if `a` changed, the field `a.b` selects a part of it.
    """
    shown = {key: value for key, value in metadata.items() if not any(is_within(key, name) for name in hidden)}
    if fields is None:
        return shown
    chosen: dict[str, Any] = {}
    for field in fields:
        for key, value in shown.items():
            if is_within(key, field):
                chosen[key] = value
            elif is_within(field, key) and not any(is_within(key, other) for other in fields):
                part = _part(value, field[len(key) + 1 :].split("."))
                if part is not _ABSENT:
                    chosen[field] = part
    return chosen


_ABSENT = object()


def _part(value: Any, path: Sequence[str]) -> Any:
    """Return the part of a changed value at a path: `None` if the value was deleted."""
    for name in path:
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def dumped(value: Any) -> str:
    return json.dumps(to_json(value))


def to_json(value: Any) -> Any:
    """Return a value that JSON can represent.

    Dates become ISO 8601 in UTC (naive dates are taken as UTC), bytes base64, numbers without a JSON form their names
    (`"NaN"`, `"Infinity"`), and `ObjectId`, `Decimal128`, UUIDs and all other values their `str`.
    """
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else str(value).replace("inf", "Infinity").replace("nan", "NaN")
        case Mapping():
            return {_json_key(key): to_json(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [to_json(item) for item in value]
        case datetime():
            return (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)).isoformat()
        case date():
            return value.isoformat()
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(value).decode()
        case _:
            return str(value)


def _json_key(key: Any) -> str:
    return json.dumps(to_json(key)) if key is None or isinstance(key, bool | int | float) else str(key)


def text(value: str) -> str:
    """Replace the characters that XML forbids, because SNS and SQS reject them."""
    return _NOT_XML.sub("\ufffd", value)


def attributes(**values: str) -> dict[str, dict[str, str]]:
    return {name: {"DataType": "String", "StringValue": text(value)} for name, value in values.items()}


def size_of(described: Mapping[str, Mapping[str, str]]) -> int:
    return sum(
        len(part.encode()) for name, value in described.items() for part in (name, *value.values()) if part is not None
    )


def fifo_parameters(destination: str, session_id: str, identity: str) -> dict[str, str]:
    """Return the additional parameters for a FIFO topic or queue, none for a standard one.

    The session is the message group; an id that is not a valid group id is replaced by its digest.
    """
    if not destination.endswith(".fifo"):
        return {}
    fits = _GROUP.fullmatch(session_id) is not None
    group = session_id if fits else hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()
    return {"MessageGroupId": group, "MessageDeduplicationId": identity}
