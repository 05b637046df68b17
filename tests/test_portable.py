"""The portable form of a session: every value comes back, and nothing is read that could not have been written."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from bson import Int64, Regex
from hypothesis import example, given
from hypothesis import strategies as st

from fix_codec import through_bson, values
from mongodb_session_manager import EncodingError, InvalidArgumentError
from mongodb_session_manager._copying import export_format as portable
from mongodb_session_manager._copying.export_format import PieceRead, Reader, Writer, line_of
from mongodb_session_manager._format.attachment_refs import Reference
from mongodb_session_manager._format.codec import CODEC_OPTIONS, encode
from mongodb_session_manager._format.sizes import stored_size

MOMENT = datetime(2026, 11, 23, 12, tzinfo=UTC)
DATA = b"0123456789" * 60_000
REFERENCE = Reference(hashlib.sha256(DATA).hexdigest(), len(DATA), 7)

dollar_keys = st.sampled_from(["$oid", "$date", "$numberInt", "$literal", "$set", "$", "$binary", "$uuid", "plain"])
look_alikes = st.recursive(
    st.none() | st.integers(-(2**40), 2**40) | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.dictionaries(dollar_keys, inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=8,
)


def stored(message_id: int, *content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    role = ("user", "assistant")[message_id % 2]
    body = {"role": role, "content": [*content] or [{"text": f"text {message_id}"}]}
    return {"message": body, "message_id": message_id, "redact_message": None, "created_at": MOMENT, **fields}


def export(*, attachment: bool = False) -> list[str]:
    """The lines of a small session."""
    return [*_exported(attachment)]


@functools.cache
def _exported(attachment: bool) -> tuple[str, ...]:
    writer = Writer()
    lines = writer.head("s", {"application_name": "app", "metadata": {"a": 1}, "created_at": MOMENT}, MOMENT)
    lines.append(writer.agent("a.b", {"agent_data": {"state": {}}}))
    lines.append(writer.message(stored(0)))
    if attachment:
        lines += writer.pieces(REFERENCE, 0, DATA)
        writer.whole(REFERENCE)
        lines.append(writer.message(stored(1, attachments=[str(REFERENCE)])))
    return (*lines, writer.end())


def read(lines: list[Any]) -> list[Any]:
    reader = Reader()
    found = [each for line in lines if (each := reader.read(line)) is not None]
    reader.check_end()
    return found


def in_bson(value: Any) -> bytes:
    """Return a value as BSON, which tells 1 from 1.0; every NaN is the same."""

    def walk(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: walk(item) for key, item in part.items()}
        if isinstance(part, list):
            return list(map(walk, part))
        return math.nan if isinstance(part, float) and math.isnan(part) else part

    return bson.encode({"v": walk(value)}, codec_options=CODEC_OPTIONS)


# Values.


@given(values)
def test_whatever_the_codec_stores_comes_back(value: Any) -> None:
    try:
        encoded = encode(value, depth=6)
    except EncodingError:
        return
    kept = through_bson(encoded)
    line = line_of({"value": kept})
    assert line.isascii()
    assert line.splitlines(keepends=True) == [line]
    assert in_bson(portable._record(line.encode())["value"]) == in_bson(kept)


@given(look_alikes)
@example({"$numberInt": "5"})
@example({"$literal": [["a", 1]]})
@example({"a": {"$date": {"$numberLong": "0"}}})
def test_what_looks_like_extended_json_comes_back_as_what_it_is(value: Any) -> None:
    line = line_of({"value": value})
    assert in_bson(portable._record(line.encode())["value"]) == in_bson(value)


def test_a_value_reads_naturally() -> None:
    assert json.loads(
        line_of({"n": 1, "long": Int64(2), "at": MOMENT, "text": "grün", "none": None, "set": {"$x": 1}})
    ) == {
        "n": {"$numberInt": "1"},
        "long": {"$numberLong": "2"},
        "at": {"$date": {"$numberLong": "1795435200000"}},
        "text": "grün",
        "none": None,
        "set": {"$literal": [["$x", {"$numberInt": "1"}]]},
    }


def test_a_record_that_would_be_too_long_a_line_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "MAX_LINE", 1000)
    record = {"values": [Regex("")] * 50, "key": "x"}
    line = line_of(record)
    assert len(line) < 1000 < len(portable.json_util.dumps(record))
    assert json.loads(line).keys() == {"bson"}
    assert portable._record(line.encode()) == record


# Lines.


def test_the_lines_of_a_session() -> None:
    lines = [json.loads(line) for line in export(attachment=True)]
    assert lines[0] == {
        "format": "mongodb-session-manager",
        "version": 1,
        "session_id": "s",
        "exported_at": "2026-11-23T12:00:00+00:00",
    }
    assert [next(iter(line)) for line in lines[1:]] == [
        "session", "agent", "message", "attachment", "attachment", "message", "end",
    ]  # fmt: skip
    assert [line["at"] for line in lines if "at" in line] == [0, 512 * 1024]
    assert b"".join(base64.b64decode(line["data"]) for line in lines if "data" in line) == DATA
    assert {name: lines[-1]["end"][name] for name in ("agents", "messages", "attachments")} == {
        "agents": 1, "messages": 2, "attachments": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        lambda lines: lines,
        lambda lines: [line.rstrip("\n") for line in lines],
        lambda lines: [line.replace("\n", "\r\n").encode() for line in lines],
        lambda lines: [*lines, "\n", b"", "  \r\n"],
        lambda lines: [*lines[:-1], '{"end": {"agents": 1, "messages": 2, "attachments": 1}}'],
    ],
    ids=["as written", "without ends", "bytes", "blank lines", "without a digest"],
)
def test_lines_are_read(changed: Any) -> None:
    session, agent, first, *pieces, second = read(changed(export(attachment=True)))
    assert (session.session_id, session.fields["metadata"]) == ("s", {"a": 1})
    assert (agent.agent_id, agent.fields) == ("a.b", {"agent_data": {"state": {}}})
    assert first.message == stored(0)
    assert first.size == stored_size(stored(0))
    assert [(piece.at, piece.whole) for piece in pieces] == [(0, False), (512 * 1024, True)]
    assert second.message["attachments"] == [str(REFERENCE)]


def test_every_truncated_export_is_recognised() -> None:
    lines = export(attachment=True)
    for count in range(len(lines)):
        with pytest.raises(InvalidArgumentError, match=r"^the export is truncated: it ends (before|after) "):
            read(lines[:count])


@pytest.mark.parametrize("missing", range(8))
def test_a_missing_line_is_noticed(missing: int) -> None:
    lines = export(attachment=True)
    assert len(lines) == 8
    del lines[missing]
    with pytest.raises(InvalidArgumentError, match=r"^(line \d+ cannot be imported|the export is truncated): "):
        read(lines)


@given(st.data())
def test_every_changed_character_is_noticed(data: st.DataObject) -> None:
    lines = export()
    number = data.draw(st.integers(0, len(lines) - 1))
    line = lines[number].rstrip("\n")
    at = data.draw(st.integers(0, len(line) - 1))
    character = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda found: found != line[at]))
    lines[number] = line[:at] + character + line[at + 1 :]
    try:
        read(lines)
    except InvalidArgumentError as error:
        assert str(error).startswith(("line ", "the export is truncated"))  # noqa: PT017
    else:
        # The name of the digest, which may be left out.
        assert number == len(lines) - 1
        assert "sha256" not in json.loads(lines[number])["end"]


def replaced(number: int, line: Any) -> list[Any]:
    lines: list[Any] = export(attachment=True)
    lines[number] = line
    return lines


def edited(number: int, **fields: Any) -> list[Any]:
    record = portable._record(export(attachment=True)[number].encode())
    kind = next(iter(record))
    record[kind] = {**record[kind], **fields}
    return replaced(number, line_of(record))


def deep(levels: int) -> str:
    return '{"message": ' + '{"a":' * levels + "1" + "}" * levels + "}"


REFUSED = {
    "no export": (replaced(0, '{"format": "csv"}'), 1, "it is not the first line of an exported session"),
    "no header": (export()[1:], 1, "it is not the first line of an exported session"),
    "newer": (
        replaced(0, '{"format": "mongodb-session-manager", "version": 2, "session_id": "s"}'),
        1,
        "unsupported export version 2 (expected 1)",
    ),
    "a version that is true": (
        replaced(0, '{"format": "mongodb-session-manager", "version": true, "session_id": "s"}'),
        1,
        "the export version must be 1",
    ),
    "an operator as id": (
        replaced(0, '{"format": "mongodb-session-manager", "version": 1, "session_id": {"$ne": null}}'),
        1,
        "it is damaged, or not Extended JSON",
    ),
    "an object as id": (
        replaced(0, '{"format": "mongodb-session-manager", "version": 1, "session_id": {"ne": null}}'),
        1,
        "session_id must be a str, not dict",
    ),
    "no JSON": (replaced(3, "{"), 4, "it is damaged, or not Extended JSON"),
    "a list": (replaced(3, "[]"), 4, "it is damaged, or not Extended JSON"),
    "no UTF-8": (replaced(3, b"\xff"), 4, "it is not UTF-8"),
    "a surrogate": (replaced(3, '{"message": {"a": "\\ud83d"}}'), 4, "it is damaged, or not Extended JSON"),
    "a raw surrogate": (replaced(3, '{"message": "\ud83d"}'), 4, "it is not UTF-8"),
    "no text": (replaced(3, 3), 4, "it must be str or bytes, not int"),
    "too long": (replaced(3, "x" * (portable.MAX_LINE + 3)), 4, f"it is longer than {portable.MAX_LINE} bytes"),
    "not a number": (replaced(3, '{"message": NaN}'), 4, "it is damaged, or not Extended JSON"),
    "a number beyond 64 bits": (
        replaced(3, '{"message": {"a": ' + "9" * 30 + "}}"),
        4,
        "it is damaged, or not Extended JSON",
    ),
    "a NUL in a key": (replaced(3, '{"message": {"a\\u0000b": 1}}'), 4, "it is damaged, or not Extended JSON"),
    "a key twice": (replaced(3, '{"message": {"a": 1, "a": 2}}'), 4, "it is damaged, or not Extended JSON"),
    "an operator": (replaced(3, '{"message": {"$set": {}}}'), 4, "it is damaged, or not Extended JSON"),
    "a date that is none": (replaced(3, '{"message": {"a": {"$date": []}}}'), 4, "it is damaged, or not Extended JSON"),
    "a literal that is none": (replaced(3, '{"message": {"$literal": [1]}}'), 4, "it is damaged, or not Extended JSON"),
    "nested": (replaced(3, deep(150)), 4, "it is damaged, or not Extended JSON"),
    "nested deeply": (replaced(3, deep(200_000)), 4, "it is damaged, or not Extended JSON"),
    "packed nonsense": (
        replaced(3, '{"bson": {"$binary": {"base64": "AAAA", "subType": "00"}}}'),
        4,
        "it is damaged, or not Extended JSON",
    ),
    "of no kind": (replaced(3, '{"massage": {}}'), 4, "unknown record type"),
    "a second session": (replaced(3, export()[1]), 4, "it is a second session"),
    "an agent twice": (replaced(3, export()[2]), 4, "it is a second agent with that id"),
    "an agent of no name": (replaced(2, '{"agent": "", "fields": {}}'), 3, "the agent's id must not be empty"),
    "no session": (replaced(1, export()[2]), 2, "the line of the session must come first"),
    "a message of nobody": (replaced(2, export()[3]), 3, "it is a message without an agent"),
    "a message twice": (replaced(6, export()[3]), 8, "a line before it was changed"),
    "after the end": ([*export(), export()[3]], 6, "it follows the last line of the export"),
    "other numbers": (
        replaced(7, '{"end": {"agents": 1, "messages": 3, "attachments": 1}}'),
        8,
        "its counts do not match the lines: some are missing or repeated",
    ),
    "changed text": (edited(3, created_at=None), 8, "a line before it was changed"),
    "a session with an operator": (
        replaced(1, '{"session": {"$literal": [["$set", 1]]}}'),
        2,
        "the session must not contain a field whose name is empty, begins with $ or contains a dot",
    ),
    "a path": (
        edited(1, **{"a.b": 1}),
        2,
        "the session must not contain a field whose name is empty, begins with $ or contains a dot",
    ),
    "metadata": (edited(1, metadata=[1]), 2, "'metadata' must be a dict, not list"),
    "an operator in metadata": (
        edited(1, metadata={"$set": 1}),
        2,
        "metadata must not contain a key that begins with $",
    ),
    "application_name": (edited(1, application_name=1), 2, "application_name must be a str, not int"),
    "session_type": (edited(1, session_type=5), 2, "session_type must be a str, not int"),
    "created_at": (edited(1, created_at="yesterday"), 2, "created_at must be a date"),
    "feedbacks": (edited(1, feedbacks=["good"]), 2, "feedbacks.0 must be an object"),
    "a multi-agent": (edited(1, multi_agents={"g": {"state": 1}}), 2, "multi_agents: revision must be an int >= 0"),
    "a path to a multi-agent": (
        edited(1, multi_agents={"g.h": {"state": 1, "revision": 1, "writer": "w"}}),
        2,
        "multi_agents must not contain a field whose name is empty, begins with $ or contains a dot",
    ),
    "an agent with a path": (
        replaced(2, '{"agent": "a", "fields": {"a.b": 1}}'),
        3,
        "the agent must not contain a field whose name is empty, begins with $ or contains a dot",
    ),
    "agent_data with a name that is empty": (
        replaced(2, '{"agent": "a", "fields": {"agent_data": {"": 1}}}'),
        3,
        "agent_data must not contain a field whose name is empty, begins with $ or contains a dot",
    ),
    "an agent of yesterday": (
        replaced(2, '{"agent": "a", "fields": {"updated_at": "yesterday"}}'),
        3,
        "updated_at must be a date",
    ),
    "a state that is no object": (
        replaced(2, '{"agent": "a", "fields": {"agent_data": {"state": 1}}}'),
        3,
        "agent_data.state must be an object",
    ),
    "a model that has no name": (
        replaced(2, '{"agent": "a", "fields": {"agent_data": {"model": 1}}}'),
        3,
        "agent_data.model must be a str, not int",
    ),
    "a message with a path": (
        edited(3, **{"a.b": 1}),
        4,
        "the message must not contain a field whose name is empty, begins with $ or contains a dot",
    ),
    "a message of yesterday": (edited(3, created_at="yesterday"), 4, "created_at must be a date"),
    "a message with other metrics": (edited(3, usage=1), 4, "usage must be a dict, not int"),
    "agent_data": (replaced(2, '{"agent": "a", "fields": {"agent_data": 1}}'), 3, "agent_data must be a dict, not int"),
    "usage": (
        replaced(2, '{"agent": "a", "fields": {"usage": {"inputTokens": "1"}}}'),
        3,
        "usage must contain numbers from -2**62 to 2**62 only",
    ),
    "no message": (edited(3, message={"role": "user"}), 4, "message must have a role and a list of content"),
    "no redaction": (edited(3, redact_message="x"), 4, "redact_message must have a role and a list of content"),
    "an attachment that is not there": (
        edited(3, attachments=[str(REFERENCE)]),
        4,
        "it refers to an attachment that is missing",
    ),
    "no reference": (edited(3, attachments=["x"]), 4, "attachments must contain references only"),
    "a piece of no agent": (replaced(2, export(attachment=True)[4]), 3, "it is an attachment without an agent"),
    "a piece of no reference": (
        replaced(4, '{"attachment": "x", "at": 0, "data": "AAAA"}'),
        5,
        "its reference is invalid",
    ),
    "a piece that is no base64": (
        replaced(4, json.dumps({"attachment": str(REFERENCE), "at": 0, "data": "!"})),
        5,
        "its data is not base64",
    ),
    "a piece of another place": (
        replaced(5, json.dumps({"attachment": str(REFERENCE), "at": 7, "data": "AAAA"})),
        6,
        "it does not continue its attachment",
    ),
    "a piece too many": (
        replaced(5, json.dumps({"attachment": str(REFERENCE), "at": 512 * 1024, "data": "AAAA" * 200_000})),
        6,
        "its attachment is longer than the length in its reference",
    ),
    "other bytes": (
        replaced(4, export(attachment=True)[4].replace("MDEy", "MDEx", 1)),
        6,
        "its attachment does not match its SHA-256",
    ),
    "an unfinished attachment": (replaced(5, ""), 7, "it refers to an attachment that is missing"),
}


@pytest.mark.parametrize(("lines", "number", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_with_the_number_of_its_line(lines: list[Any], number: int, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        read(lines)
    assert str(refusal.value) == f"line {number} cannot be imported: {reason}"
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


def test_an_attachment_may_end_early_if_nobody_refers_to_it() -> None:
    lines = export(attachment=True)
    lines[5] = lines[6] = ""
    lines[7] = '{"end": {"agents": 1, "messages": 1, "attachments": 0}}'
    pieces = [found for found in read(lines) if isinstance(found, PieceRead)]
    assert [piece.whole for piece in pieces] == [False]


def test_an_attachment_may_come_again_after_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "REMEMBERED", 64)
    writer = Writer()
    lines = [*writer.head("s", {}, MOMENT), writer.agent("a", {})]
    blobs = [str(n).encode() for n in range(portable.REMEMBERED + 1)]
    references = [Reference(hashlib.sha256(blob).hexdigest(), len(blob), 0) for blob in blobs]
    for n, (blob, reference) in enumerate(zip([*blobs, blobs[0]], [*references, references[0]], strict=True)):
        assert not writer.knows(reference)
        lines += writer.pieces(reference, 0, blob)
        writer.whole(reference)
        assert writer.knows(reference)
        lines.append(writer.message(stored(n, attachments=[str(reference)])))
    assert len(read([*lines, writer.end()])) == 2 + 2 * (portable.REMEMBERED + 2)
    lines.append(writer.message(stored(n + 1, attachments=[str(references[1])])))
    with pytest.raises(InvalidArgumentError, match="refers to an attachment that is missing"):
        read([*lines, writer.end()])
